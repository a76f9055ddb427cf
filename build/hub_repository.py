"""A repository on the Hugging Face hub: the token for it, the commit behind its revision, its place in the cache.

Files lie where huggingface_hub keeps them, so what transformers or `hf download` fetched is used again, and the other
way round. Two small things of ours lie in the repository's cache folder, beside `blobs` and `snapshots`:

    .listing/COMMIT.json   the commit's files with sizes and hashes: how --offline knows whether the cache is complete
    .unverified/ETAG       an empty file per download whose hash is still to be checked, so a kill cannot skip the check

Offline without a listing of ours, the files that are there are taken for all there are.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

from checkpoint_files import read_note, write_note
from errors import CheckpointError
from hub_errors import explain, retry
from huggingface_hub import HfApi, constants, get_token

log = logging.getLogger("checkpoint.hub")

COMMIT = re.compile(r"[0-9a-f]{40}")
USER_AGENT = "triton-trtllm"


@dataclass(frozen=True, kw_only=True)
class Repository:
    """What was asked for, where from, and where to."""

    id: str
    revision: str
    cache: Path
    endpoint: str
    token: str | None = field(repr=False)
    token_origin: str

    @property
    def folder(self) -> Path:
        return self.cache / f"models--{self.id.replace('/', '--')}"

    def listing(self, commit: str) -> Path:
        return self.folder / ".listing" / f"{commit}.json"

    @property
    def free_bytes(self) -> int:
        """On the disk that the cache is, or will be, on."""
        existing = next(folder for folder in (self.cache, *self.cache.parents) if folder.exists())
        return shutil.disk_usage(existing).free


@dataclass(frozen=True)
class HubFile:
    """One file of a commit. What is None, the hub (or the mirror in its place) did not say."""

    name: str
    size: int | None = None  # bytes
    sha256: str | None = None  # of the content; only for files in LFS or Xet, which all weights are
    blob: str | None = None  # git's id of the content

    @property
    def etag(self) -> str | None:
        """The file's name among the cache's blobs."""
        return self.sha256 or self.blob


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository, with its top-level files by name."""

    repository: Repository
    commit: str
    files: dict[str, HubFile]

    @property
    def path(self) -> Path:
        return self.repository.folder / "snapshots" / self.commit

    def has(self, file: HubFile) -> bool:
        """Whether it is there, with its size."""
        path = self.path / file.name
        return path.exists() and file.size in (None, size_of(path))

    def partial(self, file: HubFile) -> Path:
        """Where huggingface_hub keeps what has arrived of a file."""
        return self.repository.folder / "blobs" / f"{file.etag}.incomplete"

    def unverified(self, file: HubFile) -> Path:
        return self.repository.folder / ".unverified" / (file.etag or file.name)

    def bytes_to_come(self, files: Collection[HubFile]) -> int:
        return sum(max(0, (file.size or 0) - size_of(self.partial(file))) for file in files if not self.has(file))

    def percent(self, files: Collection[HubFile]) -> int:
        """How much of these files is there."""
        total_bytes = sum(file.size or 0 for file in files)
        return 100 - 100 * self.bytes_to_come(files) // total_bytes if total_bytes else 0


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


# --- the commit behind the revision


def pin(repository: Repository, *, offline: bool) -> Snapshot:
    """Turn the revision into a commit, whatever happens to the branch from now on. At most one request."""
    commit = _cached_commit(repository) if offline else repository.revision
    is_commit = COMMIT.fullmatch(commit) is not None
    if is_commit and (rows := read_note(repository.listing(commit), [])):
        return Snapshot(repository, commit, {row[0]: HubFile(*row) for row in rows})
    if not offline:
        return _ask_hub(repository)
    there = Snapshot(repository, commit, {})
    if not is_commit or not there.path.is_dir():
        raise CheckpointError(
            f"{repository.id!r} at {repository.revision!r} is not in the cache {str(repository.cache)!r}; "
            "run once without --offline, or give a local folder"
        )
    return replace(there, files={path.name: HubFile(path.name) for path in there.path.iterdir() if path.is_file()})


def remember(snapshot: Snapshot) -> None:
    """Let the revision mean this commit for --offline, as huggingface_hub does."""
    repository = snapshot.repository
    if repository.revision != snapshot.commit:
        # The client takes every file in `refs` for a reference, so the temporary one lies elsewhere.
        reference = repository.folder / "refs" / repository.revision
        write_note(reference, snapshot.commit, temporary_in=repository.folder / ".listing")


def _cached_commit(repository: Repository) -> str:
    """What the revision meant when it was asked for last, or the revision itself."""
    try:
        return (repository.folder / "refs" / repository.revision).read_text().strip()
    except (OSError, ValueError):
        return repository.revision


def _ask_hub(repository: Repository) -> Snapshot:
    api = HfApi(token=repository.token or False, library_name=USER_AGENT)
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    try:
        info = retry(
            lambda: api.model_info(repository.id, revision=repository.revision, files_metadata=True, timeout=timeout),
            repository,
        )
        commit = info.sha or ""
        if not COMMIT.fullmatch(commit):
            raise KeyError("sha")
    except Exception as error:  # whatever a client of others raises is a failed request to the user
        raise explain(error, repository, repr(repository.id)) from error
    if info.id != repository.id:
        log.info("%r is called %r on the hub now", repository.id, info.id)
    files = [
        HubFile(each.rfilename, each.size, each.lfs.sha256 if each.lfs else None, each.blob_id)
        for each in info.siblings or []
        if "/" not in each.rfilename
    ]
    write_note(repository.listing(commit), json.dumps([astuple(file) for file in files]))
    return Snapshot(repository, commit, {file.name: file for file in files})


# --- the token


def read_token(token_file: Path | None) -> tuple[str | None, str]:
    """The token to send, and where it came from, for messages; the token itself is never in a message."""
    if token_file is not None:
        return _token_from(Path(token_file), f"--token-file {str(token_file)!r}")
    given = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    path = os.environ.get("HF_TOKEN_PATH")
    if path and not given:
        return _token_from(Path(path).expanduser(), f"HF_TOKEN_PATH {path!r}")
    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return None, ""
    try:
        token = get_token()  # of HF_TOKEN or `hf auth login`
    except (OSError, ValueError):
        log.warning("the stored login cannot be read and is not used; going on without a token")
        token = None
    origin = "HF_TOKEN" if given else "the stored login"
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
