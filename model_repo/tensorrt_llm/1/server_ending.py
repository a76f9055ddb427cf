"""An engine that has failed does not come back by itself: the server ends, so that its platform starts a new one."""

from __future__ import annotations

import logging
import os
import signal
import threading

_log = logging.getLogger(__name__)

_TIME_FOR_ERRORS_SECONDS = 0.3  # those of the requests that have failed are on their way to their clients


def end_server(reason: str) -> None:
    """By SIGTERM and SIGKILL.

    SIGTERM alone ends a server with 0, after which some platforms do not start a new one, and on tritonserver 2.51 it
    may hang. SIGKILL alone does not reach process 1 of a container; scripts/serve.py lets tritonserver be another one.
    """
    _log.critical("%s; ending the server", reason)
    for seconds, number in (
        (_TIME_FOR_ERRORS_SECONDS, signal.SIGTERM),
        (_TIME_FOR_ERRORS_SECONDS + 0.1, signal.SIGKILL),
    ):
        timer = threading.Timer(seconds, _signal, (os.getppid(), number))
        timer.daemon = True  # this process may end before, with the server
        timer.start()


def _signal(server_pid: int, number: int) -> None:
    if os.getppid() == server_pid:
        os.kill(server_pid, number)
