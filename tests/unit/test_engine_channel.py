"""Requests get from `infer` to whichever `tensorrt_llm` is the newest, and each is answered once."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import engine_channel
import numpy as np
import pytest
from chunks import Chunk
from engine_channel import EngineClient, EngineListener
from generation import AdmissionRefused, EngineError, RequestError

SECONDS = 10
TENSORS = {"input_ids": np.array([[5, 6]], np.int32)}


def chunk(index: int = 0) -> Chunk:
    return Chunk(batch_index=index, sequence_index=0, num_input_tokens=2, sequences=[], times_ns=(0, 0, 0, 0))


class FakeEngine:
    """In place of the dispatcher: hands every request to the test, and may keep `serve` waiting."""

    def __init__(self) -> None:
        self.asked: queue.SimpleQueue = queue.SimpleQueue()
        self.cancelled: queue.SimpleQueue = queue.SimpleQueue()
        self.has_room = threading.Event()
        self.has_room.set()
        self.listener = EngineListener(self._serve, self.cancelled.put)

    def _serve(self, tensors: Any, timeout: int, responder: Any) -> None:
        self.asked.put((tensors, timeout, responder))
        assert self.has_room.wait(SECONDS)

    def next(self) -> Any:
        return self.asked.get(timeout=SECONDS)[2]


class Answers:
    def __init__(self) -> None:
        self.came: queue.SimpleQueue = queue.SimpleQueue()

    def send(self, chunk: Chunk, *, final: bool) -> None:
        self.came.put((chunk, final))

    def fail(self, error: Exception) -> None:
        self.came.put(error)

    def next(self) -> Any:
        return self.came.get(timeout=SECONDS)


@pytest.fixture(autouse=True)
def all_are_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends are this process, and not two children of one server."""
    monkeypatch.setattr(engine_channel, "_is_sibling", lambda peer: True)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.has_room.set()
    engine.listener.close()


@pytest.fixture
def client() -> Iterator[EngineClient]:
    client = EngineClient()
    yield client
    client.close()


def ask(client: EngineClient, timeout: int = 0) -> tuple[Any, Answers]:
    answers = Answers()
    return client.ask(TENSORS, timeout, answers), answers


def test_a_request_gets_its_chunks_in_order(engine: FakeEngine, client: EngineClient):
    _, answers = ask(client, timeout=7)
    tensors, timeout, responder = engine.asked.get(timeout=SECONDS)
    assert timeout == 7
    assert (tensors["input_ids"] == TENSORS["input_ids"]).all()
    responder.send(chunk(0), final=False)
    responder.send(chunk(1), final=True)
    assert [answers.next(), answers.next()] == [(chunk(0), False), (chunk(1), True)]


def test_an_error_arrives_as_what_it_is(engine: FakeEngine, client: EngineClient):
    _, answers = ask(client)
    engine.next().fail(RequestError("top_k is -1"))
    error = answers.next()
    assert (type(error), str(error)) == (RequestError, "top_k is -1")


def test_a_refusal_arrives_with_its_reason(engine: FakeEngine, client: EngineClient):
    _, answers = ask(client)
    engine.next().fail(AdmissionRefused("queue_full", "the server is busy"))
    error = answers.next()
    assert (type(error), error.reason, str(error)) == (AdmissionRefused, "queue_full", "the server is busy")


class Unreadable(Exception):
    """Pickled as a call with one argument, and takes two."""

    def __init__(self, one: int, two: int):
        super().__init__(one)


def test_an_answer_that_cannot_be_read_leaves_nobody_waiting(engine: FakeEngine, client: EngineClient):
    _, other = ask(client)
    engine.next()
    _, answers = ask(client)
    engine.next().fail(Unreadable(1, 2))
    assert isinstance(answers.next(), EngineError)
    assert isinstance(other.next(), EngineError)
    _, answers = ask(client)
    engine.next().send(chunk(), final=True)
    assert answers.next() == (chunk(), True)


def test_asking_waits_while_the_engine_is_full(engine: FakeEngine, client: EngineClient):
    engine.has_room.clear()
    thread = threading.Thread(target=ask, args=(client,))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    engine.has_room.set()
    thread.join(SECONDS)
    assert not thread.is_alive()


def test_cancelling_names_the_request(engine: FakeEngine, client: EngineClient):
    asked, _ = ask(client)
    responder = engine.next()
    asked.cancel()
    assert engine.cancelled.get(timeout=SECONDS) == responder.request_id


def test_without_an_engine_there_is_a_sentence(client: EngineClient):
    with pytest.raises(EngineError, match="the engine is not there"):
        ask(client)


def test_an_engine_that_comes_later_is_found(client: EngineClient):
    with pytest.raises(EngineError):
        ask(client)
    engine = FakeEngine()
    _, answers = ask(client)
    engine.next().send(chunk(), final=True)
    assert answers.next() == (chunk(), True)
    engine.listener.close()


def test_when_the_engine_goes_whoever_waits_is_told(engine: FakeEngine, client: EngineClient):
    engine.has_room.clear()
    answers = Answers()
    thread = threading.Thread(target=client.ask, args=(TENSORS, 0, answers))
    thread.start()
    engine.next()
    engine.listener.close()
    assert isinstance(answers.next(), EngineError)
    thread.join(SECONDS)
    assert not thread.is_alive()


def test_when_the_client_goes_its_requests_are_cancelled(engine: FakeEngine, client: EngineClient):
    ask(client)
    responder = engine.next()
    client.close()
    assert engine.cancelled.get(timeout=SECONDS) == responder.request_id


# ---- two of them, while one is loaded anew -------------------------------------------------------------------------


def test_the_newer_engine_takes_over_and_the_older_one_finishes(engine: FakeEngine, client: EngineClient):
    _, old_answers = ask(client)
    old_responder = engine.next()
    newer = FakeEngine()
    deadline = time.monotonic() + SECONDS
    while not client._link.is_closing and time.monotonic() < deadline:
        time.sleep(0.01)
    _, new_answers = ask(client)
    newer.next().send(chunk(1), final=True)
    assert new_answers.next() == (chunk(1), True)
    assert engine.asked.empty()
    old_responder.send(chunk(2), final=True)
    assert old_answers.next() == (chunk(2), True)
    engine.listener.close()
    _, answers = ask(client)
    newer.next().send(chunk(3), final=True)
    assert answers.next() == (chunk(3), True)
    newer.listener.close()


def test_what_is_left_when_the_older_one_goes_fails_and_the_rest_does_not(engine: FakeEngine, client: EngineClient):
    _, old_answers = ask(client)
    engine.next()
    newer = FakeEngine()
    deadline = time.monotonic() + SECONDS
    while not client._link.is_closing and time.monotonic() < deadline:
        time.sleep(0.01)
    _, new_answers = ask(client)
    engine.listener.close()
    assert isinstance(old_answers.next(), EngineError)
    newer.next().send(chunk(1), final=True)
    assert new_answers.next() == (chunk(1), True)
    newer.listener.close()
