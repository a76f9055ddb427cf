"""Real `promtool`, `prometheus` and `helm` for tests: from PATH, else from an archive beside the checkout."""

from __future__ import annotations

import fcntl
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Literal

import pytest

Name = Literal["promtool", "prometheus", "helm"]

# A test cluster's binaries; these are three of eleven members, 190 MB when unpacked.
ARCHIVE = Path(__file__).resolve().parents[3] / "shared/k8s/bin.tar.xz"
MEMBERS = ("promtool", "prometheus", "helm")


def find(name: Name) -> Path:
    """Skips the test that asks when there is none."""
    if found := shutil.which(name):
        return Path(found)
    if ARCHIVE.is_file():
        return _unpacked() / name
    pytest.skip(f"no {name} on PATH, and no {ARCHIVE}")


def _unpacked() -> Path:
    """Unpacking takes 7 s on 2 cores, so it is done once for all runs; the folder is named after what it came from."""
    stat = ARCHIVE.stat()
    cache = Path(tempfile.gettempdir()) / f"triton-trtllm-tests-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if cache.stat().st_uid != os.getuid():
        pytest.skip(f"{cache} belongs to somebody else, and programs from there are not run")
    folder = cache / f"packed-{stat.st_size}-{int(stat.st_mtime)}"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            _unpack(folder)
    return folder


def _unpack(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        new = Path(name) / "new"
        missing = set(MEMBERS)
        with tarfile.open(ARCHIVE, "r|xz") as archive:  # a stream: ends with the last member that is wanted
            for member in archive:
                if member.name in missing:
                    archive.extract(member, new, filter="data")
                    missing.remove(member.name)
                if not missing:
                    break
        if missing:
            pytest.skip(f"{ARCHIVE} has no {' and no '.join(sorted(missing))}")
        os.replace(new, folder)
