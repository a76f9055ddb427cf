"""The side of an LLM: starts a process for every rank, hands requests in and responses out."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import machine, process

if TYPE_CHECKING:
    from ..executor.result import RequestOutput

_WATCH_SECONDS = 0.05
_STATISTICS_SECONDS = 0.2  # the library, too, hands them over this seldom
_END_SECONDS = 5.0
# What rank 1 and the others do: be there. The socket's end is theirs.
_IDLE = "import os, signal, sys; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; os.read(int(sys.argv[1]), 1)"

# Left over from an mpirun around the server; children that MPI spawns then look for a parent that is not theirs.
_MPI_NAMES = {
    *(f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK", "NODE_RANK")),
    *(f"OMPI_{name}" for name in ("UNIVERSE_SIZE", "FIRST_RANKS", "APP_CTX_NUM_PROCS")),
    *(f"PMIX_{name}" for name in ("RANK", "NAMESPACE", "SERVER_URI", "SERVER_URI2", "SERVER_URI21", "SERVER_URI3")),
    *(f"PMIX_{name}" for name in ("SERVER_TMPDIR", "SYSTEM_TMPDIR", "SECURITY_MODE", "GDS_MODULE", "BFROPS_MODULE")),
    *(f"PMIX_{name}" for name in ("PTL_MODULE", "VERSION", "HOSTNAME")),
    *(f"PMI_{name}" for name in ("RANK", "SIZE", "FD", "SPAWNED", "APPNUM")),
}
_MPI_PREFIXES = ("OMPI_MCA_orte_", "ORTE_")


def check_mpi(world_size: int) -> None:
    left = sorted(name for name in os.environ if name in _MPI_NAMES or name.startswith(_MPI_PREFIXES))
    if world_size > 1 and left:
        raise RuntimeError(
            f"MPI_Comm_spawn of {world_size} processes failed: MPI_ERR_SPAWN: could not spawn processes "
            f"(the double: {left[0]} is set)"
        )


class Executor:
    def __init__(self, settings: dict[str, Any]) -> None:
        world_size = settings["tp_size"] * settings["pp_size"]
        check_mpi(world_size)
        self.errors: queue.Queue[Exception] = queue.Queue()  # of the background; raised by whoever looks next
        self.is_shut_down = False
        self.is_dropped = False  # by the LLM: requests that hold on to it find nothing
        self.statistics: Any = None  # the LLM's only IterationResult, once there was a request
        self._unseen_statistics: list[str] = []
        self._results: dict[int, RequestOutput] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._last_id = 1
        self._send_lock = threading.Lock()
        self._ends: list[socket.socket | Connection] = []
        self._processes = [self._start(rank, settings) for rank in range(world_size)]
        self._connection = self._ends[0]
        process.num_engines += 1
        try:
            self._connection.recv()
        except (EOFError, ConnectionError):
            self.shutdown()
            raise RuntimeError("Executor worker died during initialization") from None
        threading.Thread(target=self._read, name="double-responses", daemon=True).start()
        threading.Thread(target=self._watch, name="double-watch", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        return [one.pid for one in self._processes]

    def _start(self, rank: int, settings: dict[str, Any]) -> subprocess.Popen:
        ours, theirs = socket.socketpair()
        program = ["-m", "tensorrt_llm._double.worker", json.dumps(settings)] if rank == 0 else ["-S", "-c", _IDLE]
        # Inside Triton sys.executable is the stub.
        python = sys.executable if Path(sys.executable).name.startswith("python") else shutil.which("python3")
        environment = machine.environment_of_children()
        packages = Path(__file__).parents[2]
        environment["PYTHONPATH"] = f"{packages}:{environment.get('PYTHONPATH', '')}".rstrip(":")
        environment["OPENBLAS_NUM_THREADS"] = "1"
        command = [str(python), *program, str(theirs.fileno())]
        with theirs:
            started = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, env=environment, pass_fds=[theirs.fileno()], cwd="/"
            )
        self._ends.append(Connection(ours.detach()) if rank == 0 else ours)
        return started

    def submit(self, result: RequestOutput, loop: asyncio.AbstractEventLoop | None) -> None:
        if loop is not None and self._loop is not None and loop is not self._loop:
            raise RuntimeError(
                "the double: generate_async() on a second event loop; the library notifies one loop only, so the "
                "responses would never arrive here"
            )
        self._loop = self._loop or loop
        self.raise_background_error()
        self._last_id += 1
        result.request_id = self._last_id
        self._results[result.request_id] = result
        params = dict(vars(result.sampling_params))
        self._send(("submit", result.request_id, result.prompt_token_ids, params, result._streaming))

    def abort_request(self, request_id: int) -> None:
        """Only asks for it; the last response still comes."""
        self._send(("abort", request_id))

    def raise_background_error(self) -> None:
        if not self.errors.empty():
            error = self.errors.get()
            self.shutdown()
            raise error

    def shutdown(self) -> None:
        if self.is_shut_down:
            return
        self.is_shut_down = True
        process.num_engines -= 1
        for end in self._ends[1:]:
            end.close()
        # Not closed under the thread that reads from it: the socket is ended instead.
        with socket.fromfd(self._ends[0].fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as first:
            try:
                first.shutdown(socket.SHUT_RDWR)
            except OSError:  # its process is gone
                pass
        until = time.monotonic() + _END_SECONDS
        for one in self._processes:
            try:
                one.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                one.kill()
                one.wait()

    def _send(self, message: tuple[Any, ...]) -> None:
        try:
            with self._send_lock:
                self._connection.send(message)
        except OSError:  # dead; that comes to light as a background error
            pass

    def _read(self) -> None:
        try:
            while True:
                kind, *content = self._connection.recv()
                if kind == "background":
                    self.errors.put(RuntimeError(content[0]))
                else:
                    self._deliver(*content)
        except (EOFError, OSError):
            pass

    def _deliver(self, responses: list[dict[str, Any]], statistics: str | None) -> None:
        """All responses of a step at once, on the one loop."""
        if self.is_shut_down:
            return
        waiting = []
        for response in responses:
            result = self._results.get(response["id"])
            if "finish_reason" in response or "error" in response:
                self._results.pop(response["id"], None)
            if result is not None:
                waiting.append(result._queue.put(response))
        if statistics is not None:
            self._unseen_statistics.append(statistics)
        self._notify(waiting)

    def _notify(self, waiting: list[asyncio.Event | None]) -> None:
        events = [event for event in waiting if event is not None]
        if events and self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(_set_all, events)
            except RuntimeError:  # the loop is closed, and nobody waits any more
                pass

    def _watch(self) -> None:
        """A rank that dies takes the others along. Nobody who waits for a response is told: the library puts the error
        away for the next request, or response. (Whether 1.2.1 itself does is not confirmed, hence death_reaches_one.)
        """
        passed = 0.0
        while not self.is_shut_down:
            time.sleep(_WATCH_SECONDS)
            passed += _WATCH_SECONDS
            if passed >= _STATISTICS_SECONDS and self.statistics is not None:
                passed, unseen, self._unseen_statistics = 0.0, self._unseen_statistics, []
                self._notify([self.statistics._queue.put(one) for one in unseen])
            victim = machine.faults().get("kill_rank")
            if victim is not None and self._processes[victim].poll() is None:
                self._processes[victim].kill()
                self._processes[victim].wait()
            dead = [(rank, one.poll()) for rank, one in enumerate(self._processes) if one.poll() is not None]
            if not dead or self.is_shut_down:
                continue
            for one in self._processes:
                one.kill()
            rank, status = dead[0]
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            self.errors.put(RuntimeError(f"Executor worker of rank {rank} died with {how}"))
            if machine.faults().get("death_reaches_one") and self._results:
                self._notify([next(iter(self._results.values()))._queue.put({"is_background": True})])
            return


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
