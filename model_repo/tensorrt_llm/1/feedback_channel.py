"""What `tensorrt_llm` is told past Triton: by `postprocessing`, and by scripts/serve.py.

    gone KEY      postprocessing   nobody waits for this text any more
    done NUMBER   postprocessing   the response of this number has been decoded, and all before it
    drain         serve.py         the server is about to end: let no more requests in
    end           serve.py         no more time: end those that are still in flight

Triton tells none of it. An ensemble's running step never learns that its client has gone (the same code in every
release); the next step does, which here is `postprocessing`. Nothing says how many responses are still on their way
between the two, which `tensorrt_llm` must know to send no more than the machine can take. And at SIGTERM tritonserver
refuses the steps of streams that are in flight (scripts/supervisor.py). A request to `tensorrt_llm` could carry the
news, but it would wait in the queue behind the very requests that hold the slots. So they go through a Unix datagram
socket in Linux' abstract namespace: no file to clean up, and gone with the process.

Its name has the process id of the model that listens, which every response carries in its header: during a reload two
`tensorrt_llm` live side by side.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable

_MAX_MESSAGE_BYTES = 64
# "done" covers all numbers before it, so not each has to be sent: under load this is one in twenty.
_SECONDS_BETWEEN_DONE = 0.005


def _address(listener_pid: int) -> bytes:
    # Containers on the host's network share these names, and each may have a process 20: so the namespace's number.
    return b"\0triton-trtllm/feedback/%d/%d" % (os.stat("/proc/self/ns/pid").st_ino, listener_pid)


class FeedbackListener:
    """Held by `tensorrt_llm`. Calls `on_gone(key)`, `on_done(number)`, `on_drain()`, `on_end()` from its own thread."""

    def __init__(
        self,
        *,
        on_gone: Callable[[int], None],
        on_done: Callable[[int], None],
        on_drain: Callable[[], None],
        on_end: Callable[[], None],
    ):
        self._with_number = {b"gone": on_gone, b"done": on_done}
        self._without = {b"drain": on_drain, b"end": on_end}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(_address(os.getpid()))
        self._thread = threading.Thread(target=self._listen, name="feedback", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while message := self._socket.recv(_MAX_MESSAGE_BYTES):
            kind, _, value = message.partition(b" ")
            if kind in self._with_number and value.isdigit():
                self._with_number[kind](int(value))
            elif message in self._without:
                self._without[message]()

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as waker:
            waker.sendto(b"", _address(os.getpid()))
        self._thread.join()
        self._socket.close()


class FeedbackSender:
    """Held by whoever has news. Never raises: without a listener nobody needs them."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._last_done = 0.0

    def gone(self, listener_pid: int, key: int) -> None:
        self._send(listener_pid, b"gone %d" % key)

    def done(self, listener_pid: int, number: int) -> None:
        now = time.monotonic()
        if now - self._last_done >= _SECONDS_BETWEEN_DONE:
            self._last_done = now
            self._send(listener_pid, b"done %d" % number, may_wait=False)

    def drain(self, listener_pid: int) -> None:
        self._send(listener_pid, b"drain")

    def end(self, listener_pid: int) -> None:
        self._send(listener_pid, b"end")

    def _send(self, listener_pid: int, message: bytes, *, may_wait: bool = True) -> None:
        self._socket.settimeout(1.0 if may_wait else 0.0)  # for a listener that is behind
        try:
            self._socket.sendto(message, _address(listener_pid))
        except OSError:  # no listener, or one that is past help
            pass

    def close(self) -> None:
        self._socket.close()
