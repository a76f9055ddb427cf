"""Repositories to be measured, built as a user builds them, and their servers with the CPU time they use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from local_server import LocalServer

ROOT = Path(__file__).resolve().parents[2]
DEMO_CHECKPOINT = ROOT / "scripts/demo_checkpoint/demo-gpt2"


class BenchmarkError(Exception):
    """A benchmark cannot be run: one sentence."""


def build(folder: Path, name: str, model: Path, *options: str) -> Path:
    """`build/engines.py` into `folder`/`name`. Raises BenchmarkError."""
    output = folder / name
    command = [sys.executable, str(ROOT / "build/engines.py"), "--model", str(model), "--served-name", name]
    command += ["--output", str(output), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BenchmarkError(f"{' '.join(command[1:])} failed:\n{result.stderr}")
    return output


def build_synthetic(folder: Path, name: str, rates: str, *options: str) -> Path:
    return build(folder, name, DEMO_CHECKPOINT, "--engine", "synthetic", "--synthetic", rates, *options)


def served(repository: Path) -> LocalServer:
    return LocalServer(repository, repository.with_suffix(".log"))


class CpuSeconds:
    """CPU time of a server's processes, by model. They must not change meanwhile."""

    def __init__(self, server: LocalServer):
        self._processes = server.processes()

    def read(self) -> dict[str, float]:
        times = {name: process.cpu_times() for name, process in self._processes.items()}
        return {name: time.user + time.system for name, time in times.items()}

    def total(self) -> float:
        return sum(self.read().values())
