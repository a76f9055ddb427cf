"""Runs tritonserver as a child: lets requests finish before it ends, and ends it when one of its models has died.

tritonserver 2.51 does neither. At SIGTERM it refuses the steps of ensembles that are in flight, so that gRPC streams
get no further response and no end (requests over HTTP are safe, since it waits for those first). And it neither
restarts nor reports a model's process that has died: live and ready stay 200, and requests hang.

So SIGTERM, and Ctrl-C, come to this process. It has `tensorrt_llm` let nobody in any more, waits until nothing is in
flight, and only then ends the server; after `drain_seconds` whatever is left gets its error. A second signal skips the
rest. The server ends with this process however that ends (`_Guard`). As process 1 of a container it also collects
orphans, and the server, which is then another process, can be killed from inside (process 1 cannot).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

_TICK_SECONDS = 0.2
_QUIET_TICK_SECONDS = 0.5  # while it serves: what is looked at then costs the engine time
_SEARCH_SECONDS = 5.0  # for processes of models that were loaded since; with its 130 threads it takes 3 ms
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)

# The server's gauges are 0.1 s old at most, and a request may be on its way from one model to the next.
_IDLE_SECONDS = 0.5
_MODELS_END_SECONDS = 2.5  # after their server, whose end they look for every half a second
_ZOMBIE_SECONDS = 0.5  # tritonserver collects a model's process that has ended in an orderly way sooner

MODEL_DIED_EXIT_CODE = 70

# Without these no answer can be finished, so nothing is worth waiting for.
_ON_EVERY_PATH = ("tensorrt_llm", "postprocessing")
_UNKNOWN = "?"


@runtime_checkable
class Feedback(Protocol):
    """The repository's own `feedback_channel.FeedbackSender`."""

    def drain(self, listener_pid: int) -> None: ...

    def end(self, listener_pid: int) -> None: ...


class Supervisor:
    """`is_ready` and `num_in_flight` ask the server; the latter gives None when it does not answer."""

    def __init__(
        self,
        *,
        feedback: Feedback,
        is_ready: Callable[[], bool],
        num_in_flight: Callable[[], int | None],
        drain_seconds: float,
        ready_line: str,
        end_seconds: float = 15.0,  # with nothing in flight tritonserver takes two to four
    ):
        self._feedback, self._is_ready, self._num_in_flight = feedback, is_ready, num_in_flight
        self._drain_seconds, self._ready_line, self._end_seconds = drain_seconds, ready_line, end_seconds
        self._is_announced = False
        self._models: dict[int, str] = {}  # by process id
        self._dead_since: dict[int, float] = {}
        self._next_search = 0.0
        self._exit_code: int | None = None  # instead of the server's own
        # Monotonic seconds; None: not yet.
        self._drains_until: float | None = None
        self._idle_since: float | None = None
        self._kill_at: float | None = None

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Start the server and stay until it has ended. Returns its exit code, or 128 and the signal that ended it."""
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # they are waited for below
        self._server = subprocess.Popen(
            command,
            env=dict(environment),
            preexec_fn=_prepare_child,
            process_group=0,  # Ctrl-C is for this process
        )
        guard = _Guard(self._server.pid)
        while True:
            self._take_signal()
            _collect_orphans(self._server.pid)
            if (code := self._server.poll()) is not None:
                self._wait_for_models()
                guard.release()
                return self._exit_code if self._exit_code is not None else code if code >= 0 else 128 - code
            now = time.monotonic()
            self._announce()
            self._watch_models(now)
            self._go_on_draining(now)

    # ---- signals -----------------------------------------------------------------------------------------------

    def _take_signal(self) -> None:
        is_quiet = self._is_announced and self._drains_until is None and not self._dead_since
        received = signal.sigtimedwait(_SIGNALS, _QUIET_TICK_SECONDS if is_quiet else _TICK_SECONDS)
        if received is None or received.si_signo == signal.SIGCHLD:
            return
        if received.si_signo == signal.SIGHUP:
            self._server.send_signal(signal.SIGHUP)
        elif self._drains_until is None and (self._is_announced or self._is_ready()):
            self._drain()
        elif self._kill_at is None:
            self._end_server()
        else:
            self._server.kill()

    # ---- while it runs -----------------------------------------------------------------------------------------

    def _announce(self) -> None:
        if not self._is_announced and self._drains_until is None and self._is_ready():
            self._is_announced = True
            print(self._ready_line, flush=True)

    def _watch_models(self, now: float) -> None:
        if self._kill_at is not None or self._exit_code is not None:
            return
        if now >= self._next_search or not self._is_announced:
            self._next_search = now + _SEARCH_SECONDS
            for pid in _children(self._server.pid):
                if self._models.get(pid, _UNKNOWN) == _UNKNOWN:
                    self._models[pid] = _model_of(pid)
        for pid in list(self._models):
            state = _state(pid)
            if state is None:
                del self._models[pid]
                self._dead_since.pop(pid, None)
            elif state == "Z" and now - self._dead_since.setdefault(pid, now) >= _ZOMBIE_SECONDS:
                self._give_up(pid)
                return

    def _give_up(self, pid: int) -> None:
        model = self._models[pid]
        self._exit_code = MODEL_DIED_EXIT_CODE
        print(f"serve: the process of the model '{model}' (pid {pid}) has died; ending the server", file=sys.stderr)
        if model in _ON_EVERY_PATH or not self._is_announced:
            self._server.kill()
        elif self._drains_until is None:
            self._drain()

    # ---- its end -----------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        self._drains_until = time.monotonic() + self._drain_seconds
        print(f"serve: ending; requests in flight may take {self._drain_seconds:g} s more", file=sys.stderr, flush=True)
        self._tell(self._feedback.drain)

    def _go_on_draining(self, now: float) -> None:
        if self._kill_at is not None:
            if now >= self._kill_at:
                print("serve: the server does not end; killing it", file=sys.stderr, flush=True)
                self._server.kill()
            return
        if self._drains_until is None:
            return
        number = self._num_in_flight()
        if number == 0:
            self._idle_since = self._idle_since or now
        else:
            self._idle_since = None
        if self._idle_since is not None and now - self._idle_since >= _IDLE_SECONDS:
            # Whatever comes of its own end: a request that arrives just now keeps tritonserver until its exit timeout.
            self._exit_code = self._exit_code or 0
            self._end_server()
        elif now >= self._drains_until:
            self._exit_code = self._exit_code or 1
            print(f"serve: {number} requests are still in flight and fail now", file=sys.stderr, flush=True)
            self._tell(self._feedback.end)
            time.sleep(_IDLE_SECONDS)  # their errors are on their way
            self._end_server()

    def _end_server(self) -> None:
        if self._exit_code == MODEL_DIED_EXIT_CODE:
            self._server.kill()  # at SIGTERM it would wait for the dead model
            return
        self._kill_at = time.monotonic() + self._end_seconds
        self._server.terminate()

    def _wait_for_models(self) -> None:
        """They end by themselves, but for one that waits for the server to take its response: the stub of 2.51 may then
        hold Python's GIL, so that server_ending.py's watch cannot run either. That one is left for the guard.
        """
        end = time.monotonic() + _MODELS_END_SECONDS
        while time.monotonic() < end and any(_state(pid) not in (None, "Z") for pid in self._models):
            time.sleep(0.05)
            _collect_orphans(self._server.pid)

    def _tell(self, say: Callable[[int], None]) -> None:
        for pid, model in self._models.items():
            if model == "tensorrt_llm":
                say(pid)


def _prepare_child() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


class _Guard:
    """A process that kills the server, and all that it has started, when this one has ended, be it by SIGKILL.

    A server that nobody looks after, and nobody stops, keeps a GPU. SIGTERM by the kernel (PR_SET_PDEATHSIG) would not
    do: it makes tritonserver 2.51 hang when it has gRPC streams, and reaches no model.
    """

    def __init__(self, server_pid: int):
        # Programs do not inherit pipes of Python, so this process alone holds the end that is not read.
        ended, self._held = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            os.close(self._held)
            os.read(ended, 1)  # until nobody holds the other end
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server_pid, signal.SIGKILL)
            os._exit(0)
        os.close(ended)

    def release(self) -> None:
        """When the server has ended: kills what it has left behind."""
        os.close(self._held)
        with contextlib.suppress(ChildProcessError):  # collected as an orphan
            os.waitpid(self._pid, 0)


def num_in_flight(metrics_url: str) -> int | None:
    """Requests in tensorrt_llm and in front of it; None when the server does not say."""
    try:
        with urllib.request.urlopen(metrics_url, timeout=2) as response:
            text = response.read().decode()
    except OSError:
        return None
    waiting = re.findall(r"^nv_inference_pending_request_count\{.*\} (\S+)$", text, re.MULTILINE)
    active = re.findall(r'^nv_trt_llm_request_metrics\{.*request_type="active".*\} (\S+)$', text, re.MULTILINE)
    return round(sum(map(float, waiting + active)))


def _collect_orphans(server_pid: int) -> None:
    """They belong to process 1, which this may be. The server itself is left for Popen."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid == server_pid:
            return
        os.waitpid(ended.si_pid, 0)


def _children(pid: int) -> list[int]:
    children = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += [int(child) for child in thread.read_text().split()]
        except OSError:  # the thread has ended
            pass
    return children


def _state(pid: int) -> str | None:
    """As in /proc/PID/stat: "S" sleeping, "Z" zombie, ...; None when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None


def _model_of(pid: int) -> str:
    """A model's process is started as `triton_python_backend_stub .../MODEL/VERSION/model.py ...`."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return _UNKNOWN
    return next((Path(argument).parts[-3] for argument in arguments if argument.endswith("/model.py")), _UNKNOWN)
