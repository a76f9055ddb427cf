"""Downloads a checkpoint from the Hugging Face hub, or finds that the cache has it.

One request turns the revision into a commit and lists its files (hub_repository.py); the few files that say what else
is needed are fetched; then the rest; then everything is checked. All files come from that one commit.

What is not covered:
- A killed download goes on where it stopped when files come by plain HTTP. A Xet transfer starts the file again that
  it was in; set HF_HUB_DISABLE_XET=1 on a poor line.
- What transformers or others put into the cache is checked for size and structure, not hashed again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from checkpoint_files import Source, are_missing, check_files, head_files, human_size, needed_files, sha256_of
from errors import CheckpointError
from hub_errors import disk_full, explain, retry
from hub_repository import USER_AGENT, HubFile, Repository, Snapshot, pin, read_token, remember, size_of
from huggingface_hub import constants, hf_hub_download

log = logging.getLogger("checkpoint.hub")

PROGRESS_SECONDS = 30.0  # between two lines in the log
PARALLEL_DOWNLOADS = 8  # as many as huggingface_hub's snapshot_download takes

Results: TypeAlias = "queue.SimpleQueue[tuple[HubFile, Exception | None]]"


def fetch(
    repo_id: str,
    revision: str,
    *,
    token_file: Path | None,
    cache_dir: Path | None,
    offline: bool,
    trust_remote_code: bool,
    is_plan: bool = False,
) -> tuple[str, Path, tuple[str, ...]]:
    """The commit, its folder, and the files in it that matter, complete and checked. Raises CheckpointError.

    With `is_plan` only the small files that say what there is are in the folder afterwards: config.json and such.
    """
    offline = offline or constants.HF_HUB_OFFLINE
    token, token_origin = (None, "") if offline else read_token(token_file)
    repository = Repository(
        id=repo_id,
        revision=revision,
        cache=Path(cache_dir or constants.HF_HUB_CACHE).expanduser().absolute(),
        endpoint=constants.ENDPOINT,
        token=token,
        token_origin=token_origin,
    )
    try:
        with _quiet_client():
            snapshot = pin(repository, offline=offline)
            files = _complete(snapshot, offline=offline, trust_remote_code=trust_remote_code, is_plan=is_plan)
            if not offline and not is_plan:
                remember(snapshot)  # only now: --offline must not find half of it
    except OSError as error:
        raise explain(error, repository, repr(repo_id)) from error
    return snapshot.commit, snapshot.path, files


def _complete(snapshot: Snapshot, *, offline: bool, trust_remote_code: bool, is_plan: bool) -> tuple[str, ...]:
    """Have all files that matter in the snapshot's folder, or for a plan the first few; return the names of all."""
    repo_id, commit = snapshot.repository.id, snapshot.commit[:8]
    if offline:
        source = Source(f"the cached {repo_id!r} (commit {commit})", "run once without --offline to complete it")
    else:
        source = Source(f"{repo_id!r} at commit {commit}", "choose another revision or model")
    _have(snapshot, head_files(snapshot.files, source), source, offline=offline, log_level=logging.DEBUG)
    files = needed_files(snapshot.files, snapshot.path, source, trust_remote_code=trust_remote_code)
    if is_plan:
        return files
    _have(snapshot, files, source, offline=offline, log_level=logging.INFO)
    check_files(snapshot.path, files, source)
    return files


def _have(snapshot: Snapshot, names: Collection[str], source: Source, *, offline: bool, log_level: int) -> None:
    """Have these files in the folder, each with the size and the hash that the hub lists."""
    files = [snapshot.files[name] for name in names]
    missing = [file for file in files if not snapshot.has(file)]
    if missing and offline:
        raise source.error(f"is incomplete: {are_missing([file.name for file in missing])}")
    for file in files:
        if file not in missing and snapshot.unverified(file).exists():
            _verify(snapshot, file)
    bytes_to_come = snapshot.bytes_to_come(missing)
    if bytes_to_come > 0 and bytes_to_come > snapshot.repository.free_bytes:
        raise disk_full(snapshot.repository, bytes_to_come)
    if missing:
        _download(snapshot, missing, log_level)


def _download(snapshot: Snapshot, files: list[HubFile], log_level: int) -> None:
    """Fetch and verify files in parallel, large ones first, with sparse lines in the log."""
    repo_id, started = snapshot.repository.id, time.monotonic()
    size = human_size(sum(file.size or 0 for file in files))
    what = f"{len(files)} file{'s' if len(files) > 1 else ''}, {size}"
    there = f" ({percent} % is there)" if (percent := snapshot.percent(files)) else ""
    log.log(log_level, "fetching %s, of %r at commit %s%s", what, repo_id, snapshot.commit[:8], there)
    stopped = threading.Event()
    done = _start(snapshot, files, stopped)
    num_done, next_line = 0, started + PROGRESS_SECONDS
    try:
        while num_done < len(files):
            try:
                file, error = done.get(timeout=max(0.0, next_line - time.monotonic()))
            except queue.Empty:
                next_line += PROGRESS_SECONDS
                if not sys.stderr.isatty():  # where the client draws its bars
                    log.log(log_level, "fetched %d %% of %s", snapshot.percent(files), size)
                continue
            if isinstance(error, CheckpointError):
                raise error
            if error is not None:
                to_come = snapshot.bytes_to_come(files)
                raise explain(error, snapshot.repository, f"{file.name} of {repo_id!r}", to_come) from error
            num_done += 1
    finally:
        stopped.set()
    log.log(log_level, "fetched %s, in %.0f s", what, time.monotonic() - started)


def _start(snapshot: Snapshot, files: list[HubFile], stopped: threading.Event) -> Results:
    """Daemon threads: neither an error in one of them nor Ctrl-C waits until the others have their gigabytes."""
    slots = threading.Semaphore(PARALLEL_DOWNLOADS)
    done: Results = queue.SimpleQueue()

    def work(file: HubFile) -> None:
        try:
            with slots:
                if not stopped.is_set():
                    _download_one(snapshot, file)
                    _verify(snapshot, file)
            done.put((file, None))
        except Exception as error:  # handed to the thread that waits
            done.put((file, error))

    for file in sorted(files, key=lambda file: -(file.size or 0)):
        threading.Thread(target=work, args=(file,), daemon=True, name="fetch").start()
    return done


def _download_one(snapshot: Snapshot, file: HubFile) -> None:
    repository, path, partial = snapshot.repository, snapshot.path / file.name, snapshot.partial(file)
    if path.exists() and not snapshot.has(file):
        log.warning("%s in the cache has the wrong size; fetching it again", file.name)
        _discard(path)
    if file.size is not None and size_of(partial) > file.size:
        partial.unlink(missing_ok=True)  # two writers without working locks; a request to go on from there fails
    snapshot.unverified(file).parent.mkdir(parents=True, exist_ok=True)
    snapshot.unverified(file).touch()
    retry(
        lambda: hf_hub_download(
            repository.id,
            file.name,
            revision=snapshot.commit,
            cache_dir=repository.cache,
            token=repository.token or False,
            library_name=USER_AGENT,
        ),
        repository,
        bytes_there=lambda: size_of(partial),
    )


def _verify(snapshot: Snapshot, file: HubFile) -> None:
    """Check a downloaded file against the hub's size and hash, once; a file that fails is removed."""
    path = snapshot.path / file.name
    if not snapshot.has(file) or not _has_listed_hash(path, file):
        _discard(path)
        raise CheckpointError(
            f"{file.name} of {snapshot.repository.id!r} arrived damaged: it is not what "
            f"{snapshot.repository.endpoint} lists; it was removed, run again to fetch it anew"
        )
    snapshot.unverified(file).unlink(missing_ok=True)


def _has_listed_hash(path: Path, file: HubFile) -> bool:
    if file.sha256:
        return sha256_of(path) == file.sha256
    if file.blob:  # git's id of a file: SHA-1 over a header and the content
        content = b"blob %d\0" % size_of(path) + path.read_bytes()
        return hashlib.sha1(content, usedforsecurity=False).hexdigest() == file.blob
    return True


def _discard(path: Path) -> None:
    """Remove a file of a snapshot together with the blob it points to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Keep huggingface_hub's warnings for those who asked for its log: they repeat ours, and quote signed addresses.

    Its progress bars need nothing: they draw themselves on a terminal only.
    """
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
