"""Hugging Face id or local folder -> pinned local checkpoint.

    resolve("gpt2")    resolve("org/name@v1.0")    resolve("./my-model")

A hub id becomes a folder in four steps: one request turns the revision into a commit and lists its files; the few
files that say what else is needed are fetched; then the rest; then everything is checked. All files come from that
one commit, whatever happens to the branch meanwhile. The folder is a snapshot in huggingface_hub's own cache, so
what transformers or `hf download` fetched is used again. Two small things of ours lie in the repository's cache
folder, beside `blobs` and `snapshots`:

    .listing/COMMIT.json   the commit's files with sizes and hashes: how --offline knows whether the cache is complete
    .unverified/ETAG       an empty file per download whose hash is still to be checked, so a kill cannot skip the check

What is not covered:
- A killed download goes on where it stopped when files come by plain HTTP with huggingface_hub below 1.0. A Xet
  transfer starts the file again that it was in (set HF_HUB_DISABLE_XET=1 on a poor line), and so do newer clients.
- What transformers or others put into the cache is checked for size and structure, not hashed again.
- Offline without a listing of ours, the files that are there are taken for all there are.
- Only the repository's top folder is looked at: no `original/`, `onnx/`, `additional_chat_templates/`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import queue
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from errors import CheckpointError, UsageError

# huggingface_hub is imported inside functions: this module is also imported to print a help text.

log = logging.getLogger(__name__)

RETRY_WAITS_SECONDS: tuple[float, ...] = (1, 2, 4)  # between tries; starts again whenever bytes have arrived
PROGRESS_SECONDS = 10.0  # never more often than this, and then only for another 10 % ...
PROGRESS_QUIET_SECONDS = 60.0  # ... or after this long without a line
PARALLEL_DOWNLOADS = 8  # as many as huggingface_hub's snapshot_download takes

DEFAULT_REVISION = "main"
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"(?:\w(?:[\w.-]*\w)?/)?(\w(?:[\w.-]{0,94}\w)?)", re.ASCII)  # the hub's own rule
# What git allows in a name, and neither an option nor an absolute path.
REVISION = re.compile(r"[^\s\x00-\x1f/~^:?*\[\\-][^\s\x00-\x1f~^:?*\[\\]*")

CONFIG_FILES = {
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
}
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
WEIGHT_SUFFIXES = (".safetensors", ".bin")
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000  # the format's own limit
LONG_TO_HASH_BYTES = 1_000_000_000  # a second or more; worth a line in the log
TIME_STAMP_STEP_NS = 2_000_000_000  # of the coarsest file systems
LFS_POINTER = b"version https://git-lfs"

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete, checked model folder whose content cannot change under its digest."""

    model: str  # as the user named it: hub id without revision, or the folder's resolved path
    revision: str | None  # the commit that the hub id was pinned to, 40 hex digits; None for a local folder
    path: Path  # holds `files`, and maybe others that do not matter
    digest: str  # hex SHA-256 that identifies the content of `files`
    files: tuple[str, ...] = ()  # names in `path` of config, tokenizer and weights, and code if trusted; sorted

    @property
    def name(self) -> str:
        """The last part of the id or path: a default for the served name."""
        return self.model.rpartition("/")[2]


def resolve(
    model: str,
    *,
    revision: str | None = None,
    token_file: Path | None = None,
    cache_dir: Path | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    digest_cache: Path | None = None,
) -> Checkpoint:
    """Have the checkpoint `model` on this machine, complete, and return it.

    `cache_dir` is the hub cache (default: huggingface_hub's own). `digest_cache` is a folder where the SHA-256 of a
    local folder's files is kept, so that a second run hashes nothing. Raises CheckpointError, with one sentence, for
    whatever can go wrong, and UsageError when two revisions, or one for a local folder, are given.
    """
    folder = _as_folder(model)
    if folder is not None:
        if revision is not None:
            raise UsageError(f"--revision {revision!r} is for hub ids, and {model!r} is a local folder; leave it out")
        remedy = "copy or download the checkpoint into it again"
        if HUB_ID.fullmatch(model):
            remedy += f", or say '{model}@{DEFAULT_REVISION}' for the model on the hub"
        place = _Place(f"folder {str(folder)!r}", remedy)
        return _from_folder(folder, place, trust_remote_code=trust_remote_code, digest_cache=digest_cache)

    from huggingface_hub import constants

    repo_id, revision = _as_hub_id(model, revision)
    offline = offline or constants.HF_HUB_OFFLINE
    token, token_origin = (None, "") if offline else _read_token(token_file)
    repository = _Repository(
        id=repo_id,
        revision=revision,
        cache=Path(cache_dir or constants.HF_HUB_CACHE).expanduser().absolute(),
        endpoint=constants.ENDPOINT,
        token=token,
        token_origin=token_origin,
    )
    try:
        with _quiet_client():
            return _from_hub(repository, offline=offline, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise _explain(error, repository, repr(repo_id), 0) from error


# --- what the user typed


def _as_folder(model: str) -> Path | None:
    """The local folder that `model` names, or None when it must be a hub id."""
    path = os.path.expanduser(model)
    if os.path.isdir(path):
        return Path(path).resolve()
    if os.path.isfile(path):
        raise CheckpointError(
            f"{model!r} is a file; --model takes a Hugging Face id or a folder with config.json, tokenizer and weights"
        )
    if model.startswith(("/", "./", "../", "~")):
        raise CheckpointError(f"folder {model!r} does not exist; --model takes a Hugging Face id or an existing folder")
    return None


def _as_hub_id(model: str, revision: str | None) -> tuple[str, str]:
    """("org/name", "v1") from "org/name@v1", or from "org/name" and `revision`, or with the default revision."""
    repo_id, at, revision_in_model = model.partition("@")
    match = HUB_ID.fullmatch(repo_id)
    if match is None or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git") or len(match[1]) > 96:
        raise CheckpointError(
            f"{repo_id!r} is neither a folder here nor a Hugging Face id; an id is 'name' or 'org/name', of letters, "
            "digits, '.', '_' and '-', with at most 96 characters in its name"
        )
    if at and revision is not None and revision != revision_in_model:
        raise UsageError(f"--model {model!r} and --revision {revision!r} name two revisions; give one")
    wanted = revision_in_model if at else revision if revision is not None else DEFAULT_REVISION
    if not REVISION.fullmatch(wanted) or ".." in wanted or wanted.endswith("/"):
        raise CheckpointError(f"{wanted!r} is not a revision of {repo_id!r}; it must be a branch, a tag or a commit")
    return repo_id, wanted


def _read_token(token_file: Path | None) -> tuple[str | None, str]:
    """The token to send, and where it came from, for messages; the token itself is never in a message."""
    if token_file is not None:
        return _token_from(Path(token_file), f"--token-file {str(token_file)!r}")
    given = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    if not given and os.environ.get("HF_TOKEN_PATH"):
        path = os.environ["HF_TOKEN_PATH"]
        return _token_from(Path(path).expanduser(), f"HF_TOKEN_PATH {path!r}")

    from huggingface_hub import constants, get_token

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return None, ""
    origin = "HF_TOKEN" if given else "the stored login"
    try:
        token = get_token()  # of HF_TOKEN or `hf auth login`
    except (OSError, ValueError):
        log.warning("the stored login cannot be read and is not used; going on without a token")
        return None, ""
    return (_one_word(token, origin), origin) if token else (None, "")


def _token_from(path: Path, origin: str) -> tuple[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"the token file of {origin} cannot be read: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"the token file of {origin} is not text; it must hold one token") from None
    if not text.strip():
        raise CheckpointError(f"the token file of {origin} is empty; it must hold one token")
    return _one_word(text, origin), origin


def _one_word(token: str, origin: str) -> str:
    """Refuse what cannot be a header: the HTTP library would, and would quote the token in its message."""
    token = token.strip()
    if not re.fullmatch(r"[!-~]+", token):
        raise CheckpointError(f"{origin} holds more than a token; it must be one word of printable ASCII characters")
    return token


# --- which files matter, and what is wrong with them


@dataclass(frozen=True)
class _Place:
    """Whose files are looked at, for messages."""

    what: str  # "'gpt2' at commit 607a30d7"
    remedy: str  # what to do when a file is missing or damaged


def _weights_entry(names: Collection[str], place: _Place) -> str:
    """The one file that stands for all weights: the weights themselves, or the index that names the shards.

    Also sees to it that there is a config and a tokenizer, from the names alone.
    """
    entry = next((name for name in WEIGHTS_ENTRIES if name in names), None)
    gguf = next((name for name in sorted(names) if name.endswith(".gguf")), None)
    if entry is None and gguf is not None:
        raise CheckpointError(
            f"{place.what} has its weights only as GGUF ({gguf}), and engines are built from safetensors; "
            "choose the repository that the GGUF files were made from"
        )
    if entry is None and "adapter_config.json" in names:
        raise CheckpointError(f"{place.what} is an adapter without its base model; merge the two, and build the result")
    if "config.json" not in names:
        raise CheckpointError(f"{place.what} has no config.json; {place.remedy}")
    if entry is None:
        raise CheckpointError(
            f"{place.what} has no weights: neither model.safetensors nor pytorch_model.bin, nor an index of shards; "
            f"{place.remedy}"
        )
    has_tokenizer = any(
        name in ("tokenizer.json", "vocab.txt") or name.endswith(TOKENIZER_SUFFIXES) for name in names
    ) or {"vocab.json", "merges.txt"} <= set(names)
    if not has_tokenizer:
        raise CheckpointError(
            f"{place.what} has no tokenizer: neither tokenizer.json nor tokenizer.model, nor vocab.json with "
            f"merges.txt; {place.remedy}"
        )
    return entry


def _needed(
    names: Collection[str], folder: Path, entry: str, place: _Place, *, trust_remote_code: bool
) -> tuple[str, ...]:
    """The files that matter among `names`. Reads the configs, and the index if `entry` is one, from `folder`."""
    for name in ("config.json", "tokenizer_config.json"):
        code = _read_object(folder / name, place).get("auto_map") if name in names else None
        if code and not trust_remote_code:
            raise CheckpointError(
                f"{place.what} brings its own Python code (auto_map in {name}); read that code and pass "
                "--trust-remote-code, or choose a model without"
            )
        if code and "--" in json.dumps(code):  # "org/other--module.Class"
            log.warning("%s: auto_map in %s takes code from another repository, which is not pinned", place.what, name)
    needed = {name for name in names if name in CONFIG_FILES | TOKENIZER_FILES or name.endswith(TOKENIZER_SUFFIXES)}
    if trust_remote_code:
        needed |= {name for name in names if name.endswith(".py")}
    return tuple(sorted(needed | {entry} | set(_shards(names, folder, entry, place))))


def _shards(names: Collection[str], folder: Path, entry: str, place: _Place) -> list[str]:
    if not entry.endswith(".index.json"):
        return []
    weight_map = _read_object(folder / entry, place).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{place.what} is damaged: {entry} has no weight_map; {place.remedy}")
    shards = sorted({str(shard) for shard in weight_map.values()})
    missing = [shard for shard in shards if shard not in names]
    if missing:
        raise CheckpointError(
            f"{place.what} is incomplete: {entry} names {len(shards)} weight files, and {_some(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; {place.remedy}"
        )
    return shards


def _inspect(folder: Path, names: Collection[str], place: _Place) -> None:
    """Raise for the first file that is visibly damaged."""
    for name in names:
        try:
            damage = _damage(folder / name)
        except OSError as error:
            damage = f"cannot be read ({error.strerror})"
        if damage:
            raise CheckpointError(f"{place.what} is damaged: {name} {damage}; {place.remedy}")


def _damage(path: Path) -> str | None:
    """What is wrong with a file, as far as can be seen without reading the weights; None when nothing is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        return "is a Git LFS pointer instead of the file (run `git lfs pull` in its folder)"
    if path.suffix == ".json":
        return _json_damage(path)
    if path.suffix in (*WEIGHT_SUFFIXES, *TOKENIZER_SUFFIXES) and size == 0:
        return "is empty"
    if path.suffix == ".safetensors":
        return _safetensors_damage(path, size)
    if path.suffix == ".bin" and start.startswith(b"PK"):  # torch.save writes a ZIP file, whose directory comes last
        import zipfile

        return None if zipfile.is_zipfile(path) else f"is cut off after {size} bytes"
    return None


def _json_damage(path: Path) -> str | None:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return "is not JSON"
    return None


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


def _read_object(path: Path, place: _Place) -> dict[str, Any]:
    """A JSON object from a file that must hold one."""
    _inspect(path.parent, [path.name], place)
    data = json.loads(path.read_bytes())
    if not isinstance(data, dict):
        raise CheckpointError(f"{place.what} is damaged: {path.name} is not a JSON object; {place.remedy}")
    return data


# --- a local folder


def _from_folder(folder: Path, place: _Place, *, trust_remote_code: bool, digest_cache: Path | None) -> Checkpoint:
    try:
        names = {entry.name for entry in os.scandir(folder) if entry.is_file()}
    except OSError as error:
        raise CheckpointError(f"{place.what} cannot be read: {error.strerror}") from error
    if next(folder.glob(".cache/huggingface/download/*.incomplete"), None) is not None:
        log.warning("%s holds the remains of an unfinished `hf download`", place.what)
    entry = _weights_entry(names, place)
    files = _needed(names, folder, entry, place, trust_remote_code=trust_remote_code)
    _inspect(folder, files, place)
    digests = _file_digests(folder, files, digest_cache, place)
    return Checkpoint(model=str(folder), revision=None, path=folder, digest=_digest("files", digests), files=files)


def _digest(kind: str, content: Any) -> str:
    return hashlib.sha256(json.dumps([kind, content]).encode()).hexdigest()


def _file_digests(
    folder: Path, files: Collection[str], digest_cache: Path | None, place: _Place
) -> list[tuple[str, str]]:
    """(name, SHA-256) of each file; from the cache where path, size, modification time and inode are the same."""
    known_path = digest_cache / "file-digests.json" if digest_cache is not None else None
    known = _load_json(known_path, {}) if known_path is not None else {}
    paths = {name: (folder / name).resolve() for name in files}
    now_ns = time.time_ns()

    def identity(path: Path) -> list[int]:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns, status.st_ino]

    def file_digest(path: Path) -> str:
        digest = _sha256(path)
        if identity(path) != identities[path]:
            raise CheckpointError(f"{place.what} changes while it is read ({path.name}); wait until it is written")
        return digest

    try:
        identities = {path: identity(path) for path in paths.values()}
        to_hash = [path for path in paths.values() if known.get(str(path), [])[:3] != identities[path]]
        if (num_bytes := sum(identities[path][0] for path in to_hash)) >= LONG_TO_HASH_BYTES:
            log.info("hashing %s of %s", _human(num_bytes), place.what)
        with ThreadPoolExecutor(max_workers=4) as pool:
            fresh = dict(zip(to_hash, pool.map(file_digest, to_hash), strict=True))
    except OSError as error:
        raise CheckpointError(f"{place.what} cannot be read: {error.filename}: {error.strerror}") from error
    if known_path is not None and fresh:
        # A file as young as its time stamp is coarse could change again and keep it, so it is not remembered.
        old = {path: digest for path, digest in fresh.items() if now_ns - identities[path][1] > TIME_STAMP_STEP_NS}
        rows = {str(path): [*identities[path], digest] for path, digest in old.items()}
        _write(known_path, json.dumps(_load_json(known_path, {}) | rows))
    return [(name, fresh[path] if path in fresh else known[str(path)][3]) for name, path in paths.items()]


# --- a hub id


@dataclass(frozen=True, kw_only=True)
class _Repository:
    """A repository on the hub, its place in the cache, and how to ask for it."""

    id: str
    revision: str
    cache: Path
    endpoint: str
    token: str | None = field(repr=False)
    token_origin: str

    @property
    def folder(self) -> Path:
        return self.cache / f"models--{self.id.replace('/', '--')}"

    @property
    def page(self) -> str:
        return f"{self.endpoint}/{self.id}"

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit


@dataclass(frozen=True)
class _File:
    """One file of a commit. What is None, the hub (or the mirror in its place) did not say."""

    name: str
    size: int | None = None  # bytes
    sha256: str | None = None  # of the content; only for files in LFS or Xet, which all weights are
    blob: str | None = None  # git's id of the content

    @property
    def etag(self) -> str | None:
        """The file's name among the cache's blobs."""
        return self.sha256 or self.blob

    def is_in(self, folder: Path) -> bool:
        try:
            size = (folder / self.name).stat().st_size
        except OSError:
            return False
        return self.size is None or self.size == size


def _from_hub(repository: _Repository, *, offline: bool, trust_remote_code: bool) -> Checkpoint:
    commit, listing = _list_files(repository, offline=offline)
    if offline:
        place = _Place(
            f"the cached {repository.id!r} (commit {commit[:8]})", "run once without --offline to complete it"
        )
    else:
        place = _Place(f"{repository.id!r} at commit {commit[:8]}", "choose another revision or model")
    snapshot = repository.snapshot(commit)
    entry = _weights_entry(listing, place)
    heads = {"config.json", "tokenizer_config.json"} | ({entry} if entry.endswith(".json") else set())
    _fetch(
        repository, commit, [listing[name] for name in sorted(heads) if name in listing], offline=offline, quiet=True
    )
    files = _needed(listing, snapshot, entry, place, trust_remote_code=trust_remote_code)
    _fetch(repository, commit, [listing[name] for name in files], offline=offline)
    _inspect(snapshot, files, place)
    if repository.revision != commit and not offline:
        _remember(repository, commit)  # only now: --offline must not find half of it
    # A commit fixes every byte, so the names of its files are enough; and a renamed repository keeps its digest.
    digest = _digest("commit", [commit, files])
    return Checkpoint(model=repository.id, revision=commit, path=snapshot, digest=digest, files=files)


def _list_files(repository: _Repository, *, offline: bool) -> tuple[str, dict[str, _File]]:
    """The commit behind the revision, and its top-level files by name."""
    commit = repository.revision if COMMIT.fullmatch(repository.revision) else None
    if commit is None and offline:
        commit = _cached_commit(repository)
    stored = _load_json(repository.folder / ".listing" / f"{commit}.json", []) if commit else []
    if commit and stored:
        return commit, {row[0]: _File(*row) for row in stored}
    if offline:
        snapshot = repository.snapshot(commit) if commit else None
        if commit is None or snapshot is None or not snapshot.is_dir():
            raise CheckpointError(
                f"{repository.id!r} at {repository.revision!r} is not in the cache {str(repository.cache)!r}; "
                "run once without --offline, or give a local folder"
            )
        return commit, {path.name: _File(path.name) for path in snapshot.iterdir() if path.is_file()}

    info = _ask_hub(repository)
    files = {
        sibling.rfilename: _File(
            sibling.rfilename,
            sibling.lfs.size if sibling.lfs else sibling.size,
            sibling.lfs.sha256 if sibling.lfs else None,
            sibling.blob_id,
        )
        for sibling in info.siblings or []
        if "/" not in sibling.rfilename
    }
    rows = [[file.name, file.size, file.sha256, file.blob] for file in files.values()]
    _write(repository.folder / ".listing" / f"{info.sha}.json", json.dumps(rows))
    return info.sha, files


def _remember(repository: _Repository, commit: str) -> None:
    """Write the reference as huggingface_hub does, but not by way of a file in `refs`, which it would take for one."""
    _write(repository.folder / "refs" / repository.revision, commit, temporary_in=repository.folder / ".listing")


def _cached_commit(repository: _Repository) -> str | None:
    try:
        commit = (repository.folder / "refs" / repository.revision).read_text().strip()
    except (OSError, ValueError):
        return None
    return commit if COMMIT.fullmatch(commit) else None


def _ask_hub(repository: _Repository) -> Any:
    """huggingface_hub's ModelInfo of the revision."""
    from huggingface_hub import HfApi, constants

    api = HfApi(token=repository.token or False, library_name="triton-trtllm")
    try:
        info = _retry(
            lambda: api.model_info(
                repository.id,
                revision=repository.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            ),
            repository,
        )
        if not COMMIT.fullmatch(info.sha or ""):
            raise KeyError("sha")
    except Exception as error:  # whatever a client of others raises is a failed request to the user
        raise _explain(error, repository, f"{repository.id!r}", 0) from error
    if info.id != repository.id:
        log.info("%r is called %r on the hub now", repository.id, info.id)
    return info


def _fetch(repository: _Repository, commit: str, files: list[_File], *, offline: bool, quiet: bool = False) -> None:
    """Have these files in the snapshot folder, each with the size and the hash that the hub lists."""
    snapshot = repository.snapshot(commit)
    missing = [file for file in files if not file.is_in(snapshot)]
    if missing and offline:
        raise CheckpointError(
            f"the cached {repository.id!r} (commit {commit[:8]}) is incomplete: "
            f"{_some([file.name for file in missing])} {'is' if len(missing) == 1 else 'are'} missing; "
            "run once without --offline to complete it"
        )
    for file in files:
        if file not in missing and _marker(repository, file).exists():
            _verify(repository, snapshot, file)
    bytes_to_come = _bytes_to_come(repository, snapshot, missing)
    if bytes_to_come > 0 and bytes_to_come > _free_bytes(repository.cache):
        raise _disk_full(repository, bytes_to_come)
    for file in missing:
        # Asked anew: another build may have got the file since `missing` was made.
        if (snapshot / file.name).exists() and not file.is_in(snapshot):
            log.warning("%s in the cache has the wrong size; fetching it again", file.name)
            _discard(snapshot / file.name)
        _marker(repository, file).parent.mkdir(parents=True, exist_ok=True)
        _marker(repository, file).touch()
    if missing:
        _download(repository, commit, missing, quiet=quiet)


def _download(repository: _Repository, commit: str, files: list[_File], *, quiet: bool) -> None:
    """Fetch and verify files in parallel, large ones first.

    The threads are daemons: neither an error in one of them nor Ctrl-C waits until the others have their gigabytes.
    """
    snapshot = repository.snapshot(commit)
    todo: queue.SimpleQueue[_File] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[_File, Exception | None]] = queue.SimpleQueue()
    stopped = threading.Event()
    for file in sorted(files, key=lambda file: -(file.size or 0)):
        todo.put(file)

    def work() -> None:
        while not stopped.is_set():
            try:
                file = todo.get_nowait()
            except queue.Empty:
                return
            try:
                _download_one(repository, commit, file)
                _verify(repository, snapshot, file)
                done.put((file, None))
            except Exception as error:  # handed to the thread that waits
                done.put((file, error))

    progress = _Progress(repository, commit, files, quiet=quiet)
    for _ in range(min(PARALLEL_DOWNLOADS, len(files))):
        threading.Thread(target=work, daemon=True, name="fetch").start()
    try:
        for _ in files:
            file, error = progress.wait_for(done)
            if isinstance(error, CheckpointError):
                raise error
            if error is not None:
                to_come = _bytes_to_come(repository, snapshot, files)
                raise _explain(error, repository, f"{file.name} of {repository.id!r}", to_come) from error
    finally:
        stopped.set()
    progress.finish()


def _download_one(repository: _Repository, commit: str, file: _File) -> None:
    from huggingface_hub import hf_hub_download

    partial = _partial(repository, file)
    if file.size is not None and _size_of(partial) > file.size:
        partial.unlink(missing_ok=True)  # two writers without working locks; a request to go on from there fails

    _retry(
        lambda: hf_hub_download(
            repository.id,
            file.name,
            revision=commit,
            cache_dir=repository.cache,
            token=repository.token or False,
            library_name="triton-trtllm",
        ),
        repository,
        partial,
    )


def _retry(call: Callable[[], Result], repository: _Repository, partial: Path | None = None) -> Result:
    """`call()`, again after errors that may pass: huggingface_hub retries neither the listing nor a broken body."""
    waits = iter(RETRY_WAITS_SECONDS)
    while True:
        bytes_before = _size_of(partial)
        try:
            return call()
        except Exception as error:
            if _size_of(partial) > bytes_before:
                waits = iter(RETRY_WAITS_SECONDS)
            wait = next(waits, None)
            if wait is None or not _may_pass(error):
                raise
            log.warning("%s: %s; trying again in %g s", repository.endpoint, _reason(error), wait)
            time.sleep(wait)


def _verify(repository: _Repository, snapshot: Path, file: _File) -> None:
    """Check a downloaded file against the hub's size and hash, once; a file that fails is removed."""
    path = snapshot / file.name
    if not file.is_in(snapshot) or _hash_differs(path, file):
        _discard(path)
        raise CheckpointError(
            f"{file.name} of {repository.id!r} arrived damaged: it is not what {repository.endpoint} lists; "
            "it was removed, run again to fetch it anew"
        )
    _marker(repository, file).unlink(missing_ok=True)


def _hash_differs(path: Path, file: _File) -> bool:
    if file.sha256:
        return _sha256(path) != file.sha256
    if file.blob:  # git's id of a file: SHA-1 over a header and the content
        content = path.read_bytes()
        header = b"blob %d\0" % len(content)
        return hashlib.sha1(header + content, usedforsecurity=False).hexdigest() != file.blob
    return False


def _discard(path: Path) -> None:
    """Remove a file of a snapshot together with the blob it points to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _marker(repository: _Repository, file: _File) -> Path:
    return repository.folder / ".unverified" / (file.etag or file.name)


def _partial(repository: _Repository, file: _File) -> Path:
    """Where huggingface_hub keeps what has arrived of a file."""
    return repository.folder / "blobs" / f"{file.etag}.incomplete"


def _bytes_to_come(repository: _Repository, snapshot: Path, files: list[_File]) -> int:
    return sum(
        max(0, (file.size or 0) - _size_of(_partial(repository, file))) for file in files if not file.is_in(snapshot)
    )


# --- what the user sees while it runs


class _Progress:
    """Sparse log lines where no progress bar is shown: one at the start, few between, one at the end."""

    def __init__(self, repository: _Repository, commit: str, files: list[_File], *, quiet: bool) -> None:
        self.repository = repository
        self.files = files
        self.snapshot = repository.snapshot(commit)
        self.log_level = logging.DEBUG if quiet else logging.INFO
        self.total_bytes = sum(file.size or 0 for file in files)
        self.started = self.last_line = time.monotonic()
        self.last_percent = self.percent()
        there = f" ({self.last_percent} % is there)" if self.last_percent else ""
        log.log(self.log_level, "fetching %s, of %r at commit %s%s", self.what(), repository.id, commit[:8], there)

    def what(self) -> str:
        return f"{len(self.files)} file{'s' if len(self.files) > 1 else ''}, {_human(self.total_bytes)}"

    def percent(self) -> int:
        to_come = _bytes_to_come(self.repository, self.snapshot, self.files)
        return 100 - 100 * to_come // self.total_bytes if self.total_bytes else 0

    def wait_for(self, done: queue.SimpleQueue[tuple[_File, Exception | None]]) -> tuple[_File, Exception | None]:
        while True:
            try:
                return done.get(timeout=PROGRESS_SECONDS)
            except queue.Empty:
                pass
            finally:
                self.report()

    def report(self) -> None:
        silent_seconds = time.monotonic() - self.last_line
        if silent_seconds < PROGRESS_SECONDS or sys.stderr.isatty():
            return
        percent = self.percent()
        if percent >= self.last_percent + 10 or silent_seconds >= PROGRESS_QUIET_SECONDS:
            log.log(self.log_level, "fetched %d %% of %s", percent, _human(self.total_bytes))
            self.last_line, self.last_percent = time.monotonic(), percent

    def finish(self) -> None:
        log.log(self.log_level, "fetched %s, in %.0f s", self.what(), time.monotonic() - self.started)


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Keep huggingface_hub's warnings for those who asked for its log: they repeat ours, and quote signed addresses.

    Its progress bars need nothing: they draw themselves on a terminal only.
    """
    from huggingface_hub import constants

    client_log = logging.getLogger("huggingface_hub")
    level = client_log.level
    if not constants.HF_DEBUG and "HF_HUB_VERBOSITY" not in os.environ:
        client_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"huggingface_hub\.")
            yield
    finally:
        client_log.setLevel(level)


# --- sentences for what goes wrong


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if _is_a(error, "SSLError", "ProxyError"):
        return False
    if _is_a(error, "ConnectionError", "Timeout", "ChunkedEncodingError", "TransportError", "TimeoutError"):
        return True
    response = getattr(error, "response", None)
    if response is None:
        return False
    return response.status_code >= 500 or (response.status_code == 403 and not _is_from_hub(response))


def _is_a(error: BaseException, *names: str) -> bool:
    """By name: below 1.0 huggingface_hub raises the errors of requests, from 1.0 on those of httpx."""
    return any(error_type.__name__ in names for error_type in type(error).__mro__)


def _is_from_hub(response: Any) -> bool:
    """Whether the hub itself answered, and not the store that it redirects to, whose signed addresses expire."""
    path = urlsplit(str(response.url)).path
    return path.startswith("/api/") or "/resolve/" in path


def _reason(error: BaseException) -> str:
    """A few words for a failed request; the HTTP library's own text is a nest of class names."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code}"
    text = f"{type(error).__name__} {error}"
    for sign, words in (
        ("NameResolutionError", "its name cannot be resolved"),
        ("ProxyError", "the proxy does not let it through"),
        ("SSL", "no TLS connection, or a certificate that is not trusted"),
        ("refused", "connection refused"),
        ("unreachable", "network unreachable"),
        ("timed out", "no answer in time"),
        ("Timeout", "no answer in time"),
        ("IncompleteRead", "connection lost"),
        ("Connection broken", "connection lost"),
        ("Connection aborted", "connection lost"),
        ("reset by peer", "connection lost"),
    ):
        if sign in text:
            return words
    return type(error).__name__


def _explain(error: BaseException, repository: _Repository, what: str, bytes_to_come: int) -> CheckpointError:
    """One sentence for whatever huggingface_hub or the file system raised while `what` was fetched."""
    from huggingface_hub import errors as hub

    while isinstance(error, hub.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # "cannot find the file in the cache" stands before the reason
    response = getattr(error, "response", None)
    status = response.status_code if response is not None else None
    said = response.headers.get("X-Error-Message", "") if response is not None else ""
    token = f"the token of {repository.token_origin}"
    elsewhere = "use --offline if the cache holds the model, or give a local folder"
    pass_token = "pass a token with --token-file or HF_TOKEN"
    endpoint, page, repo_id = repository.endpoint, repository.page, repository.id

    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in str(error):
        return _disk_full(repository, bytes_to_come)
    if isinstance(error, OSError) and error.errno is not None:
        return CheckpointError(
            f"the cache {str(repository.cache)!r} cannot be used: {error.strerror}; choose another with HF_HOME"
        )
    if isinstance(error, hub.GatedRepoError) and repository.token:
        return CheckpointError(
            f"{repo_id!r} is gated, and {token} has no access; accept its licence at {page} with that token's account, "
            "and let the token read gated repositories"
        )
    if isinstance(error, hub.GatedRepoError):
        return CheckpointError(f"{repo_id!r} is gated; accept its licence at {page}, then {pass_token}")
    if isinstance(error, hub.RevisionNotFoundError):
        return CheckpointError(
            f"{repo_id!r} has no revision {repository.revision!r}; it must be a branch, a tag or a commit, see "
            f"{page}/commits"
        )
    if isinstance(error, hub.EntryNotFoundError) and status is not None:
        return CheckpointError(f"{endpoint} lists {what} but does not have it; choose another revision")
    if status is not None and status < 500 and not _is_from_hub(response):
        host = urlsplit(str(response.url)).netloc if response is not None else ""
        return CheckpointError(f"{what} could not be fetched: {host} answers HTTP {status}; run again, or {elsewhere}")
    if status == 401 and "credentials" in said:
        return CheckpointError(f"{endpoint} does not know {token}; it is mistyped, expired or revoked, make a new one")
    if status in (401, 404) or isinstance(error, hub.RepositoryNotFoundError):
        return CheckpointError(
            f"{repo_id!r} is not a folder here, and on {endpoint} it does not exist or is private; check the name, or "
            + (f"let {token} read it" if repository.token else pass_token)
        )
    if status == 403:
        quoted = f" ({' '.join(said.split())[:200]})" if said else ""
        return CheckpointError(
            f"{endpoint} does not give out {what}{quoted}; see {page}"
            + (f" and the rights of {token}" if repository.token else f", or {pass_token}")
        )
    if status == 429:
        return CheckpointError(
            f"{endpoint} limits requests from here (HTTP 429); wait some minutes"
            + ("" if repository.token else f", or {pass_token}")
        )
    if status is not None and status >= 500:
        return CheckpointError(f"{endpoint} is in trouble (HTTP {status}, several tries); try later, {elsewhere}")
    if _is_a(error, "MissingSchema", "InvalidSchema", "InvalidURL", "UnsupportedProtocol"):
        return CheckpointError(f"HF_ENDPOINT {endpoint!r} is not an address; it must look like https://host")
    if _is_a(error, "JSONDecodeError", "KeyError", "TypeError", "FileMetadataError"):
        return CheckpointError(
            f"{endpoint} does not answer as a Hugging Face hub does; check HF_ENDPOINT, and whether a proxy or login "
            f"page stands between, or {elsewhere}"
        )
    if status is None and _is_a(error, "RequestException", "TransportError", "ConnectionError", "TimeoutError"):
        return CheckpointError(
            f"{endpoint} cannot be reached for {what}: {_reason(error)}"
            f"{', also after several tries' if _may_pass(error) else ''}; check network and proxy, {elsewhere}"
        )
    said = re.sub(r"\?\S+", "", " ".join(str(error).split()))[:200]  # no signatures of download addresses
    return CheckpointError(f"{what} could not be fetched ({said or type(error).__name__}); run again, or {elsewhere}")


def _disk_full(repository: _Repository, bytes_to_come: int) -> CheckpointError:
    return CheckpointError(
        f"the disk of {str(repository.cache)!r} is too full for {repository.id!r}: {_human(bytes_to_come)} are to come "
        f"and {_human(_free_bytes(repository.cache))} are free; make room, or set HF_HOME to a folder on a larger disk"
    )


# --- small things


def _some(names: list[str]) -> str:
    """The first name, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _human(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _size_of(path: Path | None) -> int:
    try:
        return path.stat().st_size if path is not None else 0
    except OSError:
        return 0


def _free_bytes(folder: Path) -> int:
    """What is free on the disk that `folder` is, or will be, on."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(existing).free


def _load_json(path: Path, default: Any) -> Any:
    """What a file of ours holds; `default` if it is missing, damaged or of another type."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return default
    return data if isinstance(data, type(default)) else default


def _write(path: Path, text: str, *, temporary_in: Path | None = None) -> None:
    """Replace a small file as a whole. It only saves work later, so a read-only or full disk is no error here."""
    temporary = (temporary_in or path.parent) / f".{path.name}.{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        log.debug("%s was not written: %s", path, error.strerror)
