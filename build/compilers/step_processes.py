"""The processes that build a TensorRT engine: one per step, pinned to GPUs, watched until it ends.

`run` keeps every GPU busy with its own queue of steps, says every half minute that it goes on, and leaves no process
behind, whatever ends it: an exception here kills them, and they end with this process if it is killed.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpus import Gpu, pin_environment
from library_environment import library_environment

log = logging.getLogger(__name__)

PROGRAM = Path(__file__).resolve().parent / "tensorrt_rank.py"
HEARTBEAT_SECONDS = 30.0
POLL_SECONDS = 0.05
TAIL_BYTES = 16_384  # of a log, to look for the reason of a failure in

# Each switches the library to another way of working than the one that is written for here.
LIBRARY_SWITCHES = frozenset(["TLLM_DISABLE_MPI", "TRTLLM_DISABLE_UNIFIED_CONVERTER", "TRTLLM_VISIBLE_DEVICES"])


@dataclass(frozen=True, kw_only=True)
class Step:
    name: str  # "rank 0 of 4"
    folder: Path  # existing and empty: the working directory, with the job, the result and the log
    gpus: tuple[Gpu, ...]
    job: Callable[[], dict[str, Any]]  # asked when the step starts
    needs_hub: bool = False  # may download

    @property
    def log_file(self) -> Path:
        return self.folder / "log"

    @property
    def gpu_words(self) -> str:
        return f"GPU{'s' if len(self.gpus) > 1 else ''} {', '.join(str(gpu.index) for gpu in self.gpus)}"


class StepFailedError(Exception):
    """`exit_code` as of subprocess: negative for a signal. `error`: type, message and errno of what Python raised.

    `lines` are the last ones of the log that say something.
    """

    def __init__(self, step: Step, exit_code: int, error: Mapping[str, Any] | None, lines: list[str]) -> None:
        super().__init__(f"{step.name}: exit code {exit_code}, {error}")
        self.step, self.exit_code, self.error, self.lines = step, exit_code, error, lines

    @property
    def is_out_of_gpu_memory(self) -> bool:
        """torch raises OutOfMemoryError; TensorRT logs OutOfMemory, and gives no engine."""
        said = f"{self.error or ''} {' '.join(self.lines)}".lower()
        return "outofmemory" in said or "out of memory" in said


def run(steps: Sequence[Step], finished: Callable[[Step, dict[str, Any]], None]) -> None:
    """All steps, those of one first GPU one after another, others side by side. `finished` is told each result.

    Raises StepFailedError for the first that fails; the others are killed then.
    """
    waiting: dict[int, deque[Step]] = {}
    for step in steps:
        waiting.setdefault(step.gpus[0].index, deque()).append(step)
    running: dict[int, _Running] = {}
    next_heartbeat = time.monotonic() + HEARTBEAT_SECONDS
    try:
        while running or any(waiting.values()):
            for gpu, queue in waiting.items():
                if gpu not in running and queue:
                    running[gpu] = _Running(queue.popleft())
            for gpu, process in list(running.items()):
                if process.has_ended():
                    del running[gpu]
                    finished(process.step, process.result())
            if time.monotonic() >= next_heartbeat:
                next_heartbeat += HEARTBEAT_SECONDS
                for process in running.values():
                    log.info("%s: at work for %.0f s, %s", process.step.name, process.seconds, process.step.gpu_words)
            time.sleep(POLL_SECONDS)
    finally:
        for process in running.values():
            process.kill()


@dataclass
class _Running:
    """A step whose process is alive, or has ended and not been looked at."""

    step: Step
    process: subprocess.Popen = field(init=False)
    started: float = field(init=False)

    def __post_init__(self) -> None:
        folder = self.step.folder
        (folder / "job.json").write_text(json.dumps(self.step.job() | {"parent": os.getpid()}), encoding="utf-8")
        self.started = time.monotonic()
        with self.step.log_file.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(PROGRAM), "job.json", "result.json"],
                cwd=folder,  # where the library writes what it was not told a place for
                env=_environment(self.step),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches this program alone, and what the libraries start ends with it
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def has_ended(self) -> bool:
        """Leaves the ended process's number taken, so that `kill` cannot hit another one."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.process.pid, options) is not None

    def result(self) -> dict[str, Any]:
        self.kill()  # what it may have started and left
        exit_code = self.process.returncode
        result: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            result = json.loads((self.step.folder / "result.json").read_text(encoding="utf-8"))
        if exit_code != 0 or not result:
            raise StepFailedError(self.step, exit_code, result.get("error"), _last_lines(self.step.log_file))
        return result

    def kill(self) -> None:
        """With all that it started. Does nothing more to it if it has ended."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _environment(step: Step) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in LIBRARY_SWITCHES}
    environment = library_environment(inherited)
    environment |= pin_environment(step.gpus) | {"PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if not step.needs_hub:
        environment["HF_HUB_OFFLINE"] = "1"  # whatever a checkpoint's files refer to is not fetched
    return environment


def _last_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]
