"""The files of a checkpoint: which of them a build needs, what damaged ones look like, and how they are hashed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import CheckpointError

log = logging.getLogger("checkpoint.files")

MODELOPT_FILE = "hf_quant_config.json"  # beside config.json in what NVIDIA ModelOpt exports
QUANTIZATION_FILES = (MODELOPT_FILE, "quantize_config.json", "quant_config.json")
CONFIG_FILES = {"config.json", "generation_config.json", *QUANTIZATION_FILES}
TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json"),
}
TOKENIZER_SUFFIXES = (".model", ".tiktoken")  # SentencePiece under several names; tiktoken ranks
WEIGHTS_ENTRIES = (  # the first that is there is taken, as transformers does; never two of them
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000  # the format's own limit
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Source:
    """Whose files are looked at, for messages."""

    what: str  # "'gpt2' at commit 607a30d7"
    remedy: str  # what to do when a file is missing or damaged

    def error(self, problem: str, remedy: str | None = None) -> CheckpointError:
        return CheckpointError(f"{self.what} {problem}; {remedy or self.remedy}")


# --- which files a build needs


def head_files(names: Collection[str], source: Source) -> list[str]:
    """The small files that say what else is needed. Raises CheckpointError if it is clear that they do not suffice."""
    heads = {"config.json", MODELOPT_FILE, "tokenizer_config.json", _weights_entry(names, source)}
    return sorted(name for name in heads if name in names and name.endswith(".json"))


def needed_files(names: Collection[str], folder: Path, source: Source, *, trust_remote_code: bool) -> tuple[str, ...]:
    """What a build needs among `names`, sorted; the head files are in `folder`."""
    entry = _weights_entry(names, source)
    needed = {name for name in names if name in CONFIG_FILES | TOKENIZER_FILES or name.endswith(TOKENIZER_SUFFIXES)}
    needed |= {entry, *_shards(names, folder, entry, source)}
    _mention_code(names, folder, source, trust_remote_code=trust_remote_code)
    if trust_remote_code:
        needed |= {name for name in names if name.endswith(".py")}
    return tuple(sorted(needed))


def _weights_entry(names: Collection[str], source: Source) -> str:
    """The one file that stands for all weights: the weights themselves, or the index that names the shards."""
    entry = next((name for name in WEIGHTS_ENTRIES if name in names), None)
    gguf = next((name for name in sorted(names) if name.endswith(".gguf")), None)
    if entry is None and gguf is not None:
        raise source.error(
            f"has its weights only as GGUF ({gguf}), and engines are built from safetensors",
            "choose the repository that the GGUF files were made from",
        )
    if entry is None and "adapter_config.json" in names:
        raise source.error("is an adapter without its base model", "merge the two, and build the result")
    if "config.json" not in names:
        raise source.error("has no config.json")
    if entry is None:
        raise source.error("has no weights: neither model.safetensors nor pytorch_model.bin, nor an index of shards")
    tokenizers = {"tokenizer.json", "vocab.txt"} | {name for name in names if name.endswith(TOKENIZER_SUFFIXES)}
    if tokenizers.isdisjoint(names) and not {"vocab.json", "merges.txt"} <= set(names):
        raise source.error(
            "has no tokenizer: neither tokenizer.json nor tokenizer.model, nor vocab.json with merges.txt"
        )
    return entry


def _shards(names: Collection[str], folder: Path, entry: str, source: Source) -> list[str]:
    if not entry.endswith(".index.json"):
        return []
    weight_map = _read_object(folder / entry, source).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise source.error(f"is damaged: {entry} has no weight_map")
    shards = sorted({str(shard) for shard in weight_map.values()})
    if missing := [shard for shard in shards if shard not in names]:
        raise source.error(f"is incomplete: {entry} names {len(shards)} weight files, and {are_missing(missing)}")
    return shards


def _mention_code(names: Collection[str], folder: Path, source: Source, *, trust_remote_code: bool) -> None:
    """Many models that transformers knows by now still bring code. The compilers refuse those that need theirs."""
    for name in ("config.json", "tokenizer_config.json"):
        code = _read_object(folder / name, source).get("auto_map") if name in names else None
        if code and not trust_remote_code:
            log.info("%s brings Python code (auto_map in %s), which is not used", source.what, name)
        elif code and "--" in json.dumps(code):  # "org/other--module.Class"
            log.warning("%s: auto_map in %s takes code from another repository, which is not pinned", source.what, name)


def are_missing(names: list[str]) -> str:
    """The first name, and how many more there are."""
    return f"{names[0]} is missing" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are missing"


# --- what damaged files look like


def check_files(folder: Path, names: Collection[str], source: Source) -> None:
    """Raises CheckpointError for the first file that is visibly damaged."""
    for name in names:
        try:
            problem = damage(folder / name)
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        if problem:
            raise source.error(f"is damaged: {name} {problem}")


def damage(path: Path) -> str | None:
    """What is wrong with a file, as far as can be seen without reading the weights; None when nothing is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        return "is a Git LFS pointer instead of the file (run `git lfs pull` in its folder)"
    if path.suffix == ".json":
        return None if _is_json(path) else "is not JSON"
    if path.suffix in (".safetensors", ".bin", *TOKENIZER_SUFFIXES) and size == 0:
        return "is empty"
    if path.suffix == ".safetensors":
        return _safetensors_damage(path, size)
    if path.suffix == ".bin" and start.startswith(b"PK"):  # torch.save writes a ZIP file, whose directory comes last
        return None if zipfile.is_zipfile(path) else f"is cut off after {size} bytes"
    return None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return True


def _safetensors_damage(path: Path, size: int) -> str | None:
    """Compare the file's size with what its header promises: eight bytes of length, a JSON header, the tensors."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > MAX_SAFETENSORS_HEADER_BYTES:
            return "is not a safetensors file"
        if size < 8 + header_bytes:
            return f"is cut off after {size} bytes, within its header"
        text = file.read(header_bytes)
    try:
        tensors = {name: tensor for name, tensor in json.loads(text).items() if name != "__metadata__"}
        end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        expected = 8 + header_bytes + end
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return "is not a safetensors file"
    if size < expected:
        return f"is cut off: it has {size} of {expected} bytes"
    return None if size == expected else f"has {size} bytes where its header says {expected}"


def _read_object(path: Path, source: Source) -> dict[str, Any]:
    """A JSON object from a file that must hold one."""
    check_files(path.parent, [path.name], source)
    data = json.loads(path.read_bytes())
    if not isinstance(data, dict):
        raise source.error(f"is damaged: {path.name} is not a JSON object")
    return data


# --- hashes, and notes about files


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def human_size(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def read_note(path: Path, default: Any) -> Any:
    """What a JSON file of ours holds; `default` if it is missing, damaged or of another type."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return default
    return data if isinstance(data, type(default)) else default


def write_note(path: Path, text: str, *, temporary_in: Path | None = None) -> None:
    """Replace a small file as a whole. It only saves work later, so a read-only or full disk is no error here."""
    temporary = (temporary_in or path.parent) / f".{path.name}.{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        log.debug("%s was not written: %s", path, error.strerror)
