"""How `postprocessing` and the `infer` model tell `tensorrt_llm` that nobody waits for a request any more.

Triton does not: an ensemble's running step never learns that its client has gone (the same code in every release),
only the next step does, which here is `postprocessing`. A request to `tensorrt_llm` would carry the news, but it
would wait in the queue behind the very requests that hold the slots. So the news goes past Triton, through a Unix
datagram socket in Linux' abstract namespace: no file to clean up, and gone with the process.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable

_MAX_MESSAGE_BYTES = 4096


def _address(server_pid: int) -> bytes:
    # Every model runs in a child of tritonserver, so the parent's pid names the server that both belong to. Containers
    # on the host's network share these names, and each may have a process 1: the namespace tells them apart.
    return b"\0triton-trtllm/cancel/%d/%d" % (os.stat("/proc/self/ns/pid").st_ino, server_pid)


class CancelListener:
    """Held by `tensorrt_llm`. Calls `on_key(key)` or `on_request_id(request_id)` from its own thread."""

    def __init__(self, on_key: Callable[[int], None], on_request_id: Callable[[str], None]):
        self._on_key, self._on_request_id = on_key, on_request_id
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(_address(os.getppid()))
        self._thread = threading.Thread(target=self._listen, name="cancel", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while message := self._socket.recv(_MAX_MESSAGE_BYTES):
            kind, _, value = message.partition(b":")
            if kind == b"key" and value.isdigit():
                self._on_key(int(value))
            elif kind == b"id" and value:  # without an id there are many requests
                self._on_request_id(value.decode(errors="replace"))

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as waker:
            waker.sendto(b"", _address(os.getppid()))
        self._thread.join()
        self._socket.close()


class CancelSender:
    """Held by whoever sees a client go. Never raises: without a listener there is nothing to free."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(1.0)

    def cancel_key(self, key: int) -> None:
        self._send(b"key:%d" % key)

    def cancel_request_id(self, request_id: str) -> None:
        self._send(b"id:" + request_id.encode())

    def _send(self, message: bytes) -> None:
        try:
            self._socket.sendto(message, _address(os.getppid()))
        except OSError:  # no listener, or one that has not listened for a second and is past help
            pass

    def close(self) -> None:
        self._socket.close()
