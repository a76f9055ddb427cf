"""News of clients that have gone get from any model of a server to tensorrt_llm, and nowhere else."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cancel_channel
import pytest
from cancel_channel import CancelListener, CancelSender

SECONDS = 10


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pid of the server that listeners and senders belong to: this process, and not its parent as in Triton."""
    pids = [os.getpid()]
    monkeypatch.setattr(cancel_channel.os, "getppid", lambda: pids[0])
    return pids


class Heard:
    """A listener and the news that came."""

    def __init__(self):
        self.news: queue.SimpleQueue = queue.SimpleQueue()
        self.listener = CancelListener(
            lambda key: self.news.put(("key", key)), lambda request_id: self.news.put(("id", request_id))
        )

    def next(self) -> tuple:
        return self.news.get(timeout=SECONDS)


@pytest.fixture
def heard(server: list[int]) -> Iterator[Heard]:
    heard = Heard()
    yield heard
    heard.listener.close()


@pytest.fixture
def sender(server: list[int]) -> Iterator[CancelSender]:
    sender = CancelSender()
    yield sender
    sender.close()


@pytest.mark.parametrize("key", [0, 1, 2**48 - 1, 2**48 | 3 << 56])
def test_a_key_arrives(heard: Heard, sender: CancelSender, key: int):
    sender.cancel_key(key)
    assert heard.next() == ("key", key)


@pytest.mark.parametrize("request_id", ["a", "infer-0123", "with:colon", "日本", "1", "x" * 4000])
def test_a_request_id_arrives(heard: Heard, sender: CancelSender, request_id: str):
    sender.cancel_request_id(request_id)
    assert heard.next() == ("id", request_id)


def test_an_empty_request_id_is_not_news(heard: Heard, sender: CancelSender):
    sender.cancel_request_id("")
    sender.cancel_key(1)
    assert heard.next() == ("key", 1)


@pytest.mark.parametrize("message", [b"key:", b"key:-1", b"key:x", b"other:1", b"nonsense", b"\xff\xfe"])
def test_what_is_not_understood_is_ignored(heard: Heard, sender: CancelSender, message: bytes):
    sender._send(message)
    sender.cancel_key(1)
    assert heard.next() == ("key", 1)


def test_a_thousand_news_arrive_in_order(heard: Heard, sender: CancelSender):
    for key in range(1000):
        sender.cancel_key(key)
    assert [heard.next() for _ in range(1000)] == [("key", key) for key in range(1000)]


def test_without_a_listener_nothing_happens(sender: CancelSender):
    sender.cancel_key(1)
    sender.cancel_request_id("a")


def test_after_the_listener_has_closed_nothing_happens(server: list[int], sender: CancelSender):
    heard = Heard()
    heard.listener.close()
    sender.cancel_key(1)
    assert heard.news.empty()


def test_a_closed_listeners_place_is_free(server: list[int], sender: CancelSender):
    Heard().listener.close()
    heard = Heard()
    sender.cancel_key(2)
    assert heard.next() == ("key", 2)
    heard.listener.close()


def test_servers_do_not_hear_each_other(heard: Heard, server: list[int]):
    other = CancelSender()
    server[0] = 1
    other.cancel_key(1)
    server[0] = os.getpid()
    other.cancel_key(2)
    assert heard.next() == ("key", 2)
    other.close()


def test_the_address_names_the_pid_namespace():
    assert str(os.stat("/proc/self/ns/pid").st_ino).encode() in cancel_channel._address(1)


def test_two_models_of_one_server_reach_each_other(tmp_path: Path):
    """As in Triton: two children of one process, each with a Python of its own."""
    header = f"import sys; sys.path.append({str(Path(cancel_channel.__file__).parent)!r}); import cancel_channel\n"
    listening = header + (
        "import threading; done = threading.Event()\n"
        "def on_key(key): print('key', key, flush=True); done.set()\n"
        "listener = cancel_channel.CancelListener(on_key, print)\n"
        "print('listening', flush=True); done.wait(10); listener.close()\n"
    )
    listener = subprocess.Popen([sys.executable, "-c", listening], stdout=subprocess.PIPE, text=True)
    try:
        assert listener.stdout.readline() == "listening\n"
        subprocess.run([sys.executable, "-c", header + "cancel_channel.CancelSender().cancel_key(42)"], check=True)
        assert listener.communicate(timeout=SECONDS)[0] == "key 42\n"
        assert listener.returncode == 0
    finally:
        listener.kill()
        listener.wait()
