"""How the `infer` model reaches the engine that lives in `tensorrt_llm`'s process: a Unix socket between the two.

Triton's own way, a BLS request to a model that streams, is not to be used from several threads: with 20 requests at
the same time tritonserver 2.51 hung or ended with SIGSEGV (docs/decisions.md). Messages are pickled tuples; the
socket is in Linux' abstract namespace and accepts only children of the same server with the same user.

    infer -> tensorrt_llm   ("ask", number, tensors), ("cancel", number)
    tensorrt_llm -> infer   ("admitted", number), ("chunk", number, Chunk, final), ("failed", number, error)
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import numpy as np
from chunks import Chunk
from generation import EngineError

_log = logging.getLogger(__name__)


def _address() -> bytes:
    # See cancel_channel.py for what the two numbers tell apart.
    return b"\0triton-trtllm/engine/%d/%d" % (os.stat("/proc/self/ns/pid").st_ino, os.getppid())


class Answers(Protocol):
    """Where the answer of one request goes. Called by the client's reader thread; `fail` ends it, `final` too."""

    def send(self, chunk: Chunk, *, final: bool) -> None: ...

    def fail(self, error: Exception) -> None: ...


# ---- the far end, in tensorrt_llm ----------------------------------------------------------------------------------


class _SocketResponder:
    """`dispatcher.Responder` for a request that came through the channel. Never blocks: a thread writes the socket."""

    def __init__(self, number: int, send: Callable[[tuple], None]):
        self._number, self._send = number, send
        self.request_id = f"infer-{number}-{secrets.token_hex(8)}"  # one that no client's request has

    def send(self, chunk: Chunk, *, final: bool) -> None:
        self._send(("chunk", self._number, chunk, final))

    def fail(self, error: Exception) -> None:
        self._send(("failed", self._number, error))

    def is_cancelled(self) -> bool:
        return False  # the channel says so by itself


class EngineListener:
    """Held by `tensorrt_llm`.

    `serve(tensors, responder)` begins one request and blocks while the engine is full; `cancel(request_id)` ends one.
    """

    def __init__(self, serve: Callable[[dict[str, np.ndarray], _SocketResponder], None], cancel: Callable[[str], None]):
        self._serve, self._cancel = serve, cancel
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(_address())
        self._socket.listen()
        threading.Thread(target=self._accept, name="engine-channel", daemon=True).start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept(); a mere close() would not
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:  # closed
                return
            if _is_sibling(peer):
                _Session(peer, self._serve, self._cancel)
            else:
                _log.warning("a process that is no model of this server asked for the engine")
                peer.close()


class _Session:
    """One connected client, with a thread for each thing that may have to wait: messages, slots, a slow reader."""

    def __init__(
        self,
        peer: socket.socket,
        serve: Callable[[dict[str, np.ndarray], _SocketResponder], None],
        cancel: Callable[[str], None],
    ):
        self._connection = Connection(peer.detach())
        self._serve, self._cancel = serve, cancel
        self._asked: queue.SimpleQueue = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()
        for target in (self._read, self._admit, self._write):
            threading.Thread(target=target, name=f"engine{target.__name__}", daemon=True).start()

    def _read(self) -> None:
        responders: dict[int, _SocketResponder] = {}
        try:
            while True:
                match self._connection.recv():
                    case ("ask", number, tensors):
                        responders[number] = _SocketResponder(number, self._outbox.put)
                        self._asked.put((number, tensors, responders[number]))
                    case ("over", number):
                        responders.pop(number, None)
                    case ("cancel", number):
                        if responder := responders.pop(number, None):
                            self._cancel(responder.request_id)
        except (EOFError, OSError):  # the client's process has ended, and with it whoever waits for its answers
            for responder in responders.values():
                self._cancel(responder.request_id)
            self._asked.put(None)
            self._outbox.put(None)

    def _admit(self) -> None:
        while asked := self._asked.get():
            number, tensors, responder = asked
            self._serve(tensors, responder)
            self._outbox.put(("admitted", number))

    def _write(self) -> None:
        while message := self._outbox.get():
            try:
                self._connection.send(message)
            except OSError:  # the reader knows
                return


def _is_sibling(peer: socket.socket) -> bool:
    """Same user, and a child of the same tritonserver: what it sends is unpickled, which trusts it with everything."""
    pid, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return uid == os.getuid() and f"\nPPid:\t{os.getppid()}\n" in status


# ---- the near end, in infer ----------------------------------------------------------------------------------------


class EngineClient:
    """Asks the engine. Connects when it is first needed, since models load in any order."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._answers: dict[int, Answers] = {}
        self._admitted: dict[int, threading.Event] = {}

    def ask(self, tensors: dict[str, np.ndarray], answers: Answers) -> int:
        """Begin a request and wait until the engine has taken it, or failed it. Returns its number, for `cancel`."""
        number, admitted = next(self._numbers), threading.Event()
        with self._lock:
            self._answers[number], self._admitted[number] = answers, admitted
            try:
                self._connect()
                self._connection.send(("ask", number, tensors))
            except OSError:
                del self._answers[number], self._admitted[number]
                raise EngineError("the engine is not there; the model tensorrt_llm has ended") from None
        admitted.wait()
        return number

    def cancel(self, number: int) -> None:
        self._tell(("cancel", number))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _tell(self, message: tuple) -> None:
        with self._lock:
            try:
                if self._connection is not None:
                    self._connection.send(message)
            except OSError:
                pass

    def _connect(self) -> None:
        if self._connection is None:
            peer = socket.socket(socket.AF_UNIX)
            peer.connect(_address())
            self._connection = Connection(peer.detach())
            threading.Thread(target=self._read, args=(self._connection,), name="engine-channel", daemon=True).start()

    def _read(self, connection: Connection) -> None:
        try:
            while True:
                match connection.recv():
                    case ("admitted", number):
                        self._admit(number)
                    case ("chunk", number, chunk, final):
                        if final:
                            self._tell(("over", number))
                        answers = self._answers.pop(number) if final else self._answers[number]
                        self._call(answers.send, chunk, final=final)
                    case ("failed", number, error):
                        self._tell(("over", number))
                        self._call(self._answers.pop(number).fail, error)
        except (EOFError, OSError):
            with self._lock:
                self._connection = None
                answers, self._answers = self._answers, {}
                waiting, self._admitted = self._admitted, {}
            for event in waiting.values():
                event.set()
            for each in answers.values():
                self._call(each.fail, EngineError("the engine has ended; send the request again"))

    @staticmethod
    def _call(method: Callable[..., None], *arguments: object, **keywords: object) -> None:
        """One answer that cannot be given must not end the thread that brings everybody's."""
        try:
            method(*arguments, **keywords)
        except Exception:
            _log.exception("an answer could not be given")

    def _admit(self, number: int) -> None:
        if event := self._admitted.pop(number, None):
            event.set()
