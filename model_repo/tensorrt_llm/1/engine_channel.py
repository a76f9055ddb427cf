"""How the `infer` model reaches the engine that lives in `tensorrt_llm`'s process: a Unix socket between the two.

Triton's own way, a BLS request to a model that streams, is not to be used from several threads: with 20 requests at
the same time tritonserver 2.51 hung or ended with SIGSEGV (docs/decisions.md). Messages are pickled tuples; the
socket is in Linux' abstract namespace and accepts only children of the same server with the same user.

    infer -> tensorrt_llm   ("ask", number, tensors, timeout), ("cancel", number), ("over", number)
    tensorrt_llm -> infer   ("admitted", number), ("chunk", number, Chunk, final), ("failed", number, error),
                            ("closing",)

During a reload of `tensorrt_llm` two of them live side by side. The newer one takes over the address with
("hand over",); the older one says ("closing",) and finishes what it was asked.
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
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import numpy as np
from chunks import Chunk
from generation import EngineError

_log = logging.getLogger(__name__)

_HAND_OVER_SECONDS = 10.0  # a `tensorrt_llm` that is alive hands over its address at once
_NO_ENGINE = "the engine is not there; the model tensorrt_llm has ended"

Serve = Callable[[dict[str, np.ndarray], int, "_SocketResponder"], None]


def _address() -> bytes:
    # Containers on the host's network share these names, and each may have a process 1: the namespace tells them apart.
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

    `serve(tensors, timeout, responder)` begins one request and blocks while the engine is full; `cancel(request_id)`
    ends one.
    """

    def __init__(self, serve: Serve, cancel: Callable[[str], None]):
        self._serve, self._cancel = serve, cancel
        self._lock = threading.Lock()  # for the next two
        self._sessions: set[_Session] = set()
        self._is_accepting = True
        self._socket = _listening_socket()
        threading.Thread(target=self._accept, name="engine-channel", daemon=True).start()

    def stop_accepting(self) -> None:
        """Whoever asks from now on asks somebody else; what was asked goes on."""
        with self._lock:
            if not self._is_accepting:
                return
            self._is_accepting = False
            sessions = list(self._sessions)
        self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept(); a mere close() would not
        self._socket.close()
        for session in sessions:
            session.send(("closing",))

    def close(self) -> None:
        self.stop_accepting()
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.close()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:  # closed
                return
            if not _is_sibling(peer):
                _log.warning("a process that is no model of this server asked for the engine")
                peer.close()
                continue
            with self._lock:
                self._sessions.add(_Session(peer, self))

    def serve(self, tensors: dict[str, np.ndarray], timeout: int, responder: _SocketResponder) -> None:
        self._serve(tensors, timeout, responder)

    def cancel(self, request_id: str) -> None:
        self._cancel(request_id)

    def forget(self, session: _Session) -> None:
        with self._lock:
            self._sessions.discard(session)


def _listening_socket() -> socket.socket:
    """Bound to our address, also where an older `tensorrt_llm` still has it."""
    listening = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + _HAND_OVER_SECONDS
    while True:
        try:
            listening.bind(_address())
            listening.listen()
            return listening
        except OSError:
            if time.monotonic() > deadline:
                raise
        try:
            with socket.socket(socket.AF_UNIX) as older:
                older.connect(_address())
                Connection(os.dup(older.fileno())).send(("hand over",))
        except OSError:  # it has just gone
            pass
        time.sleep(0.02)


class _Session:
    """One connected client, with a thread for each thing that may have to wait: messages, slots, a slow reader."""

    def __init__(self, peer: socket.socket, listener: EngineListener):
        self._socket = peer
        self._connection = Connection(os.dup(peer.fileno()))
        self._listener = listener
        self._asked: queue.SimpleQueue = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()
        for target in (self._read, self._admit, self._write):
            threading.Thread(target=target, name=f"engine{target.__name__}", daemon=True).start()

    def send(self, message: tuple) -> None:
        """Never blocks."""
        self._outbox.put(message)

    def close(self) -> None:
        """When what is to be sent has been sent."""
        self._outbox.put(None)

    def _read(self) -> None:
        responders: dict[int, _SocketResponder] = {}
        try:
            while True:
                match self._connection.recv():
                    case ("ask", number, tensors, timeout):
                        responders[number] = _SocketResponder(number, self.send)
                        self._asked.put((number, tensors, timeout, responders[number]))
                    case ("over", number):
                        responders.pop(number, None)
                    case ("cancel", number):
                        if responder := responders.pop(number, None):
                            self._listener.cancel(responder.request_id)
                    case ("hand over",):
                        self._listener.stop_accepting()
        except (EOFError, OSError):  # the client's process has ended, and with it whoever waits for its answers
            for responder in responders.values():
                self._listener.cancel(responder.request_id)
            self._asked.put(None)
            self.close()
            self._listener.forget(self)

    def _admit(self) -> None:
        while asked := self._asked.get():
            number, tensors, timeout, responder = asked
            self._listener.serve(tensors, timeout, responder)
            self.send(("admitted", number))

    def _write(self) -> None:
        while message := self._outbox.get():
            try:
                self._connection.send(message)
            except OSError:  # the reader knows
                return
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the reader
        except OSError:  # the client was first
            pass
        self._socket.close()


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
        self._lock = threading.Lock()
        self._link: _Link | None = None

    def ask(self, tensors: dict[str, np.ndarray], timeout: int, answers: Answers) -> Asked:
        """Begin a request, and wait until the engine has taken it or failed it. `timeout` in microseconds, 0 for none.

        Raises EngineError where there is no engine.
        """
        with self._lock:
            if self._link is None or self._link.is_closing:
                self._link = _Link()
            asked = self._link.ask(tensors, timeout, answers)
        asked.wait_until_admitted()
        return asked

    def close(self) -> None:
        if self._link is not None:
            self._link.close()


class Asked:
    """A request that was asked for."""

    def __init__(self, link: _Link, number: int, answers: Answers):
        self._link, self._number = link, number
        self.answers = answers
        self._admitted = threading.Event()

    def cancel(self) -> None:
        self._link.tell(("cancel", self._number))

    def admitted(self) -> None:
        self._admitted.set()

    def wait_until_admitted(self) -> None:
        self._admitted.wait()


class _Link:
    """One connection to one `tensorrt_llm`. Raises EngineError if there is none to connect to."""

    def __init__(self) -> None:
        self.is_closing = False  # ask elsewhere; answers still come
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # for the next two, and for sending
        self._asked: dict[int, Asked] = {}
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(_address())
        except OSError:
            raise EngineError(_NO_ENGINE) from None
        self._connection = Connection(os.dup(self._socket.fileno()))
        threading.Thread(target=self._read, name="engine-channel", daemon=True).start()

    def ask(self, tensors: dict[str, np.ndarray], timeout: int, answers: Answers) -> Asked:
        asked = Asked(self, number := next(self._numbers), answers)
        with self._lock:
            try:
                self._asked[number] = asked
                self._connection.send(("ask", number, tensors, timeout))
            except OSError:
                self._asked.pop(number, None)
                self.is_closing = True
                raise EngineError(_NO_ENGINE) from None
        return asked

    def tell(self, message: tuple) -> None:
        with self._lock:
            try:
                self._connection.send(message)
            except OSError:  # the engine is gone, and with it what this is about
                pass

    def close(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the reader; a mere close() would not
        except OSError:  # the other end was first
            pass

    def _read(self) -> None:
        try:
            while True:
                self._take(self._connection.recv())
        except Exception as error:
            if not isinstance(error, (EOFError, OSError)):
                _log.exception("the engine sent what cannot be read")
                self.close()
            self.is_closing = True
            with self._lock:
                left, self._asked = self._asked, {}
                self._connection.close()
            for asked in left.values():
                asked.admitted()
                self._call(asked.answers.fail, EngineError("the engine has ended; send the request again"))

    def _take(self, message: tuple) -> None:
        match message:
            case ("admitted", number):
                if asked := self._asked.get(number):
                    asked.admitted()
            case ("chunk", number, chunk, final):
                asked = self._over(number) if final else self._asked[number]
                self._call(asked.answers.send, chunk, final=final)
            case ("failed", number, error):
                self._call(self._over(number).answers.fail, error)
            case ("closing",):
                self.is_closing = True

    def _over(self, number: int) -> Asked:
        self.tell(("over", number))
        asked = self._asked.pop(number)
        asked.admitted()  # its own message may come later than a short answer
        return asked

    @staticmethod
    def _call(method: Callable[..., None], *arguments: object, **keywords: object) -> None:
        """One answer that cannot be given must not end the thread that brings everybody's."""
        try:
            method(*arguments, **keywords)
        except Exception:
            _log.exception("an answer could not be given")
