"""The engine store: one folder per engine, built once, never seen half done.

    ROOT/openvino-GPT2LMHeadModel-float32-0123456789abcdef/   an engine: its files and engine.json
    ROOT/.building/KEY.HOST.PID.RANDOM/                       one that is being built, or whose builder was killed
    ROOT/.kept/KEY/                                           what a failed or killed build of KEY need not do again
    ROOT/.locks/KEY                                           locked while KEY is being built; says by whom

Finding an engine takes no lock and writes nothing, so servers may mount the store read-only. Building takes the key's
lock: an fcntl lock, which the kernel drops however its holder ends, and which NFSv4 shares between machines. What
lies in `.building` while nobody has its lock was left by a killed builder, and the next build removes it. What lies in
`.kept` waits for the next build of the same key, for a week.

What is not covered: file systems whose fcntl locks hold on one machine only (NFS mounted `nolock` or `local_lock`,
Lustre `localflock`). Give each machine a store of its own there.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from engine_manifest import (
    SCHEMA,
    EngineManifest,
    ManifestError,
    check_sizes,
    fsync_folder,
    list_files,
    read_manifest,
    write_manifest,
)
from errors import StoreError
from plan import EnginePlan

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 10.0  # between two lines about another builder
POLL_SECONDS = 0.2  # a waiting build asks for the lock again; on NFS each time is one small request
KEPT_SECONDS = 7 * 24 * 3600.0  # a build that nobody has repeated for so long is not wanted any more
FULL_BELOW_BYTES = 1 << 20  # compilers written in C++ say "iostream error" for a full disk
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

_process_lock = threading.Lock()  # fcntl locks keep processes apart, not the threads of one


class Store:
    """All its methods raise StoreError, with one sentence, when the folder cannot be used."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self._building = self.root / ".building"
        self._kept = self.root / ".kept"
        self._locks = self.root / ".locks"
        with self._explained():
            self.root.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def key_of(plan: EnginePlan) -> str:
        """Hex SHA-256 of everything that decides the engine."""
        fields = {"schema": SCHEMA, **plan.key_fields()}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def folder_of(self, plan: EnginePlan) -> Path:
        """Where the plan's engine is or will be. The name is for people; engine.json has the whole key."""
        numbers = plan.dtype if plan.quantization == "none" else plan.quantization
        return self.root / f"{plan.engine}-{plan.architecture}-{numbers}-{self.key_of(plan)[:16]}"

    def kept_folder(self, plan: EnginePlan) -> Path:
        """Where a build of the plan may leave what outlives its failure. To be touched only while it is being built."""
        return self._kept / self.key_of(plan)

    def find(self, plan: EnginePlan) -> Path | None:
        """The plan's engine, if it is there with every file in its size. Hashes nothing: see check_files for that."""
        folder = self.folder_of(plan)
        return None if self._damage(folder, plan) else folder

    def build_once(self, plan: EnginePlan, compile: Callable[[Path], EngineManifest], *, force: bool = False) -> Path:
        """The plan's engine, built unless it is there. Of several builders one builds and the others wait for it.

        `compile` fills an empty folder and returns the manifest; the store adds `files` to it and writes it. What
        `compile` raises comes out as it is, unless the disk is full; nothing is left then but its kept folder. It must
        not build another engine in here. `force` builds although the engine is there, from the beginning, and replaces
        it when the new one is complete.
        """
        if not force and (found := self.find(plan)):
            return found
        key, folder = self.key_of(plan), self.folder_of(plan)
        with _process_lock, _sigterm_raised(), self._locked(key, folder.name):
            if not force and (found := self.find(plan)):
                return found
            if not force and folder.exists():
                log.warning("building again: %s", self._damage(folder, plan))
            with self._explained():
                self._remove_leftovers(key)
                if force:
                    shutil.rmtree(self._kept / key, ignore_errors=True)
            self._build(key, folder, compile)
        return folder

    def _damage(self, folder: Path, plan: EnginePlan) -> str | None:
        """Why `folder` is not the plan's engine."""
        try:
            manifest = read_manifest(folder)
            check_sizes(folder, manifest)
        except ManifestError as error:
            if isinstance(error.__cause__, OSError):  # it may be a good engine that only this user cannot read
                raise StoreError(f"{error}; make it readable, or choose another folder with --cache-dir") from error
            return str(error)
        if manifest.key != self.key_of(plan):
            return f"{folder} holds the engine of another key, {manifest.key}"
        return None

    # ---- building, with the lock held --------------------------------------------------------------------------------

    def _build(self, key: str, folder: Path, compile: Callable[[Path], EngineManifest]) -> None:
        building = self._new_name(key)
        try:
            with self._explained():
                building.mkdir()
            try:
                manifest = compile(building)
            except Exception as error:
                if getattr(error, "errno", None) in _DISK_FULL or self._free_bytes() < FULL_BELOW_BYTES:
                    raise self._full() from error
                raise
            assert manifest.key == key, "the compiler made another engine than planned"
            with self._explained():
                files = list_files(building)
                assert files, "the compiler left no file"
                _make_durable(building)
                write_manifest(building, replace(manifest, files=files))
                self._publish(building, folder, key)
            shutil.rmtree(self._kept / key, ignore_errors=True)
        finally:
            shutil.rmtree(building, ignore_errors=True)

    def _publish(self, building: Path, folder: Path, key: str) -> None:
        """Readers see the old engine, for a moment none, then the new one."""
        old = self._new_name(key)
        if folder.exists():
            os.replace(folder, old)
        os.replace(building, folder)
        fsync_folder(self.root)
        shutil.rmtree(old, ignore_errors=True)

    def _new_name(self, key: str) -> Path:
        return self._building / f"{key}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"

    def _remove_leftovers(self, own_key: str) -> None:
        """What killed builders left: it has no builder if its lock is free. And what was kept too long."""
        oldest = time.time() - KEPT_SECONDS
        kept = [path for path in self._kept.iterdir() if _modified(path) < oldest] if self._kept.exists() else []
        for leftover in [*self._building.iterdir(), *kept]:
            key = leftover.name.partition(".")[0]
            if key == own_key:  # its lock is ours; opening and closing the file once more would drop it
                shutil.rmtree(leftover, ignore_errors=True)
                continue
            with suppress(OSError), open(self._locks / key, "ab") as lock:  # not what is another user's
                if _try_lock(lock.fileno()):
                    shutil.rmtree(leftover, ignore_errors=True)

    # ---- the lock ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self, key: str, name: str) -> Iterator[None]:
        with self._explained():
            self._building.mkdir(exist_ok=True)
            self._locks.mkdir(exist_ok=True)
            lock = os.open(self._locks / key, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with self._explained():
                self._wait_for(lock, self._locks / key, name)
            with suppress(OSError):  # a full disk: then nobody learns who builds
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()} since {_now()}".encode(), 0)
                os.fsync(lock)
            yield
        finally:
            os.close(lock)  # and unlocks; the file stays, as removing it would let two builders lock two files

    def _wait_for(self, lock: int, path: Path, name: str) -> None:
        next_line = time.monotonic()
        while not _try_lock(lock):
            if time.monotonic() >= next_line:
                next_line += PROGRESS_SECONDS
                log.info("waiting for %s: being built by %s", name, _read_holder(path))
            time.sleep(POLL_SECONDS)

    # ---- what can go wrong -------------------------------------------------------------------------------------------

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._explain(error) from error

    def _explain(self, error: OSError) -> StoreError:
        if error.errno in _DISK_FULL:
            return self._full()
        reason = {
            errno.EROFS: "is on a read-only file system",
            errno.EACCES: f"may not be written by user {os.geteuid()} (no permission for {error.filename})",
            errno.EPERM: f"may not be written by user {os.geteuid()} (no permission for {error.filename})",
            errno.EEXIST: "is not a folder",
            errno.ENOTDIR: "is not a folder",
            errno.ENOLCK: "is on a file system without fcntl locks",
            errno.ENOSYS: "is on a file system without fcntl locks",
            errno.EOPNOTSUPP: "is on a file system without fcntl locks",
        }.get(error.errno or 0, f"cannot be used: {error}")
        return StoreError(f"the engine store {self.root} {reason}; choose another folder with --cache-dir")

    def _full(self) -> StoreError:
        return StoreError(
            f"the engine store {self.root} is too full for this engine: {self._free_bytes() / 1e6:.0f} MB are free; "
            "make room, or choose a folder on a larger disk with --cache-dir"
        )

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self.root).free


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def _modified(path: Path) -> float:
    """Of a folder: when a name in it changed last. Now, if it has just gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()


def _read_holder(path: Path) -> str:
    with suppress(OSError):  # some file systems lock reading too
        return path.read_text() or "another process"
    return "another process"


def _make_durable(folder: Path) -> None:
    """Flush every file. Who may read `folder` may read them too: some libraries write files for their user only."""
    readable = folder.stat().st_mode & 0o555
    for path in folder.rglob("*"):
        with suppress(PermissionError):  # file systems without modes of their own
            path.chmod(path.stat().st_mode | (readable if path.is_dir() else readable & 0o444))
        if path.is_dir():
            fsync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


@contextmanager
def _sigterm_raised() -> Iterator[None]:
    """Let SIGTERM end the program by an exception, so that the half-built folder is removed."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(signum: int, frame: FrameType | None) -> None:
        signal.signal(signum, signal.SIG_IGN)  # once is enough
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
