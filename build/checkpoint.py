"""A Hugging Face id or a local folder becomes a complete, checked checkpoint on this machine.

    resolve("gpt2")    resolve("org/name@v1.0")    resolve("./my-model")

A local folder stays where it is; its files are checked and hashed. A hub id is pinned to the commit that it means now
and downloaded by hub_download.py. checkpoint_files.py says which files matter and what damaged ones look like.
Only the top folder counts: no `original/`, `onnx/`, `additional_chat_templates/`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_files import (
    Source,
    check_files,
    damage,
    human_size,
    needed_files,
    read_note,
    sha256_of,
    write_note,
)
from errors import CheckpointError, UsageError

log = logging.getLogger("checkpoint")

DEFAULT_REVISION = "main"
HUB_ID = re.compile(r"(?:\w(?:[\w.-]*\w)?/)?(\w(?:[\w.-]{0,94}\w)?)", re.ASCII)  # the hub's own rule
# What git allows in a name, and neither an option nor an absolute path.
REVISION = re.compile(r"[^\s\x00-\x1f/~^:?*\[\\-][^\s\x00-\x1f~^:?*\[\\]*")

LONG_TO_HASH_BYTES = 1_000_000_000  # a second or more; worth a line in the log
TIME_STAMP_STEP_NS = 2_000_000_000  # of the coarsest file systems


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete, checked model folder whose content cannot change under its digest."""

    model: str  # as the user named it: hub id without revision, or the folder's resolved path
    revision: str | None  # the commit that the hub id was pinned to, 40 hex digits; None for a local folder
    path: Path  # holds `files`, and maybe others that do not matter
    digest: str  # hex SHA-256 that identifies the content of `files`; "" where a plan has no weights to look at
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
    is_plan: bool = False,
) -> Checkpoint:
    """Have the checkpoint `model` on this machine, complete, and return it.

    With `is_plan` config.json is enough: of a hub id the weights are not fetched, and a local folder may lack them, or
    have damaged ones. Its digest is "" then, because nothing of it can have been built.

    `cache_dir` is the hub cache (default: huggingface_hub's own). `digest_cache` is a folder where the SHA-256 of a
    local folder's files is kept, so that a second run hashes nothing. Raises CheckpointError, with one sentence, for
    whatever can go wrong, and UsageError when two revisions, or one for a local folder, are given.
    """
    folder = _as_folder(model)
    if folder is not None and revision is not None:
        raise UsageError(f"--revision {revision!r} is for hub ids, and {model!r} is a local folder; leave it out")
    if folder is not None:
        remedy = "copy or download the checkpoint into it again"
        if HUB_ID.fullmatch(model):
            remedy += f", or say '{model}@{DEFAULT_REVISION}' for the model on the hub"
        source = Source(f"folder {str(folder)!r}", remedy)
        try:
            return _from_folder(folder, source, trust_remote_code=trust_remote_code, digest_cache=digest_cache)
        except CheckpointError as error:
            if not is_plan or not (folder / "config.json").is_file() or damage(folder / "config.json"):
                raise
            problem, _, _ = str(error).rpartition("; ")  # its remedy is for a build
            log.info("planning from config.json alone: %s", problem)
            return Checkpoint(model=str(folder), revision=None, path=folder, digest="", files=("config.json",))

    repo_id, revision = _as_hub_id(model, revision)
    import hub_download  # imports huggingface_hub, which neither a local folder nor a help text needs

    commit, path, files = hub_download.fetch(
        repo_id,
        revision,
        token_file=token_file,
        cache_dir=cache_dir,
        offline=offline,
        trust_remote_code=trust_remote_code,
        is_plan=is_plan,
    )
    # A commit fixes every byte, so the names of its files are enough; and a renamed repository keeps its digest.
    digest = _digest("commit", [commit, files])
    return Checkpoint(model=repo_id, revision=commit, path=path, digest=digest, files=files)


def _digest(kind: str, content: Any) -> str:
    return hashlib.sha256(json.dumps([kind, content]).encode()).hexdigest()


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


# --- a local folder


def _from_folder(folder: Path, source: Source, *, trust_remote_code: bool, digest_cache: Path | None) -> Checkpoint:
    try:
        names = {entry.name for entry in os.scandir(folder) if entry.is_file()}
    except OSError as error:
        raise CheckpointError(f"{source.what} cannot be read: {error.strerror}") from error
    if next(folder.glob(".cache/huggingface/download/*.incomplete"), None) is not None:
        log.warning("%s holds the remains of an unfinished `hf download`", source.what)
    files = needed_files(names, folder, source, trust_remote_code=trust_remote_code)
    check_files(folder, files, source)
    digest = _digest("files", _file_digests(folder, files, digest_cache, source))
    return Checkpoint(model=str(folder), revision=None, path=folder, digest=digest, files=files)


def _file_digests(
    folder: Path, files: Collection[str], digest_cache: Path | None, source: Source
) -> list[tuple[str, str]]:
    """(name, SHA-256) of each file; from the cache where path, size, modification time and inode are the same."""
    note = digest_cache / "file-digests.json" if digest_cache is not None else None
    known: dict[str, list[Any]] = read_note(note, {}) if note is not None else {}
    paths = {name: (folder / name).resolve() for name in files}
    started_ns = time.time_ns()
    try:
        before = {path: _identity(path) for path in paths.values()}
        to_hash = [path for path, identity in before.items() if known.get(str(path), [])[:3] != identity]
        if (num_bytes := sum(before[path][0] for path in to_hash)) >= LONG_TO_HASH_BYTES:
            log.info("hashing %s of %s", human_size(num_bytes), source.what)
        with ThreadPoolExecutor(max_workers=4) as pool:
            fresh = dict(zip(to_hash, pool.map(sha256_of, to_hash), strict=True))
        changed = [path.name for path in to_hash if _identity(path) != before[path]]
    except OSError as error:
        raise CheckpointError(f"{source.what} cannot be read: {error.filename}: {error.strerror}") from error
    if changed:
        raise source.error(f"changes while it is read ({changed[0]})", "wait until it is written")
    if note is not None and fresh:
        # A file as young as its time stamp is coarse could change again and keep it, so it is not remembered.
        old = [path for path in fresh if started_ns - before[path][1] > TIME_STAMP_STEP_NS]
        write_note(note, json.dumps(known | {str(path): [*before[path], fresh[path]] for path in old}))
    return [(name, fresh[path] if path in fresh else known[str(path)][3]) for name, path in paths.items()]


def _identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]
