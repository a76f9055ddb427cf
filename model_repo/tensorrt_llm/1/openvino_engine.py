"""The engine `openvino`: OpenVINO GenAI's continuous batching on this machine's CPU, in a process of its own.

This module is the near end: it sends requests to openvino_worker.py and hands on what comes back.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import socket
import subprocess
import threading
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

from engine_manifest import EngineManifest
from generation import Capability, Deliver, EngineError, EngineLimits, EngineStats, GenerationRequest

_log = logging.getLogger(__name__)

_STOP_SECONDS = 10.0  # a step in progress may finish; then the process is killed


def runtime_versions() -> dict[str, str]:
    return {name: version(name) for name in ("openvino", "openvino-genai")}


class OpenVinoEngine:
    """See `generation.Engine`. Raises EngineError when the engine cannot be loaded."""

    capabilities: frozenset[Capability] = frozenset(
        {"beam_search", "log_probs", "min_tokens", "no_end_id", "penalties", "seed"}
    )
    computes_on_cpu = True

    def __init__(self, folder: Path, manifest: EngineManifest):
        self.limits = EngineLimits(**manifest.limits, vocab_size=manifest.vocab_size)
        self._lock = threading.Lock()  # for the next two
        self._deliveries: dict[int, Deliver] = {}
        self._error: EngineError | None = None
        self._process, self._socket = _start_worker(folder)
        self._connection = Connection(os.dup(self._socket.fileno()))
        match self._receive():
            case ("ready", stats):
                self._stats: EngineStats = stats
            case (_, sentence):
                self._process.kill()
                raise EngineError(f"the engine cannot be loaded: {sentence}")
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="engine-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        self._reader.start()
        self._writer.start()

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        with self._lock:
            if self._error is None:
                self._deliveries[request.key] = deliver
                self._outbox.put(("submit", request))
                return
        deliver(self._error)

    def abort(self, key: int) -> None:
        with self._lock:
            if self._deliveries.pop(key, None) is not None:
                self._outbox.put(("abort", key))

    def pace(self, seconds: float) -> None:
        self._outbox.put(("pace", seconds))

    def stats(self) -> EngineStats:
        return self._stats

    def shutdown(self) -> None:
        self._fail("the engine was shut down; send the request again")
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes both ends; a mere close() would not wake the reader
        self._outbox.put(None)
        self._reader.join()
        self._writer.join()
        self._socket.close()

    def _write(self) -> None:
        # The worker reads only between two steps: whoever submits or aborts must not wait for that.
        while message := self._outbox.get():
            try:
                self._connection.send(message)
            except OSError:  # the process is gone; the reader finds out and says so to everybody
                return

    def _read(self) -> None:
        while True:
            match self._receive():
                case ("steps", news, stats):
                    self._stats = stats
                    for key, what, is_last in news:
                        with self._lock:
                            deliver = self._deliveries.pop(key, None) if is_last else self._deliveries.get(key)
                        if deliver is not None:
                            deliver(what)
                case (_, sentence):
                    self._stats = self._stats.when_idle()
                    self._fail(f"the engine failed and must be restarted: {sentence}")
                    self._end_process()
                    return

    def _receive(self) -> tuple:
        """The worker's next message; its end is a message too."""
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            return ("failed", f"its process {self._process.pid} ended")

    def _fail(self, sentence: str) -> None:
        with self._lock:
            if self._error is not None:
                return
            self._error = EngineError(sentence)
            deliveries, self._deliveries = self._deliveries, {}
        for deliver in deliveries.values():
            deliver(self._error)

    def _end_process(self) -> None:
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            _log.warning("the engine's process does not end; killing it")
            self._process.kill()
            self._process.wait()


def _start_worker(folder: Path) -> tuple[subprocess.Popen, socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        # sys.executable is Triton's stub; its packages are those of the python3 that is first on PATH.
        command = [shutil.which("python3"), str(Path(__file__).with_name("openvino_worker.py"))]
        command += [str(theirs.fileno()), str(folder)]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    return process, ours
