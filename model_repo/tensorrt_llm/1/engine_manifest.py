"""`engine.json`: what an engine is, what it was made from, what it runs on, and the digest of each of its files.

It is written last, so an engine folder that has one is complete. The builder writes it and the server checks it, both
with this module: `build/engine_manifest.py` is a link to it. The server imports it inside Triton's Python stub, so it
needs nothing but the standard library.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, Literal, TypedDict, get_args, get_origin, get_type_hints, is_typeddict

SCHEMA = 2  # a change of fields or of their meaning gets a new number, and by it every engine a new key
MANIFEST_NAME = "engine.json"

_HASHING_THREADS = min(8, os.cpu_count() or 1)  # hashing releases the GIL; more only make a disk seek
_BLOCK_BYTES = 4 << 20
_REBUILD = "build it again with --force"


class ManifestError(Exception):
    """An engine that is damaged, unfinished, or made for something else. One sentence, with what to do."""


class Limits(TypedDict):
    """Lengths in tokens; `max_batch_size` in sequences that generate at the same time."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_beam_width: int


class Gpu(TypedDict):
    product: str  # as in the node label nvidia.com/gpu.product
    compute_capability: str  # "9.0"


class FileRecord(TypedDict):
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class EngineManifest:
    schema: int = SCHEMA
    key: str  # the store's, hex SHA-256 of what the engine was made from
    engine: Literal["openvino", "tensorrt", "pytorch", "synthetic"]
    model: str
    revision: str | None  # the commit; None for a local folder
    checkpoint_digest: str
    architecture: str
    dtype: str
    quantization: str
    kv_cache_dtype: str  # "auto": as wide as dtype
    tensor_parallel: int
    pipeline_parallel: int
    limits: Limits
    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: list[int]
    pad_token_id: int | None
    kv_bytes_per_token: int
    gpu: Gpu | None  # that it was built for; None where any will do
    versions: dict[str, str]  # of the packages that built it: "openvino", "tensorrt_llm", "tensorrt", ...
    created: str  # UTC, ISO 8601
    files: dict[str, FileRecord]  # by path below the folder, with slashes; all but engine.json itself

    @property
    def world_size(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


# ---- reading and writing ---------------------------------------------------------------------------------------------


def write_manifest(folder: Path, manifest: EngineManifest) -> None:
    """Write `engine.json` durably and as a whole. Raises OSError."""
    text = json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n"
    _parse(text.encode(), folder / MANIFEST_NAME)  # never write what nobody will read
    new = folder / f".{MANIFEST_NAME}.{os.getpid()}"
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, folder / MANIFEST_NAME)
    fsync_folder(folder)


def read_manifest(folder: Path) -> EngineManifest:
    """Raises ManifestError; its cause is the OSError if `engine.json` is there and cannot be read."""
    path = folder / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        what = f"{folder} has no {MANIFEST_NAME}" if folder.is_dir() else f"{folder} is not a folder"
        raise ManifestError(f"{what}: not an engine, or a build that did not finish; build it first") from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}") from error
    return _parse(content, path)


def _parse(content: bytes, path: Path) -> EngineManifest:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is damaged: it is not JSON ({error}); {_REBUILD}") from None
    if not isinstance(fields, dict):
        raise ManifestError(f"{path} is damaged: it is not a JSON object; {_REBUILD}")
    if fields.get("schema", SCHEMA) != SCHEMA:
        raise ManifestError(
            f"{path} has schema {fields['schema']!r}, and this program knows schema {SCHEMA}; "
            "build the engine again with this version, or serve it with the version that built it"
        )
    try:
        manifest = EngineManifest(**_read_fields(EngineManifest, fields, ""))
        for name in manifest.files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"names the file {name!r}, which is outside the folder")
    except ValueError as error:
        raise ManifestError(f"{path} {error}; it is damaged, or another version wrote it: {_REBUILD}") from None
    return manifest


def _read_fields(kind: type, values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The fields of a dataclass or TypedDict, each of the type it declares. Raises ValueError, to follow the path."""
    types = get_type_hints(kind)
    for names, complaint in ((types.keys() - values, "lacks"), (values.keys() - types, "has the unknown")):
        if names:
            raise ValueError(f"{complaint} field {', '.join(repr(prefix + name) for name in sorted(names))}")
    return {name: _read_value(types[name], value, prefix + name) for name, value in values.items()}


def _read_value(kind: Any, value: Any, name: str) -> Any:
    arguments = get_args(kind)
    match get_origin(kind), value:
        case (_, dict()) if is_typeddict(kind):
            return _read_fields(kind, value, f"{name}.")
        case (origin, _) if origin is UnionType:
            return None if value is None else _read_value(arguments[0], value, name)
        case (origin, str()) if origin is Literal and value in arguments:
            return value
        case (origin, list()) if origin is list:
            return [_read_value(arguments[0], item, name) for item in value]
        case (origin, dict()) if origin is dict:
            return {key: _read_value(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if type(value) is not kind:  # no isinstance: True is no number here
        raise ValueError(f"has the unexpected value {value!r:.60} in field '{name}'")
    return value


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a network file system that does it by itself
            raise
    finally:
        os.close(descriptor)


# ---- the files -------------------------------------------------------------------------------------------------------


def list_files(folder: Path) -> dict[str, FileRecord]:
    """Size and SHA-256 of every file below `folder` but engine.json. Raises OSError, and ManifestError for a link."""
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    for path in paths:
        if path.is_symlink():
            raise ManifestError(f"{path} is a link, and an engine must be complete in its own folder; copy the file")
    names = [path.relative_to(folder).as_posix() for path in paths]
    names = [name for name in names if name != MANIFEST_NAME]
    digests = _sha256([folder / name for name in names])
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, digests, strict=True)
    }


def check_sizes(folder: Path, manifest: EngineManifest) -> None:
    """Whether every file is there with its size: a few milliseconds. More files than the manifest's do not matter."""
    for name, record in sorted(manifest.files.items()):
        path = folder / name
        try:
            num_bytes = path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            raise ManifestError(f"{path} is missing; copy the engine again, or {_REBUILD}") from None
        except OSError as error:
            raise ManifestError(f"{path} cannot be read: {error.strerror}") from error
        if num_bytes != record["bytes"]:
            raise ManifestError(
                f"{path} has {num_bytes} bytes, and {MANIFEST_NAME} says {record['bytes']}: it is damaged; "
                f"copy the engine again, or {_REBUILD}"
            )


def check_files(folder: Path, manifest: EngineManifest) -> None:
    """Whether every file is what was built, to the last bit. Reads all of them."""
    check_sizes(folder, manifest)
    names = sorted(manifest.files)
    try:
        digests = _sha256([folder / name for name in names])
    except OSError as error:
        raise ManifestError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    for name, digest in zip(names, digests, strict=True):
        if digest != manifest.files[name]["sha256"]:
            raise ManifestError(
                f"{folder / name} has SHA-256 {digest[:12]}..., and {MANIFEST_NAME} says "
                f"{manifest.files[name]['sha256'][:12]}...: it is damaged; copy the engine again, or {_REBUILD}"
            )


def _sha256(paths: list[Path]) -> list[str]:
    stopped = threading.Event()

    def digest(path: Path) -> str:
        sha256, block = hashlib.sha256(), bytearray(_BLOCK_BYTES)
        with path.open("rb", buffering=0) as file:
            while not stopped.is_set() and (num_bytes := file.readinto(block)):
                sha256.update(memoryview(block)[:num_bytes])
        return sha256.hexdigest()

    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        try:
            return list(threads.map(digest, paths))
        finally:
            stopped.set()  # after Ctrl-C nobody waits for the rest of a large file


# ---- the machine -----------------------------------------------------------------------------------------------------


def check_machine(
    manifest: EngineManifest, *, gpu: tuple[str, str] | None, versions: Mapping[str, str], world_size: int
) -> None:
    """Whether this machine can run the engine. Raises ManifestError, which names both sides.

    `gpu` is product and compute capability of its GPUs; `versions` has the packages that would run the engine, by the
    names that the manifest uses; `world_size` is the number of ranks there is room for: its GPUs, or 1 on a CPU.
    """
    if manifest.engine == "tensorrt":
        _check_tensorrt(manifest, gpu, versions)
    if manifest.engine == "openvino":
        _check_openvino(manifest, versions)
    if manifest.engine == "pytorch" and gpu is None:
        raise ManifestError(
            f"the engine runs on {manifest.world_size} NVIDIA GPUs; this machine has none that nvidia-smi names; "
            "start the container with its GPUs, or rebuild with --engine openvino"
        )
    if world_size < manifest.world_size:
        raise ManifestError(
            f"the engine was built for {manifest.world_size} GPUs "
            f"(--tp {manifest.tensor_parallel} --pp {manifest.pipeline_parallel}); this machine has {world_size}; "
            "give it more GPUs, or rebuild with a smaller --tp or --pp"
        )


def _check_tensorrt(manifest: EngineManifest, gpu: tuple[str, str] | None, versions: Mapping[str, str]) -> None:
    """TensorRT's plans are for one GPU product and one version; TensorRT itself says so by a failed assertion."""
    built_for = (manifest.gpu["product"], manifest.gpu["compute_capability"]) if manifest.gpu else None
    if gpu is None or gpu != built_for:
        advice = f"rebuild with --gpu {gpu[0]}" if gpu else "serve it on that GPU, or rebuild with --engine openvino"
        raise ManifestError(
            f"the engine was built for {_gpu(built_for)} with {_package('tensorrt_llm', manifest.versions)}; "
            f"this machine has {_gpu(gpu)}; {advice}"
        )
    for package in ("tensorrt_llm", "tensorrt"):
        if versions.get(package) is None or versions[package] != manifest.versions.get(package):
            raise ManifestError(
                f"the engine was built with {_package(package, manifest.versions)}; "
                f"this machine has {_package(package, versions)}; "
                "rebuild in the container that serves, or serve in the one that built it"
            )


def _check_openvino(manifest: EngineManifest, versions: Mapping[str, str]) -> None:
    """OpenVINO reads what older releases wrote, and promises nothing for newer ones."""
    built, here = major_and_minor(manifest.versions.get("openvino")), major_and_minor(versions.get("openvino"))
    if built is None or here is None or here < built:
        advice = f"install openvino>={built[0]}.{built[1]} to serve it, or " if built else ""
        raise ManifestError(
            f"the engine was built with {_package('openvino', manifest.versions)}; "
            f"this machine has {_package('openvino', versions)}; {advice}rebuild with the release that serves"
        )


def major_and_minor(version: str | None) -> tuple[int, int] | None:
    """The first two numbers of a release; None where there are none."""
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else None


def _gpu(gpu: tuple[str, str] | None) -> str:
    return f"{gpu[0]} ({gpu[1]})" if gpu else "no GPU"


def _package(name: str, versions: Mapping[str, str]) -> str:
    title = {"tensorrt_llm": "TensorRT-LLM", "tensorrt": "TensorRT", "openvino": "OpenVINO"}[name]
    return f"{title} {versions[name].partition('-')[0]}" if name in versions else f"no {title}"
