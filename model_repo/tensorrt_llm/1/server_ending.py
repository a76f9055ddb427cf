"""The server and its models end together.

An engine that has failed does not come back by itself: the server ends, so that its platform starts a new one. And a
server that was killed must leave nothing behind: an engine keeps the memory of a GPU.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from pathlib import Path

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
_TIME_TO_END_SECONDS = 1.0  # in an orderly way, where that works
_TIME_FOR_ERRORS_SECONDS = 0.3  # those of the requests that have failed are on their way to their clients


def end_server(reason: str) -> None:
    """By SIGTERM and SIGKILL.

    SIGTERM alone ends a server with 0, after which some platforms do not start a new one, and on tritonserver 2.51 it
    may hang. SIGKILL alone does not reach process 1 of a container; scripts/serve.py lets tritonserver be another one.
    """
    _log.critical("%s; ending the server", reason)
    leave_message(reason)
    for seconds, number in (
        (_TIME_FOR_ERRORS_SECONDS, signal.SIGTERM),
        (_TIME_FOR_ERRORS_SECONDS + 0.1, signal.SIGKILL),
    ):
        timer = threading.Timer(seconds, _signal, (os.getppid(), number))
        timer.daemon = True  # this process may end before, with the server
        timer.start()


def leave_message(sentence: str) -> None:
    """Why the server ends, or does not start, for the status of its Pod: Kubernetes reads this file afterwards."""
    if path := os.environ.get("TERMINATION_MESSAGE_PATH"):
        with contextlib.suppress(OSError):
            Path(path).write_text(sentence)


def _signal(server_pid: int, number: int) -> None:
    if os.getppid() == server_pid:
        os.kill(server_pid, number)


def end_with_server() -> None:
    """From now on this process does not outlive its tritonserver.

    Triton's stub looks after that itself, but not while it waits for the server to take a response (2.51).
    """
    threading.Thread(target=_watch_server, args=(os.getppid(),), name="server-watch", daemon=True).start()


def _watch_server(server_pid: int) -> None:
    while os.getppid() == server_pid:
        time.sleep(_LOOK_SECONDS)
    time.sleep(_TIME_TO_END_SECONDS)
    os._exit(1)
