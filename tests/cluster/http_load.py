"""A client that knows nothing but HTTP, for tests: streams and whole answers, until SIGTERM. Leaves /tmp/report.json.

    python http_load.py URL MODEL STREAMS WHOLE MIN_TOKENS MAX_TOKENS

It does what docs/operations.md asks of clients. A request that was refused or could not be sent, and of which nothing
has come, is sent again over a new connection. A stream is complete only if its last event has a finish_reason. Every
other client keeps its connection for the next request.
"""

from __future__ import annotations

import http.client
import json
import random
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

TRIES = 20
stopped = threading.Event()
lock = threading.Lock()
counts = {"sent": 0, "ok": 0, "broken": 0, "retries": 0, "gave_up": 0}
examples: dict[str, str] = {}
silences: list[float] = []  # seconds from the last event of a broken stream to when its client knew


class AgainError(Exception):
    """Nothing came of the request: it may be sent again."""


class BrokenError(Exception):
    """A part of the answer came, and no end."""


def count(name: str, example: str = "") -> None:
    with lock:
        counts[name] += 1
        if example:
            examples.setdefault(name, example)


def connect(address: str) -> http.client.HTTPConnection:
    """With keepalive: from a node that has vanished nothing comes, no error either, and a stream would wait for it."""
    connection = http.client.HTTPConnection(address, timeout=5)
    connection.connect()
    connection.sock.settimeout(150)
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
        connection.sock.setsockopt(socket.IPPROTO_TCP, option, 5)
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    # The same for what has been sent and is not acknowledged: keepalive is silent meanwhile.
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 15_000)
    return connection


class Client:
    def __init__(self, url: str, model: str, *, streams: bool, keeps_connection: bool):
        self._address = urlsplit(url).netloc
        self._path = f"/v2/models/{model}/" + ("generate_stream" if streams else "generate")
        self._streams, self._keeps_connection = streams, keeps_connection
        self._connection: http.client.HTTPConnection | None = None

    def run(self, least: int, most: int) -> None:
        while not stopped.is_set():
            count("sent")
            body = {"text_input": "The capital of France is", "max_tokens": random.randint(least, most), "end_id": -1}
            try:
                self._ask(json.dumps(body | {"stream": self._streams}).encode())
                count("ok")
            except BrokenError as error:
                count("broken", str(error))
            except AgainError as error:
                count("gave_up", str(error))

    def _ask(self, body: bytes) -> None:
        for number in range(TRIES):
            try:
                return self._ask_once(body)
            except AgainError as error:
                self._close()
                if number + 1 == TRIES:
                    raise
                count("retries", str(error))
                time.sleep(random.uniform(0.05, 0.1) * 2 ** min(number, 4))
        raise AssertionError

    def _ask_once(self, body: bytes) -> None:
        try:
            if self._connection is None:
                self._connection = connect(self._address)
            self._connection.request("POST", self._path, body, {"Content-Type": "application/json"})
            response = self._connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise AgainError(f"{type(error).__name__}: {error}") from error
        if self._streams:
            self._read_stream(response)
        else:
            try:
                text = response.read().decode()
            except (OSError, http.client.HTTPException) as error:
                raise AgainError(f"{type(error).__name__}: {error}") from error  # greedy: the same answer again
            if response.status != 200:
                raise AgainError(text)
            assert json.loads(text)["finish_reason"] == "length", text
        if not self._keeps_connection:
            self._close()

    def _read_stream(self, response: http.client.HTTPResponse) -> None:
        num_events, last = 0, time.monotonic()
        try:
            while line := response.readline():
                if not line.startswith(b"data:"):
                    continue
                event = json.loads(line[5:])
                if "error" in event:
                    raise (BrokenError if num_events else AgainError)(event["error"])
                num_events, last = num_events + 1, time.monotonic()
                if event["finish_reason"]:
                    response.read()
                    return
        except (OSError, http.client.HTTPException) as error:
            self._broken(num_events, last, f"{type(error).__name__}: {error}")
        self._broken(num_events, last, f"it ends after {num_events} events without a finish_reason")

    def _broken(self, num_events: int, last: float, what: str) -> None:
        self._close()
        if not num_events:
            raise AgainError(what)
        with lock:
            silences.append(round(time.monotonic() - last, 3))
        raise BrokenError(what)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def main() -> None:
    url, model, streams, whole, least, most = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7])
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    threads = []
    for number in range(streams + whole):
        client = Client(url, model, streams=number < streams, keeps_connection=bool(number % 2))
        threads.append(threading.Thread(target=client.run, args=(least, most)))
        threads[-1].start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.5)
    Path("/tmp/report.json").write_text(json.dumps({**counts, "examples": examples, "silences": silences}))


if __name__ == "__main__":
    main()
