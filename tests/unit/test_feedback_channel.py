"""News from postprocessing get to the tensorrt_llm that they are for, and nowhere else."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import feedback_channel
import pytest
from feedback_channel import FeedbackListener, FeedbackSender

SECONDS = 10
HERE = os.getpid()


class Heard:
    """A listener and the news that came."""

    def __init__(self):
        self.news: queue.SimpleQueue = queue.SimpleQueue()
        self.listener = FeedbackListener(
            on_gone=lambda key: self.news.put(("gone", key)),
            on_done=lambda number: self.news.put(("done", number)),
            on_drain=lambda: self.news.put("drain"),
            on_end=lambda: self.news.put("end"),
        )

    def next(self) -> tuple:
        return self.news.get(timeout=SECONDS)


@pytest.fixture
def heard() -> Iterator[Heard]:
    heard = Heard()
    yield heard
    heard.listener.close()


@pytest.fixture
def sender() -> Iterator[FeedbackSender]:
    sender = FeedbackSender()
    yield sender
    sender.close()


@pytest.mark.parametrize("key", [0, 1, 2**48 - 1, 2**48 | 3 << 56])
def test_a_key_arrives(heard: Heard, sender: FeedbackSender, key: int):
    sender.gone(HERE, key)
    assert heard.next() == ("gone", key)


def test_a_number_arrives(heard: Heard, sender: FeedbackSender):
    sender.done(HERE, 2**40)
    assert heard.next() == ("done", 2**40)


def test_the_end_of_the_server_arrives(heard: Heard, sender: FeedbackSender):
    sender.drain(HERE)
    sender.end(HERE)
    assert [heard.next(), heard.next()] == ["drain", "end"]


def test_of_many_numbers_in_a_moment_one_is_told(heard: Heard, sender: FeedbackSender, monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(feedback_channel.time, "monotonic", lambda: now)
    for number in range(1, 11):  # ten in ten milliseconds
        sender.done(HERE, number)
        now += 0.001
    sender.gone(HERE, 0)
    numbers = []
    while (news := heard.next()) != ("gone", 0):
        numbers.append(news[1])
    assert numbers == [1, 6]


@pytest.mark.parametrize(
    "message", [b"gone", b"gone -1", b"gone x", b"other 1", b"drain 1", b"end now", b"\xff\xfe", b"done"]
)
def test_what_is_not_understood_is_ignored(heard: Heard, sender: FeedbackSender, message: bytes):
    sender._send(HERE, message)
    sender.gone(HERE, 1)
    assert heard.next() == ("gone", 1)


def test_a_thousand_news_arrive_in_order(heard: Heard, sender: FeedbackSender):
    for key in range(1000):
        sender.gone(HERE, key)
    assert [heard.next() for _ in range(1000)] == [("gone", key) for key in range(1000)]


def test_without_a_listener_nothing_happens(sender: FeedbackSender):
    sender.gone(HERE, 1)
    sender.done(HERE, 1)


@pytest.mark.parametrize("pid", [0, -1, 2**62])
def test_a_listener_that_cannot_be_is_none(sender: FeedbackSender, pid: int):
    sender.gone(pid, 1)
    sender.done(pid, 1)


def test_after_the_listener_has_closed_nothing_happens(sender: FeedbackSender):
    heard = Heard()
    heard.listener.close()
    sender.gone(HERE, 1)
    assert heard.news.empty()


def test_a_closed_listeners_place_is_free(sender: FeedbackSender):
    Heard().listener.close()
    heard = Heard()
    sender.gone(HERE, 2)
    assert heard.next() == ("gone", 2)
    heard.listener.close()


def test_a_listener_hears_only_its_own(heard: Heard, sender: FeedbackSender):
    sender.gone(HERE + 1, 1)
    sender.gone(HERE, 2)
    assert heard.next() == ("gone", 2)


def test_the_address_names_the_pid_namespace():
    assert str(os.stat("/proc/self/ns/pid").st_ino).encode() in feedback_channel._address(1)


def test_two_models_of_one_server_reach_each_other():
    """As in Triton: two children of one process, each with a Python of its own."""
    header = f"import sys; sys.path.append({str(Path(feedback_channel.__file__).parent)!r}); import feedback_channel\n"
    listening = header + (
        "import threading; done = threading.Event()\n"
        "def on_gone(key): print('gone', key, flush=True); done.set()\n"
        "listener = feedback_channel.FeedbackListener(on_gone=on_gone, on_done=print, on_drain=print, on_end=print)\n"
        "print('listening', flush=True); done.wait(10); listener.close()\n"
    )
    listener = subprocess.Popen([sys.executable, "-c", listening], stdout=subprocess.PIPE, text=True)
    try:
        assert listener.stdout.readline() == "listening\n"
        say = f"feedback_channel.FeedbackSender().gone({listener.pid}, 42)"
        subprocess.run([sys.executable, "-c", header + say], check=True)
        assert listener.communicate(timeout=SECONDS)[0] == "gone 42\n"
        assert listener.returncode == 0
    finally:
        listener.kill()
        listener.wait()
