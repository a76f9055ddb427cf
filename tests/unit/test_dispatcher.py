"""Every request gets exactly one end, its tokens in order before it, and leaves nothing behind."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import dispatcher as dispatcher_module
import pacing
import pytest
from chunk_header import ChunkHeader
from chunks import Chunk, SequenceChunk
from dispatcher import Dispatcher
from generation import (
    AdmissionRefused,
    EngineError,
    GenerationRequest,
    RequestCancelled,
    RequestError,
    Sampling,
    Step,
)
from measurements import Measurements
from request_reading import Prompt, Request
from scripted_engine import SECONDS, ScriptedEngine
from text_states import TextStates
from tokenizers import Tokenizer
from waiting_room import QueueLimits

KEYS = itertools.count(1)
FAST = 1e9  # responses per second: never a reason to wait


class RecordingResponder:
    """The way back to a client, strict: nothing comes after the final response."""

    def __init__(self, request_id: str = ""):
        self.request_id = request_id
        self.gone = False  # what Triton says of a direct caller
        self.chunks: list[Chunk] = []
        self.error: Exception | None = None
        self.num_finals = 0
        self.broken: list[str] = []
        self.fail_on_send: set[int] = set()  # numbers of the chunks that cannot be sent
        self._num_sends = 0
        self._changed = threading.Condition()

    # ---- dispatcher.Responder

    def send(self, chunk: Chunk, *, final: bool) -> None:
        with self._changed:
            self._note("send")
            self._num_sends += 1
            if self._num_sends - 1 in self.fail_on_send:
                raise OSError("no shared memory left")
            self.chunks.append(chunk)
            self.num_finals += final
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        with self._changed:
            self._note("fail")
            self.error = error
            self.num_finals += 1
            self._changed.notify_all()

    def is_cancelled(self) -> bool:
        self._note("is_cancelled")
        return self.gone

    def _note(self, what: str) -> None:
        if threading.current_thread().name != "dispatcher":
            self.broken.append(f"{what} in the thread {threading.current_thread().name}")
        if self.num_finals:
            self.broken.append(f"{what} after the final response")

    # ---- for the test

    def wait(self) -> RecordingResponder:
        """Until the final response."""
        return self._wait(lambda: self.num_finals > 0, "final response")

    def wait_for_chunks(self, number: int) -> RecordingResponder:
        return self._wait(lambda: len(self.chunks) >= number, f"chunk number {number}")

    def _wait(self, condition: Callable[[], bool], what: str) -> RecordingResponder:
        with self._changed:
            if not self._changed.wait_for(condition, SECONDS):
                raise AssertionError(f"no {what}; {len(self.chunks)} chunks came, error {self.error!r}")
        return self

    def sequences(self, sequence_index: int = 0, batch_index: int = 0) -> list[SequenceChunk]:
        """What came for one sequence of a stream."""
        chunks = [c for c in self.chunks if (c.batch_index, c.sequence_index) == (batch_index, sequence_index)]
        return [chunk.sequences[0] for chunk in chunks]

    def token_ids(self, sequence_index: int = 0, batch_index: int = 0) -> list[int]:
        return [i for sequence in self.sequences(sequence_index, batch_index) for i in sequence.token_ids]

    def finish_reasons(self) -> list[str]:
        return [sequence.finish_reason for chunk in self.chunks for sequence in chunk.sequences]


class WatchedDispatcher(Dispatcher):
    """Calls functions between its events."""

    def settle(self) -> None:
        """Wait until all that was put on the queue so far has been handled and sent."""
        for _ in range(2):  # the second is only looked at after what the first one's round had to send
            handled = threading.Event()
            self._events.put(handled.set)
            assert handled.wait(SECONDS), "the dispatcher's thread hangs or is dead"

    @contextmanager
    def one_round(self) -> Iterator[None]:
        """What is put on the queue inside is handled in one round."""
        waits, go_on = threading.Event(), threading.Event()
        self._events.put(lambda: waits.set() or go_on.wait(SECONDS))
        assert waits.wait(SECONDS), "the dispatcher's thread hangs or is dead"
        yield
        go_on.set()

    def _handle(self, event: Any) -> None:
        if callable(event):
            event()
        else:
            super()._handle(event)


@dataclass
class Bench:
    """A dispatcher between a scripted engine and recording responders."""

    dispatcher: WatchedDispatcher
    engine: ScriptedEngine
    tokenizer: Tokenizer
    fatal: list[EngineError]
    responders: list[RecordingResponder]
    threads: list[threading.Thread]
    measurements: Measurements

    def responder(self, request_id: str = "") -> RecordingResponder:
        self.responders.append(RecordingResponder(request_id))
        return self.responders[-1]

    def submit(self, *prompts: Prompt, request_id: str = "", **request: Any) -> RecordingResponder:
        responder = self.responder(request_id)
        self.dispatcher.submit(_request(prompts, **request), responder)
        return responder

    def submit_in_thread(
        self, *prompts: Prompt, request_id: str = "", **request: Any
    ) -> tuple[RecordingResponder, threading.Thread]:
        responder = self.responder(request_id)
        thread = threading.Thread(target=self.dispatcher.submit, args=(_request(prompts, **request), responder))
        thread.start()
        self.threads.append(thread)
        return responder, thread

    def start(self, prompt: Prompt, **options: Any) -> tuple[RecordingResponder, int]:
        """Submit one prompt with one generation; its responder and engine key."""
        responder = self.submit(prompt, **options)
        return responder, self.engine.next_request().key

    def join(self, thread: threading.Thread) -> None:
        thread.join(SECONDS)
        assert not thread.is_alive(), "submit() does not return"

    def fill(self) -> list[tuple[RecordingResponder, int]]:
        """Take every slot."""
        return [self.start(prompt()) for _ in range(self.dispatcher.max_in_engine)]

    def assert_nothing_left(self) -> None:
        self.dispatcher.settle()
        d = self.dispatcher
        left = {"engine keys": d._by_engine_key, "text keys": d._by_text_key, "exchanges": d._exchanges}
        left |= {"ready": d._ready, "streams": d._pacer.num_streams, "late errors": d._late_errors}
        left |= {"in the engine": d._num_in_engine}
        assert not any(left.values()), left
        assert len(d._room) == 0
        assert self.engine.num_in_flight == 0


@pytest.fixture
def make_bench(byte_level: Tokenizer) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make(
        responses_per_second: float = FAST,
        hang_seconds: float = 1e9,
        queue_limits: QueueLimits | None = None,
        **engine_options: Any,
    ) -> Bench:
        engine, fatal = ScriptedEngine(**engine_options), []
        measurements = Measurements(engine.limits.max_batch_size)
        dispatcher = WatchedDispatcher(
            engine,
            byte_level,
            responses_per_second=responses_per_second,
            hang_seconds=hang_seconds,
            queue_limits=queue_limits,
            measurements=measurements,
            on_fatal=fatal.append,
        )
        benches.append(Bench(dispatcher, engine, byte_level, fatal, [], [], measurements))
        return benches[-1]

    yield make
    for bench in benches:
        bench.dispatcher.close()
        for thread in bench.threads:
            bench.join(thread)
        bench.engine.assert_rules_kept()
        for responder in bench.responders:
            assert responder.num_finals == 1
            assert not responder.broken, responder.broken


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    return make_bench()


def prompt(
    ids: Sequence[int] = (50, 51),
    *,
    n: int = 1,
    beams: int = 0,
    batch_index: int = 0,
    streaming: bool = True,
    stop_words: Sequence[str] = (),
    echo: bool = False,
    keep_special_tokens: bool = False,
    log_probs: bool = False,
) -> Prompt:
    generation = GenerationRequest(
        key=0,
        prompt_ids=list(ids),
        max_tokens=100,
        sampling=Sampling(beam_width=max(1, beams)),
        num_beams_returned=max(1, beams),
        log_probs=log_probs,
    )
    return Prompt(
        batch_index=batch_index,
        generations=[replace(generation, key=next(KEYS)) for _ in range(n)],
        streaming=streaming,
        echo=echo,
        keep_special_tokens=keep_special_tokens,
        stop_words=stop_words,
    )


def _request(prompts: Sequence[Prompt], **fields: Any) -> Request:
    return Request(prompts=prompts, **{"arrival_ns": time.time_ns(), **fields})


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token per letter."""
    return [tokenizer.encode(letter, add_special_tokens=False).ids[0] for letter in text]


both = pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "at once"])


# ---- endings -----------------------------------------------------------------------------------------------------

Ending = Callable[[Bench, RecordingResponder, int], None]


def _finished(bench: Bench, responder: RecordingResponder, key: int) -> None:
    bench.engine.step(key, [7], finish="stop")


def _length(bench: Bench, responder: RecordingResponder, key: int) -> None:
    bench.engine.step(key, [7], finish="length")


def _finished_without_a_token(bench: Bench, responder: RecordingResponder, key: int) -> None:
    bench.engine.step(key, finish="stop")


def _stop_word(bench: Bench, responder: RecordingResponder, key: int) -> None:
    bench.engine.step(key, letters(bench.tokenizer, "xST"))
    bench.engine.step(key, letters(bench.tokenizer, "OPy"))


def _stop_word_at_the_end(bench: Bench, responder: RecordingResponder, key: int) -> None:
    bench.engine.step(key, letters(bench.tokenizer, "STOP"), finish="length")


def _cancelled_by_key(bench: Bench, responder: RecordingResponder, key: int) -> None:
    bench.dispatcher.cancel_key(key)


def _cancelled_by_request_id(bench: Bench, responder: RecordingResponder, key: int) -> None:
    bench.dispatcher.cancel_request_id("mine")


def _gone(bench: Bench, responder: RecordingResponder, key: int) -> None:
    responder.gone = True


def _request_error(bench: Bench, responder: RecordingResponder, key: int) -> None:
    bench.engine.fail_request(key, "no room in the KV cache")


def _unsendable(bench: Bench, responder: RecordingResponder, key: int) -> None:
    responder.fail_on_send = set(range(100))
    bench.engine.step(key, [7], finish="stop")


def _impossible_step(bench: Bench, responder: RecordingResponder, key: int) -> None:
    """An engine that breaks its word, which the scripted one would not."""
    bench.dispatcher._deliver_to(key)(Step([7], beam=5))


def _engine_error(bench: Bench, responder: RecordingResponder, key: int) -> None:
    bench.engine.fail("the GPU fell off the bus")


def _closed(bench: Bench, responder: RecordingResponder, key: int) -> None:
    bench.dispatcher.close()


# What the client hears: a finish reason, or an error of a class with words.
ENDINGS: dict[Ending, str | tuple[type[Exception], str]] = {
    _finished: "stop",
    _length: "length",
    _finished_without_a_token: "stop",
    _stop_word: "stop",
    _stop_word_at_the_end: "stop",
    _cancelled_by_key: (RequestCancelled, "the client cancelled the request"),
    _cancelled_by_request_id: (RequestCancelled, "request 'mine' was stopped"),
    _gone: (RequestCancelled, "the client cancelled the request"),
    _request_error: (RequestError, "no room in the KV cache"),
    _unsendable: (RuntimeError, "the server failed on this request"),
    _impossible_step: (RuntimeError, "the server failed on this request"),
    _engine_error: (EngineError, "the GPU fell off the bus"),
    _closed: (EngineError, "the server is shutting down; send the request again"),
}
endings = pytest.mark.parametrize(
    ("end", "heard"), ENDINGS.items(), ids=[ending.__name__.strip("_") for ending in ENDINGS]
)


def assert_heard(responder: RecordingResponder, heard: str | tuple[type[Exception], str]) -> None:
    if isinstance(heard, str):
        assert responder.error is None
        assert responder.finish_reasons()[-1] == heard
        assert not any(responder.finish_reasons()[:-1])
    else:
        assert type(responder.error) is heard[0]
        assert heard[1] in str(responder.error)
        assert not any(responder.finish_reasons())


@both
@endings
def test_every_ending_is_told_once(bench: Bench, end: Ending, heard: Any, streaming: bool):
    stop_words = ["STOP"] if end in (_stop_word, _stop_word_at_the_end) else []
    responder, key = bench.start(prompt(streaming=streaming, stop_words=stop_words), request_id="mine")
    bench.engine.step(key, [5])
    bench.engine.step(key, [6])
    end(bench, responder, key)
    responder.wait()
    if end is not _closed:
        bench.dispatcher.settle()
    assert_heard(responder, heard)
    assert responder.num_finals == 1


@both
@endings
def test_an_ending_before_the_first_token_is_told_once(bench: Bench, end: Ending, heard: Any, streaming: bool):
    stop_words = ["STOP"] if end in (_stop_word, _stop_word_at_the_end) else []
    responder, key = bench.start(prompt(streaming=streaming, stop_words=stop_words), request_id="mine")
    end(bench, responder, key)
    assert_heard(responder.wait(), heard)


@both
@pytest.mark.parametrize("end", [ending for ending in ENDINGS if ending not in (_engine_error, _closed)])
def test_an_ending_leaves_nothing_behind(bench: Bench, end: Ending, streaming: bool):
    stop_words = ["STOP"] if end in (_stop_word, _stop_word_at_the_end) else []
    others = [bench.start(prompt()) for _ in range(2)]
    responder, key = bench.start(prompt(streaming=streaming, stop_words=stop_words), request_id="mine")
    end(bench, responder, key)
    responder.wait()
    for other, other_key in others:
        bench.engine.step(other_key, [1], finish="stop")
        assert other.wait().error is None
    bench.assert_nothing_left()


@pytest.mark.parametrize("end", [_engine_error, _closed])
def test_the_end_of_everything_leaves_no_state(bench: Bench, end: Ending):
    responders = [bench.start(prompt(streaming=streaming, n=1)) for streaming in (True, False)]
    end(bench, *responders[0])
    for responder, _ in responders:
        assert isinstance(responder.wait().error, EngineError)
    d = bench.dispatcher
    if end is not _closed:
        d.settle()
    assert not any((d._by_engine_key, d._by_text_key, d._exchanges, d._ready, d._pacer.num_streams))


@pytest.mark.parametrize("number", range(3))
def test_a_response_that_cannot_be_sent_ends_its_request_alone(bench: Bench, number: int):
    other, other_key = bench.start(prompt())
    responder, key = bench.start(prompt())
    responder.fail_on_send = {number}
    for token_id in range(3):
        if bench.engine.num_in_flight == 2:
            bench.engine.step(key, [token_id], finish="stop" if token_id == 2 else "")
            bench.dispatcher.settle()
    assert "its log has the reason" in str(responder.wait().error)
    assert len(responder.chunks) == number
    bench.engine.step(other_key, [1], finish="stop")
    assert other.wait().error is None
    bench.assert_nothing_left()


def test_a_sibling_that_is_due_at_the_same_time_does_not_follow_a_failed_one(bench: Bench):
    responder = bench.submit(prompt(n=2))
    keys = [bench.engine.next_request().key for _ in range(2)]
    responder.fail_on_send = {0}
    with bench.dispatcher.one_round():
        for key in keys:
            bench.engine.step(key, [1], finish="stop")
    assert responder.wait().chunks == []
    bench.assert_nothing_left()


# ---- cancellation ------------------------------------------------------------------------------------------------


@both
def test_cancelling_takes_the_request_out_of_the_engine(bench: Bench, streaming: bool):
    responder, key = bench.start(prompt(streaming=streaming))
    bench.dispatcher.cancel_key(key)
    responder.wait()
    assert bench.engine.aborted == [key]


def test_a_finished_request_is_not_aborted(bench: Bench):
    responder, key = bench.start(prompt())
    bench.engine.step(key, [1], finish="stop")
    responder.wait()
    assert bench.engine.aborted == []


def test_a_stop_word_takes_the_request_out_of_the_engine(bench: Bench):
    responder, key = bench.start(prompt(stop_words=["x"]))
    bench.engine.step(key, letters(bench.tokenizer, "x"))
    responder.wait()
    assert bench.engine.aborted == [key]


def test_cancelling_one_request_leaves_the_others_alone(bench: Bench):
    (one, one_key), (two, two_key) = bench.start(prompt(), request_id="a"), bench.start(prompt(), request_id="b")
    bench.dispatcher.cancel_request_id("a")
    assert isinstance(one.wait().error, RequestCancelled)
    bench.engine.step(two_key, [1], finish="stop")
    assert two.wait().error is None
    assert one_key in bench.engine.aborted
    assert two_key not in bench.engine.aborted


def test_cancelling_by_id_ends_all_requests_with_it(bench: Bench):
    responders = [bench.start(prompt(), request_id="same")[0] for _ in range(3)]
    bench.dispatcher.cancel_request_id("same")
    assert all(isinstance(responder.wait().error, RequestCancelled) for responder in responders)


def test_cancelling_what_is_not_there_does_nothing(bench: Bench):
    responder, key = bench.start(prompt(), request_id="mine")
    bench.dispatcher.cancel_key(10**12)
    bench.dispatcher.cancel_request_id("yours")
    bench.engine.step(key, [1], finish="stop")
    assert responder.wait().error is None
    bench.dispatcher.cancel_key(key)
    bench.dispatcher.cancel_request_id("mine")
    bench.assert_nothing_left()


def test_cancelling_one_of_several_sequences_ends_their_request(bench: Bench):
    responder = bench.submit(prompt(n=3))
    keys = [bench.engine.next_request().key for _ in range(3)]
    bench.dispatcher.cancel_key(keys[1])
    assert isinstance(responder.wait().error, RequestCancelled)
    assert sorted(bench.engine.aborted) == keys
    bench.assert_nothing_left()


def test_steps_that_come_after_a_cancellation_are_dropped(bench: Bench):
    responder, key = bench.start(prompt())
    late = bench.dispatcher._deliver_to(key)
    bench.dispatcher.cancel_key(key)
    responder.wait()
    late(Step([1]))
    late(Step([2], finish_reason="stop"))
    late(RequestError("too late"))
    bench.assert_nothing_left()
    assert responder.chunks == []


def test_direct_callers_are_asked_in_turn_however_many_there_are(make_bench: Callable[..., Bench]):
    bench = make_bench(max_batch_size=64)
    started = [bench.start(prompt()) for _ in range(60)]
    started[-1][0].gone = True
    assert isinstance(started[-1][0].wait().error, RequestCancelled)


def test_a_caller_that_cannot_be_asked_is_served(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    asked = threading.Event()

    def is_cancelled(responder: RecordingResponder) -> bool:
        asked.set()
        raise OSError("no shared memory left")

    monkeypatch.setattr(RecordingResponder, "is_cancelled", is_cancelled)
    responder, key = bench.start(prompt())
    assert asked.wait(SECONDS)
    bench.engine.step(key, [1], finish="stop")
    assert responder.wait().error is None


# ---- the engine refuses or fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RequestError("the prompt is too long"), "^the prompt is too long$"),
        (ValueError("a bug"), "^the engine refused the request: a bug$"),
    ],
)
def test_what_the_engine_refuses_fails_alone(bench: Bench, error: Exception, sentence: str):
    other, other_key = bench.start(prompt())
    bench.engine.refuse_next(error)
    responder = bench.submit(prompt()).wait()
    with pytest.raises(RequestError, match=sentence):
        raise responder.error
    bench.engine.step(other_key, [1], finish="stop")
    assert other.wait().error is None
    bench.assert_nothing_left()


@pytest.mark.parametrize("refused", range(3))
@both
def test_one_refused_sequence_fails_the_whole_request(make_bench: Any, refused: int, streaming: bool):
    bench = make_bench(max_batch_size=8)
    bench.engine.refuse_next(RequestError("no room"), after=refused)
    responder = bench.submit(prompt(n=3, streaming=streaming)).wait()
    assert str(responder.error) == "no room"
    bench.assert_nothing_left()


def test_one_failed_sequence_ends_its_siblings(bench: Bench):
    responder = bench.submit(prompt(n=3))
    keys = [bench.engine.next_request().key for _ in range(3)]
    bench.engine.step(keys[0], [1], finish="stop")
    bench.engine.fail_request(keys[1], "no room")
    assert str(responder.wait().error) == "no room"
    assert keys[2] in bench.engine.aborted
    bench.assert_nothing_left()


def test_one_failed_prompt_ends_the_whole_batch(bench: Bench):
    responder = bench.submit(*[prompt(batch_index=index) for index in range(3)])
    keys = [bench.engine.next_request().key for _ in range(3)]
    bench.engine.step(keys[0], [1], finish="stop")
    responder.wait_for_chunks(1)
    bench.engine.fail_request(keys[2], "no room")
    assert str(responder.wait().error) == "no room"
    bench.assert_nothing_left()


def test_a_dead_engine_fails_every_request_and_is_reported_once(bench: Bench):
    responders = [bench.start(prompt(streaming=streaming))[0] for streaming in (True, False, True)]
    bench.engine.fail("the GPU fell off the bus")
    for responder in responders:
        assert str(responder.wait().error) == "the GPU fell off the bus"
    bench.dispatcher.settle()
    assert [str(error) for error in bench.fatal] == ["the GPU fell off the bus"]


def test_all_requests_have_failed_before_a_dead_engine_is_reported(bench: Bench):
    responders = [bench.start(prompt())[0] for _ in range(3)]
    finals = []
    bench.dispatcher._on_fatal = lambda error: finals.append([responder.num_finals for responder in responders])
    bench.engine.fail("the GPU fell off the bus")
    responders[-1].wait()
    bench.dispatcher.settle()
    assert finals == [[1, 1, 1]]


def test_after_a_dead_engine_requests_fail_at_once(bench: Bench):
    bench.start(prompt())
    bench.engine.fail("the GPU fell off the bus")
    bench.dispatcher.settle()
    for _ in range(3 * bench.dispatcher.max_in_engine):
        responder = bench.submit(prompt(n=2), prompt(streaming=False))
        assert str(responder.wait().error) == "the GPU fell off the bus"
    assert not bench.engine.has_request()
    assert len(bench.fatal) == 1


def test_a_request_that_waits_for_a_slot_fails_with_the_engine(bench: Bench):
    bench.fill()
    waiting, thread = bench.submit_in_thread(prompt())
    bench.dispatcher.settle()
    bench.engine.fail("the GPU fell off the bus")
    assert str(waiting.wait().error) == "the GPU fell off the bus"
    bench.join(thread)


def test_a_request_that_waits_for_a_slot_fails_at_the_close(bench: Bench):
    bench.fill()
    waiting, thread = bench.submit_in_thread(prompt())
    bench.dispatcher.settle()
    bench.dispatcher.close()
    assert "shutting down" in str(waiting.wait().error)
    bench.join(thread)


def test_closing_an_idle_dispatcher_ends_its_thread(bench: Bench):
    bench.dispatcher.close()
    assert not bench.dispatcher._thread.is_alive()
    assert bench.fatal == []


# ---- slots -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_batch_size", "slots"), [(1, 2), (4, 5), (8, 9), (16, 18), (64, 72)])
def test_there_are_a_few_more_slots_than_the_engine_runs(make_bench: Any, max_batch_size: int, slots: int):
    assert make_bench(max_batch_size=max_batch_size).dispatcher.max_in_engine == slots


def test_submit_blocks_while_all_slots_are_taken_and_goes_on_when_one_is_free(bench: Bench):
    running = bench.fill()
    waiting, thread = bench.submit_in_thread(prompt())
    bench.dispatcher.settle()
    assert thread.is_alive()
    assert not bench.engine.has_request()
    bench.engine.step(running[0][1], [1], finish="stop")
    key = bench.engine.next_request().key
    bench.join(thread)
    for other in [key, *(key for _, key in running[1:])]:
        bench.engine.step(other, [1], finish="length")
    assert waiting.wait().error is None
    assert bench.engine.most_in_flight == bench.dispatcher.max_in_engine
    bench.dispatcher.settle()
    bench.assert_nothing_left()


@pytest.mark.parametrize("end", [_cancelled_by_key, _gone, _request_error, _length, _unsendable])
def test_every_ending_frees_its_slot(bench: Bench, end: Ending):
    running = bench.fill()
    waiting, thread = bench.submit_in_thread(prompt())
    end(bench, *running[0])
    key = bench.engine.next_request().key
    bench.join(thread)
    for other in [key, *(key for _, key in running[1:])]:
        bench.engine.step(other, [1], finish="stop")
    waiting.wait()
    bench.assert_nothing_left()


def test_a_stop_word_frees_its_slot(bench: Bench):
    running = [bench.start(prompt(stop_words=["x"])) for _ in range(bench.dispatcher.max_in_engine)]
    _, thread = bench.submit_in_thread(prompt())
    bench.engine.step(running[0][1], letters(bench.tokenizer, "x"))
    bench.join(thread)


def test_more_sequences_than_slots_take_turns(bench: Bench):
    number = 3 * bench.dispatcher.max_in_engine
    responder, thread = bench.submit_in_thread(prompt(n=number, streaming=False))
    for index in range(number):
        bench.engine.step(bench.engine.next_request().key, [index], finish="stop")
    (chunk,) = responder.wait().chunks
    assert [sequence.token_ids for sequence in chunk.sequences] == [[index] for index in range(number)]
    bench.join(thread)
    assert bench.engine.most_in_flight <= bench.dispatcher.max_in_engine
    bench.assert_nothing_left()


def test_cancelling_a_request_that_waits_for_a_slot_ends_it_at_once(bench: Bench):
    running = bench.fill()
    waiting, thread = bench.submit_in_thread(prompt(n=3), request_id="mine")
    bench.dispatcher.settle()
    bench.dispatcher.cancel_request_id("mine")
    assert isinstance(waiting.wait().error, RequestCancelled)
    for _, key in running:
        bench.engine.step(key, [1], finish="stop")
    bench.join(thread)
    assert not bench.engine.has_request()
    bench.assert_nothing_left()


def test_a_hurry_of_callers_and_cancellations_ends_in_order(make_bench: Any):
    """Four callers, an engine and somebody who cancels, all at once: each request ends once, every slot comes back."""
    bench = make_bench(max_batch_size=3)
    number, stop = 150, threading.Event()
    chance = random.Random(1)

    def run_engine() -> None:
        mine = random.Random(2)
        while not stop.is_set() or bench.engine.num_in_flight:
            with bench.engine._changed:
                bench.engine._changed.wait_for(lambda: bench.engine._in_flight or stop.is_set(), SECONDS)
                keys = list(bench.engine._in_flight)
            for key in keys:
                try:
                    what = mine.random()
                    if what < 0.1:
                        bench.engine.fail_request(key, "no room")
                    else:
                        bench.engine.step(key, [1, 2], finish="stop" if what < 0.5 else "")
                except AssertionError:  # it was aborted meanwhile
                    pass

    def call(caller: int) -> None:
        mine = random.Random(caller)
        for index in range(number):
            prompts = [
                prompt(n=mine.randint(1, 3), streaming=mine.random() < 0.5, batch_index=row)
                for row in range(mine.randint(1, 2))
            ]
            bench.submit(*prompts, request_id=f"{caller}-{index}")
            if mine.random() < 0.3:
                bench.dispatcher.cancel_request_id(f"{caller}-{index}")

    def cancel() -> None:
        while not stop.is_set():
            bench.dispatcher.cancel_request_id(f"{chance.randrange(4)}-{chance.randrange(number)}")
            bench.dispatcher.cancel_key(chance.randrange(next(KEYS)))
            stop.wait(0.0005)

    engine, canceller = threading.Thread(target=run_engine), threading.Thread(target=cancel)
    callers = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in (engine, canceller, *callers):
        thread.start()
    for thread in callers:
        bench.join(thread)
    for responder in bench.responders:
        responder.wait()
    stop.set()
    with bench.engine._changed:
        bench.engine._changed.notify_all()
    bench.join(engine)
    bench.join(canceller)
    assert len(bench.responders) == 4 * number
    assert {type(responder.error) for responder in bench.responders} <= {type(None), RequestError, RequestCancelled}
    assert bench.engine.most_in_flight <= bench.dispatcher.max_in_engine
    bench.assert_nothing_left()


# ---- who waits ---------------------------------------------------------------------------------------------------


def running_and_waiting(bench: Bench, *priorities: int) -> tuple[list[int], list[RecordingResponder]]:
    """A full engine, by its keys, and a request that waits for each priority."""
    keys = [bench.start(prompt())[1] for _ in range(bench.dispatcher.max_in_engine)]
    return keys, [bench.submit(prompt([100 + p]), priority=p) for p in priorities]


def finish(bench: Bench, *keys: int) -> None:
    for key in keys:
        bench.engine.step(key, [1], finish="stop")
    bench.dispatcher.settle()


def finish_all(bench: Bench) -> list[int]:
    """Ends whatever comes into the engine; the prompts in the order in which they came."""
    prompts = []
    while bench.engine.num_in_flight or bench.engine.has_request():
        request = bench.engine.next_request()
        prompts.append(request.prompt_ids[0])
        finish(bench, request.key)
    return prompts


def test_without_limits_the_caller_is_kept_until_its_request_is_in(bench: Bench):
    """So that Triton hands over no other."""
    running = bench.fill()
    _, thread = bench.submit_in_thread(prompt())
    thread.join(0.2)
    assert thread.is_alive()
    finish(bench, running[0][1])
    bench.join(thread)
    finish(bench, *(key for _, key in running[1:]), bench.engine.next_request().key)


def test_with_limits_no_caller_is_kept(make_bench: Any):
    bench = make_bench(queue_limits=QueueLimits(max_size=100))
    keys, waiting = running_and_waiting(bench, *[0] * 20)
    assert not any(responder.num_finals for responder in waiting)
    finish(bench, *keys)
    assert finish_all(bench) == [100] * 20
    bench.assert_nothing_left()


def test_whoever_came_first_goes_first_unless_another_has_priority(make_bench: Any):
    bench = make_bench(queue_limits=QueueLimits())
    keys, _ = running_and_waiting(bench, 2, 3, 1, 2, 1, 3)
    finish(bench, *keys)
    assert finish_all(bench) == [101, 101, 102, 102, 103, 103]
    bench.assert_nothing_left()


def test_a_request_with_several_sequences_is_not_overtaken_half_way(make_bench: Any):
    bench = make_bench(queue_limits=QueueLimits(), max_batch_size=1)
    keys, _ = running_and_waiting(bench)
    bench.submit(prompt([200], n=3, streaming=False))
    bench.submit(prompt([300]))
    finish(bench, *keys)
    assert finish_all(bench) == [200, 200, 200, 300]


def test_beyond_the_limit_requests_are_refused_at_once_and_may_come_again(make_bench: Any):
    bench = make_bench(queue_limits=QueueLimits(max_size=3))
    keys, waiting = running_and_waiting(bench, *[0] * 5)
    for refused in waiting[3:]:
        error = refused.wait().error
        assert isinstance(error, AdmissionRefused)
        assert "the server is busy: 3 requests wait" in str(error)
    finish(bench, keys[0])
    bench.engine.next_request()  # one that waited is in
    again = bench.submit(prompt([7]))
    assert again.num_finals == 0
    taken = bench.measurements.take()
    assert (taken.refusals, taken.ended["refused"]) == ({"queue_full": 2}, 2)


def test_a_burst_that_the_engine_has_room_for_is_not_refused(make_bench: Any):
    bench = make_bench(queue_limits=QueueLimits(max_size=1), max_batch_size=16)
    with bench.dispatcher.one_round():
        burst = [bench.submit(prompt()) for _ in range(bench.dispatcher.max_in_engine + 1)]
    bench.dispatcher.settle()
    assert not any(responder.error for responder in burst)


def test_a_request_that_has_waited_too_long_is_refused(make_bench: Any):
    bench = make_bench(queue_limits=QueueLimits(timeout_seconds=0.3))
    keys, waiting = running_and_waiting(bench, 0, 0)
    for responder in waiting:
        assert "the request has waited 0.3 s" in str(responder.wait().error)
    assert bench.measurements.take().refusals == {"queue_timeout": 2}
    finish(bench, *keys)
    bench.dispatcher.settle()
    bench.assert_nothing_left()


def test_a_request_that_is_in_the_engine_has_not_waited_too_long(make_bench: Any):
    bench = make_bench(queue_limits=QueueLimits(timeout_seconds=0.2), max_batch_size=1)
    responder = bench.submit(prompt(n=4, streaming=False))  # more than there are slots
    time.sleep(0.5)
    bench.dispatcher.settle()
    assert responder.num_finals == 0
    finish_all(bench)
    assert responder.wait().error is None


def test_a_request_that_is_cancelled_while_it_waits_makes_room(make_bench: Any):
    bench = make_bench(queue_limits=QueueLimits(max_size=1))
    running_and_waiting(bench)
    cancelled = bench.submit(prompt(), request_id="mine")
    bench.dispatcher.cancel_request_id("mine")
    cancelled.wait()
    assert bench.submit(prompt()).num_finals == 0
    bench.dispatcher.settle()
    assert bench.responders[-1].error is None


def test_when_the_engine_fails_whoever_waits_is_told(make_bench: Any):
    bench = make_bench(queue_limits=QueueLimits())
    _, waiting = running_and_waiting(bench, 0, 0)
    bench.engine.fail("the GPU fell off the bus")
    for responder in waiting:
        assert str(responder.wait().error) == "the GPU fell off the bus"


def test_time_that_is_waited_is_counted(make_bench: Any):
    bench = make_bench(queue_limits=QueueLimits(), max_batch_size=8)
    running_and_waiting(bench, 0, 0, 0)
    bench.dispatcher.settle()
    bench.measurements.take()
    started = time.monotonic()
    time.sleep(0.2)
    taken, elapsed = bench.measurements.take(), time.monotonic() - started
    assert taken.waiting_seconds == pytest.approx(4 * elapsed, rel=0.1)  # three, and one beyond the slots of the engine
    assert taken.compute_seconds == pytest.approx(8 * elapsed, rel=0.1)


# ---- what comes --------------------------------------------------------------------------------------------------


def test_tokens_come_in_order(bench: Bench):
    responder, key = bench.start(prompt())
    for token_id in range(500):
        bench.engine.step(key, [2 * token_id, 2 * token_id + 1], finish="length" if token_id == 499 else "")
    assert responder.wait().token_ids() == list(range(1000))


def test_steps_of_other_requests_do_not_mix_in(bench: Bench):
    started = [bench.start(prompt()) for _ in range(4)]
    for step in range(50):
        for index, (_, key) in enumerate(started):
            bench.engine.step(key, [1000 * index + step], finish="stop" if step == 49 else "")
    for index, (responder, _) in enumerate(started):
        assert responder.wait().token_ids() == [1000 * index + step for step in range(50)]


def test_a_request_that_does_not_stream_gets_one_response(bench: Bench):
    responder, key = bench.start(prompt(streaming=False))
    for token_id in range(10):
        bench.engine.step(key, [token_id])
    bench.dispatcher.settle()
    assert responder.chunks == []
    bench.engine.step(key, [10], finish="stop")
    (chunk,) = responder.wait().chunks
    assert chunk.sequences[0].token_ids == list(range(11))
    assert chunk.sequences[0].num_output_tokens == 11
    assert chunk.num_input_tokens == 2


def test_a_stream_ends_with_its_finish_reason_even_without_a_token(bench: Bench):
    responder, key = bench.start(prompt())
    bench.engine.step(key, [1])
    responder.wait_for_chunks(1)
    bench.engine.step(key, finish="length")
    responder.wait()
    assert [sequence.token_ids for sequence in responder.sequences()] == [[1], []]
    assert responder.finish_reasons() == ["", "length"]


def test_the_first_and_the_last_chunk_of_a_text_say_so(bench: Bench):
    responder, key = bench.start(prompt(range(50, 70), keep_special_tokens=True))
    for token_id in range(3):
        bench.engine.step(key, [token_id], finish="stop" if token_id == 2 else "")
        responder.wait_for_chunks(token_id + 1)
    headers = [sequence.header for sequence in responder.sequences()]
    assert [header.is_first for header in headers] == [True, False, False]
    assert [header.is_last for header in headers] == [False, False, True]
    assert {header.key for header in headers} == {key}
    assert [list(header.context) for header in headers] == [list(range(62, 70)), [], []]
    assert all(header.keep_special_tokens for header in headers)


def test_times_are_in_order(bench: Bench):
    responder, key = bench.start(prompt())
    bench.engine.step(key, [1])
    responder.wait_for_chunks(1)
    bench.engine.step(key, [2], finish="stop")
    first, last = responder.wait().chunks
    assert 0 < first.times_ns[0] <= first.times_ns[1] <= first.times_ns[2] <= first.times_ns[3]
    assert last.times_ns[:3] == first.times_ns[:3]
    assert last.times_ns[3] >= first.times_ns[3]


def test_without_a_token_there_are_no_token_times(bench: Bench):
    responder, key = bench.start(prompt())
    bench.engine.step(key, finish="stop")
    assert responder.wait().chunks[0].times_ns[2:] == (0, 0)


@both
def test_the_prompt_comes_back_once_and_first(bench: Bench, streaming: bool):
    responder, key = bench.start(prompt([50, 51, 52], echo=True, streaming=streaming))
    for token_id in (1, 2):
        bench.engine.step(key, [token_id])
    bench.engine.step(key, [3], finish="stop")
    responder.wait()
    assert responder.token_ids() == [50, 51, 52, 1, 2, 3]
    assert sum(sequence.num_output_tokens for sequence in responder.sequences()) == 3
    assert list(responder.sequences()[0].header.context) == []


def test_every_sequence_comes_with_the_prompt(bench: Bench):
    responder = bench.submit(prompt([50, 51], n=2, echo=True, streaming=False))
    for index in range(2):
        bench.engine.step(bench.engine.next_request().key, [index], finish="stop")
    (chunk,) = responder.wait().chunks
    assert [sequence.token_ids for sequence in chunk.sequences] == [[50, 51, 0], [50, 51, 1]]


def test_a_batch_that_streams_is_told_apart_by_batch_index(bench: Bench):
    responder = bench.submit(*[prompt([50 + index], batch_index=index) for index in range(3)])
    keys = [bench.engine.next_request().key for _ in range(3)]
    for step in range(5):
        for index in (2, 0, 1):
            bench.engine.step(keys[index], [10 * index + step], finish="stop" if step == 4 else "")
    responder.wait()
    for index in range(3):
        assert responder.token_ids(batch_index=index) == [10 * index + step for step in range(5)]


def test_a_batch_that_does_not_stream_gets_one_response_per_prompt(bench: Bench):
    responder = bench.submit(*[prompt(batch_index=index, streaming=False) for index in range(3)])
    keys = [bench.engine.next_request().key for _ in range(3)]
    for index in (1, 2, 0):
        bench.engine.step(keys[index], [index], finish="stop")
        responder.wait_for_chunks([1, 2, 0].index(index) + 1)
    assert [chunk.batch_index for chunk in responder.wait().chunks] == [1, 2, 0]


def test_prompts_of_a_batch_may_differ_in_streaming(bench: Bench):
    responder = bench.submit(prompt(batch_index=0), prompt(batch_index=1, streaming=False))
    keys = [bench.engine.next_request().key for _ in range(2)]
    for step in range(3):
        for key in keys:
            bench.engine.step(key, [step], finish="stop" if step == 2 else "")
        bench.dispatcher.settle()
    responder.wait()
    assert [sequence.token_ids for sequence in responder.sequences(batch_index=0)] == [[0], [1], [2]]
    assert [sequence.token_ids for sequence in responder.sequences(batch_index=1)] == [[0, 1, 2]]
    bench.assert_nothing_left()


def test_sequences_of_a_stream_are_told_apart_by_sequence_index(bench: Bench):
    responder = bench.submit(prompt(n=3))
    keys = [bench.engine.next_request().key for _ in range(3)]
    for step in range(5):
        for index in (2, 0, 1):
            if step <= index + 2:  # they end one after the other
                bench.engine.step(keys[index], [10 * index + step], finish="stop" if step == index + 2 else "")
        bench.dispatcher.settle()
    responder.wait()
    for index in range(3):
        assert responder.token_ids(index) == [10 * index + step for step in range(index + 3)]
        assert {sequence.header.key for sequence in responder.sequences(index)} == {keys[index]}
    assert responder.finish_reasons().count("stop") == 3
    bench.assert_nothing_left()


def test_sequences_that_do_not_stream_come_together_in_order(bench: Bench):
    responder = bench.submit(prompt(n=3, streaming=False))
    keys = [bench.engine.next_request().key for _ in range(3)]
    for index in (1, 2, 0):
        bench.engine.step(keys[index], [index], finish="length")
    (chunk,) = responder.wait().chunks
    assert [sequence.token_ids for sequence in chunk.sequences] == [[0], [1], [2]]
    assert [sequence.header.key for sequence in chunk.sequences] == keys


# ---- beams -------------------------------------------------------------------------------------------------------


def test_beams_come_together_in_the_engines_order(bench: Bench):
    responder, key = bench.start(prompt(beams=3, streaming=False))
    for beam in range(3):
        bench.engine.step(key, [10 * beam, 10 * beam + 1], finish="stop", beam=beam)
    (chunk,) = responder.wait().chunks
    assert [sequence.token_ids for sequence in chunk.sequences] == [[0, 1], [10, 11], [20, 21]]
    bench.assert_nothing_left()


def test_beams_of_one_request_have_different_texts(bench: Bench):
    responder, key = bench.start(prompt(beams=3, streaming=False))
    for beam in range(3):
        bench.engine.step(key, [1], finish="stop", beam=beam)
    (chunk,) = responder.wait().chunks
    assert len({sequence.header.key for sequence in chunk.sequences}) == 3


def test_a_beam_that_ended_before_the_others_waits_for_them(bench: Bench):
    responder, key = bench.start(prompt(beams=2, streaming=False))
    bench.engine.step(key, [1], finish="stop", beam=1)
    bench.dispatcher.settle()
    assert responder.chunks == []
    bench.engine.step(key, [2], finish="length", beam=0)
    (chunk,) = responder.wait().chunks
    assert [sequence.finish_reason for sequence in chunk.sequences] == ["length", "stop"]
    assert bench.engine.aborted == []


@pytest.mark.parametrize("other", ["stop", "stop word"])
def test_beams_that_stop_words_ended_leave_nothing_in_the_engine(bench: Bench, other: str):
    responder, key = bench.start(prompt(beams=2, streaming=False, stop_words=["x"]))
    bench.engine.step(key, letters(bench.tokenizer, "ax"), beam=0)
    bench.engine.step(key, letters(bench.tokenizer, "b"), beam=1)
    if other == "stop":
        bench.engine.step(key, letters(bench.tokenizer, "c"), beam=1, finish="length")
    else:
        bench.engine.step(key, letters(bench.tokenizer, "x"), beam=1)
    responder.wait()
    assert bench.engine.aborted == [key]
    bench.assert_nothing_left()


def test_cancelling_any_beam_ends_the_request(bench: Bench):
    for beam in range(3):
        responder, key = bench.start(prompt(beams=3, streaming=False))
        bench.dispatcher.cancel_key(key | beam << 56)
        assert isinstance(responder.wait().error, RequestCancelled)
        assert bench.engine.aborted[-1] == key
    bench.assert_nothing_left()


# ---- stop words and log probabilities ----------------------------------------------------------------------------


@both
def test_log_probabilities_stay_with_their_tokens(bench: Bench, streaming: bool):
    responder, key = bench.start(prompt(log_probs=True, streaming=streaming))
    for step in range(5):
        bench.engine.step(key, [step, step + 100], log_probs=[-float(step), -float(step + 100)])
    bench.engine.step(key, [5], log_probs=[-5.0], finish="stop")
    for sequence in responder.wait().sequences():
        assert sequence.log_probs == [-float(token_id) for token_id in sequence.token_ids]


@both
@pytest.mark.parametrize("text", ["aSTbSTOxSTOP!", "STOP", "xSTO", "STSTOP", "abcSTOPdef"])
def test_log_probabilities_stay_with_tokens_that_are_held(bench: Bench, text: str, streaming: bool):
    ids = letters(bench.tokenizer, text)
    log_probs = {token_id: -float(token_id) for token_id in ids}
    responder, key = bench.start(prompt(log_probs=True, stop_words=["STOP"], streaming=streaming))
    for start in range(0, len(ids), 2):
        if bench.engine.num_in_flight:
            part = ids[start : start + 2]
            is_last = start + 2 >= len(ids)
            bench.engine.step(key, part, log_probs=[log_probs[i] for i in part], finish="length" if is_last else "")
            bench.dispatcher.settle()
    total = 0.0
    for sequence in responder.wait().sequences():
        assert sequence.log_probs == [log_probs[token_id] for token_id in sequence.token_ids]
        total += sum(sequence.log_probs)
        assert sequence.cumulative_log_prob == pytest.approx(total)


def test_without_log_probabilities_there_are_none(bench: Bench):
    responder, key = bench.start(prompt())
    bench.engine.step(key, [1, 2], finish="stop")
    (sequence,) = responder.wait().sequences()
    assert (list(sequence.log_probs), sequence.cumulative_log_prob) == ([], 0.0)


def test_tokens_that_may_begin_a_stop_word_are_not_sent(bench: Bench):
    responder, key = bench.start(prompt(stop_words=["STOP"]))
    bench.engine.step(key, letters(bench.tokenizer, "aST"))
    responder.wait_for_chunks(1)
    bench.dispatcher.settle()
    assert responder.token_ids() == letters(bench.tokenizer, "a")
    bench.engine.step(key, letters(bench.tokenizer, "x"))
    responder.wait_for_chunks(2)
    assert responder.token_ids() == letters(bench.tokenizer, "aSTx")
    bench.engine.step(key, letters(bench.tokenizer, "STO"), finish="length")
    assert responder.wait().token_ids() == letters(bench.tokenizer, "aSTxSTO")
    assert responder.finish_reasons()[-1] == "length"


def test_a_stop_word_of_a_special_token_stops_though_its_text_is_left_out(bench: Bench):
    user = bench.tokenizer.token_to_id("<|user|>")
    responder, key = bench.start(prompt(stop_words=["<|user|>"]))
    bench.engine.step(key, [*letters(bench.tokenizer, "a"), user, *letters(bench.tokenizer, "b")])
    assert responder.wait().token_ids() == [*letters(bench.tokenizer, "a"), user]
    assert responder.finish_reasons() == ["stop"]
    assert responder.sequences()[-1].header.trim_characters == 0


def test_a_stop_word_of_a_special_token_is_cut_where_its_text_is_kept(bench: Bench):
    user = bench.tokenizer.token_to_id("<|user|>")
    responder, key = bench.start(prompt(stop_words=["<|user|>"], keep_special_tokens=True))
    bench.engine.step(key, [*letters(bench.tokenizer, "a"), user])
    assert responder.wait().sequences()[-1].header.trim_characters == len("<|user|>")


# ---- time limits -------------------------------------------------------------------------------------------------


@both
def test_a_request_that_may_not_take_longer_ends_with_what_it_has(bench: Bench, streaming: bool):
    responder, key = bench.start(prompt(streaming=streaming), timeout_seconds=0.3)
    bench.engine.step(key, [1, 2])
    assert responder.wait().token_ids() == [1, 2]
    assert responder.finish_reasons()[-1] == "timeout"
    assert key in bench.engine.aborted
    bench.assert_nothing_left()


def test_time_counts_from_the_arrival(bench: Bench):
    arrived = time.time_ns() - 5_000_000_000
    responder = bench.submit(prompt(), timeout_seconds=1.0, arrival_ns=arrived)
    assert responder.wait().finish_reasons() == ["timeout"]
    bench.assert_nothing_left()


def test_a_request_whose_time_is_over_while_it_waits_for_a_slot_takes_none(bench: Bench):
    running = bench.fill()
    waiting, thread = bench.submit_in_thread(prompt(n=2), timeout_seconds=0.05)
    assert waiting.wait().finish_reasons() == ["timeout", "timeout"]
    for _, key in running:
        bench.engine.step(key, [1], finish="stop")
    bench.join(thread)
    assert not bench.engine.has_request()
    bench.assert_nothing_left()


def test_tokens_held_for_a_stop_word_come_when_time_is_over(bench: Bench):
    responder, key = bench.start(prompt(stop_words=["STOP"]), timeout_seconds=0.2)
    bench.engine.step(key, letters(bench.tokenizer, "aST"))
    assert responder.wait().token_ids() == letters(bench.tokenizer, "aST")
    assert responder.finish_reasons()[-1] == "timeout"


def test_a_request_in_time_is_left_alone(bench: Bench):
    responder, key = bench.start(prompt(), timeout_seconds=1e6)
    bench.engine.step(key, [1], finish="stop")
    assert responder.wait().finish_reasons() == ["stop"]


# ---- an engine that says nothing ---------------------------------------------------------------------------------


def test_an_engine_that_hangs_fails_everybody_and_is_reported_once(make_bench: Any):
    bench = make_bench(hang_seconds=0.3)
    responders = [bench.start(prompt(streaming=streaming))[0] for streaming in (True, False)]
    for responder in responders:
        assert "the engine has 2 requests and has said nothing for 0.3 s" in str(responder.wait().error)
    bench.dispatcher.settle()
    assert len(bench.fatal) == 1


def test_an_engine_that_works_slowly_does_not_hang(make_bench: Any):
    bench = make_bench(hang_seconds=0.5)
    responder, key = bench.start(prompt())
    bench.start(prompt())  # gets nothing meanwhile: its turn has not come
    for token_id in range(8):
        time.sleep(0.1)
        bench.engine.step(key, [token_id])
    assert not bench.fatal
    assert responder.num_finals == 0


def test_an_idle_engine_does_not_hang(make_bench: Any):
    bench = make_bench(hang_seconds=0.2)
    time.sleep(0.5)
    responder, key = bench.start(prompt())
    bench.engine.step(key, [1], finish="stop")
    assert responder.wait().error is None
    time.sleep(0.5)
    bench.dispatcher.settle()
    assert not bench.fatal


# ---- what is on its way to postprocessing ------------------------------------------------------------------------


def test_responses_of_an_ensemble_are_numbered_and_others_not(bench: Bench):
    through, key = bench.start(prompt(), from_ensemble=True)
    direct, direct_key = bench.start(prompt())
    for token_id in range(3):
        bench.engine.step(key, [token_id])
        through.wait_for_chunks(token_id + 1)
    bench.engine.step(direct_key, [1], finish="stop")
    direct.wait()
    assert [sequence.header.number for sequence in through.sequences()] == [1, 2, 3]
    assert {sequence.header.listener_pid for sequence in through.sequences()} == {os.getpid()}
    assert [sequence.header.number for sequence in direct.sequences()] == [0]


def test_an_error_waits_until_the_text_before_it_is_decoded(bench: Bench):
    responder, key = bench.start(prompt(), from_ensemble=True)
    bench.engine.step(key, [1])
    responder.wait_for_chunks(1)
    started = time.monotonic()
    bench.engine.fail_request(key, "no room")
    bench.dispatcher.settle()
    assert responder.error is None
    bench.dispatcher.done(1)
    assert str(responder.wait().error) == "no room"
    assert time.monotonic() - started < dispatcher_module._ERROR_WAITS_SECONDS
    bench.assert_nothing_left()


def test_an_error_does_not_wait_for_ever(bench: Bench):
    responder, key = bench.start(prompt(), from_ensemble=True)
    bench.engine.step(key, [1])
    responder.wait_for_chunks(1)
    bench.engine.fail("the GPU fell off the bus")
    assert str(responder.wait().error) == "the GPU fell off the bus"
    bench.dispatcher.settle()
    assert len(bench.fatal) == 1


def test_the_end_of_the_engine_is_reported_after_the_last_error_is_out(bench: Bench):
    responder, key = bench.start(prompt(), from_ensemble=True)
    bench.engine.step(key, [1])
    responder.wait_for_chunks(1)
    bench.engine.fail("the GPU fell off the bus")
    bench.dispatcher.settle()
    assert (responder.num_finals, bench.fatal) == (0, [])
    bench.dispatcher.done(1)
    responder.wait()
    bench.dispatcher.settle()
    assert len(bench.fatal) == 1


def test_a_cancelled_request_waits_for_nothing(bench: Bench):
    responder, key = bench.start(prompt(), from_ensemble=True)
    bench.engine.step(key, [1])
    responder.wait_for_chunks(1)
    bench.dispatcher.cancel_key(key)
    bench.dispatcher.settle()
    assert isinstance(responder.error, RequestCancelled)


def test_no_more_responses_go_out_than_are_decoded(make_bench: Any):
    bench = make_bench(max_batch_size=200)
    started = [bench.start(prompt(), from_ensemble=True) for _ in range(200)]
    for _, key in started:
        bench.engine.step(key, [1])
    bench.dispatcher.settle()
    assert sum(len(responder.chunks) for responder, _ in started) == pacing._MAX_UNDECODED
    bench.dispatcher.done(pacing._MAX_UNDECODED)
    bench.dispatcher.settle()
    assert sum(len(responder.chunks) for responder, _ in started) == 2 * pacing._MAX_UNDECODED
    for number in range(3, 5):
        bench.dispatcher.done(number * pacing._MAX_UNDECODED)
        bench.dispatcher.done((number - 1) * pacing._MAX_UNDECODED)
        bench.dispatcher.settle()
    assert [len(responder.chunks) for responder, _ in started] == [1] * 200
    for responder, key in started:
        bench.dispatcher.cancel_key(key)
        responder.wait()


def test_a_direct_stream_does_not_wait_for_postprocessing(make_bench: Any):
    bench = make_bench(max_batch_size=200)
    through = [bench.start(prompt(), from_ensemble=True) for _ in range(pacing._MAX_UNDECODED + 5)]
    for _, key in through:
        bench.engine.step(key, [1])
    bench.dispatcher.settle()
    direct, key = bench.start(prompt())
    bench.engine.step(key, [1], finish="stop")
    assert direct.wait().token_ids() == [1]
    for responder, key in through:
        bench.dispatcher.cancel_key(key)
        responder.wait()


def test_only_direct_callers_are_asked_whether_they_are_still_there(bench: Bench):
    through, key = bench.start(prompt(), from_ensemble=True)
    direct, _ = bench.start(prompt())
    through.gone = direct.gone = True
    assert isinstance(direct.wait().error, RequestCancelled)
    bench.engine.step(key, [1], finish="stop")
    assert through.wait().token_ids() == [1]


# ---- counting ----------------------------------------------------------------------------------------------------


def test_what_happened_is_counted(bench: Bench):
    finished, key = bench.start(prompt([50, 51, 52]), from_ensemble=True)
    bench.engine.step(key, [1])
    bench.engine.step(key, [2, 3], finish="length")
    finished.wait()
    _, key = bench.start(prompt())
    bench.dispatcher.cancel_key(key)
    failed, key = bench.start(prompt())
    bench.engine.fail_request(key, "no room")
    failed.wait()
    bench.dispatcher.settle()
    taken = bench.measurements.take()
    assert taken.ended == {"length": 1, "cancelled": 1, "invalid": 1}
    assert (taken.prompt_tokens, taken.generated_tokens, sum(taken.inter_token_counts)) == (3 + 2 + 2, 3, 2)
    assert (taken.input_lengths, taken.output_lengths) == ([3, 2, 2], [3, 0, 0])
    assert [len(values) for values in (taken.queue_seconds, taken.first_token_seconds)] == [3, 1]
    assert taken.compute_seconds > 0


def test_an_engine_that_fails_is_counted_for_everybody(bench: Bench):
    for _ in range(3):
        bench.start(prompt())
    bench.engine.fail("gone")
    for responder in bench.responders:
        responder.wait()
    bench.dispatcher.settle()
    assert bench.measurements.take().ended == {"failed": 3}


def test_nothing_is_in_the_engine_when_all_is_over(bench: Bench):
    started = [bench.start(prompt()) for _ in range(3)]
    for responder, key in started:
        bench.engine.step(key, [1], finish="stop")
        responder.wait()
    bench.dispatcher.settle()
    bench.measurements.take()
    time.sleep(0.05)
    assert bench.measurements.take().compute_seconds == 0.0


def test_the_engine_is_told_how_long_it_may_keep_tokens(make_bench: Any):
    bench = make_bench(responses_per_second=100)
    started = [bench.start(prompt()) for _ in range(3)]
    bench.start(prompt(streaming=False))
    for responder, key in started:
        bench.dispatcher.cancel_key(key)
        responder.wait()
    bench.dispatcher.settle()
    assert bench.engine.paces == pytest.approx([0.0, 0.01, 0.02, 0.01, 0.0])


def test_whoever_unloads_can_wait_until_all_is_over(bench: Bench):
    assert bench.dispatcher.wait_until_idle(SECONDS)
    responder, key = bench.start(prompt())
    assert not bench.dispatcher.wait_until_idle(0.1)
    bench.engine.step(key, [1], finish="stop")
    assert bench.dispatcher.wait_until_idle(SECONDS)
    assert responder.num_finals == 1


# ---- pacing ------------------------------------------------------------------------------------------------------


class Clock:
    """In place of the module `time`: monotonic seconds that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(dispatcher_module, "time", clock)
    return clock


def test_with_one_stream_each_step_is_a_response(bench: Bench):
    responder, key = bench.start(prompt())
    for step in range(20):
        bench.engine.step(key, [step])
        responder.wait_for_chunks(step + 1)
    bench.engine.step(key, finish="stop")
    assert [sequence.token_ids for sequence in responder.wait().sequences()] == [[i] for i in range(20)] + [[]]


def test_the_first_token_and_the_end_never_wait(clock: Clock, make_bench: Any):
    bench = make_bench(responses_per_second=0.001)
    bench.start(prompt())
    responder, key = bench.start(prompt())
    bench.engine.step(key, [0])
    responder.wait_for_chunks(1)
    for token_id in range(1, 50):
        bench.engine.step(key, [token_id])
    bench.dispatcher.settle()
    assert len(responder.chunks) == 1
    bench.engine.step(key, [50], finish="stop")
    assert [len(sequence.token_ids) for sequence in responder.wait().sequences()] == [1, 50]
    assert responder.token_ids() == list(range(51))


@pytest.mark.parametrize("num_streams", [1, 10, 50])
def test_responses_per_second_are_bounded_however_many_streams_there_are(
    clock: Clock, make_bench: Any, num_streams: int
):
    bench = make_bench(responses_per_second=20, max_batch_size=64)
    started = [bench.start(prompt()) for _ in range(num_streams)]
    for tick in range(100):  # ten seconds
        for _, key in started:
            bench.engine.step(key, [tick])
        bench.dispatcher.settle()
        clock.now += 0.1
    sent = [len(responder.chunks) for responder, _ in started]
    # At 20 a second, or for each stream as often as its reader is promised.
    assert sum(sent) <= 10 * max(20, num_streams / pacing.MAX_SECONDS) + num_streams
    assert max(sent) - min(sent) <= 1
    assert min(sent) >= 1
    for responder, key in started:
        bench.engine.step(key, [100], finish="stop")
        assert responder.wait().token_ids() == list(range(101))


def test_fewer_streams_are_sent_more_often(clock: Clock, make_bench: Any):
    bench = make_bench(responses_per_second=200, max_batch_size=64)
    started = [bench.start(prompt()) for _ in range(20)]

    def num_responses(seconds: int) -> int:
        before = len(started[0][0].chunks)
        for tick in range(100 * seconds):
            bench.engine.step(started[0][1], [tick])
            bench.dispatcher.settle()
            clock.now += 0.01
        return len(started[0][0].chunks) - before

    slow = num_responses(2)
    for responder, key in started[1:]:
        bench.dispatcher.cancel_key(key)
        responder.wait()
    assert slow <= 2 * 200 / 19 + 1
    assert num_responses(2) >= 190  # the last wait of the slow time may last a tenth of a second more


def test_requests_that_do_not_stream_slow_nobody_down(clock: Clock, make_bench: Any):
    bench = make_bench(responses_per_second=10, max_batch_size=64)
    for _ in range(30):
        bench.start(prompt(streaming=False))
    responder, key = bench.start(prompt())
    for step in range(10):
        bench.engine.step(key, [step])
        bench.dispatcher.settle()
        clock.now += 0.11
    assert len(responder.chunks) == 10


def test_tokens_that_waited_are_sent_when_their_time_comes(make_bench: Any):
    bench = make_bench(responses_per_second=50)  # by the real clock: 20 ms
    bench.start(prompt())
    responder, key = bench.start(prompt())
    bench.engine.step(key, [1])
    responder.wait_for_chunks(1)
    bench.engine.step(key, [2])
    assert responder.wait_for_chunks(2).token_ids() == [1, 2]


# ---- all of it together ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("echo", [False, True])
@both
def test_the_text_at_the_other_end_is_right_whatever_the_tokens_and_stop_words(
    bench: Bench, streaming: bool, echo: bool
):
    """Random text and stop words through dispatcher and postprocessing, against plain search."""
    chance, states = random.Random(5), TextStates(bench.tokenizer)
    encode = lambda text: bench.tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    for _ in range(300):
        alphabet = chance.choice(["ab", "aé\n", "中日a", "😀a"])
        question, answer = ("".join(chance.choices(alphabet, k=chance.randint(1, 15))) for _ in range(2))
        words = ["".join(chance.choices(alphabet, k=chance.randint(2, 4))) for _ in range(chance.randint(0, 2))]
        ends = [(answer.find(word) + len(word), answer.find(word)) for word in words if word in answer]
        expected = answer[: min(ends)[1]] if ends else answer
        ids = [token_id for character in answer for token_id in encode(character)]
        log_probs = [-float(position) for position in range(len(ids))]
        responder, key = bench.start(
            prompt(encode(question), streaming=streaming, echo=echo, stop_words=words, log_probs=True)
        )
        position = 0
        while position < len(ids) and not responder.num_finals:
            end = position + chance.randint(1, 4)
            try:
                bench.engine.step(
                    key,
                    ids[position:end],
                    log_probs=log_probs[position:end],
                    finish="stop" if end >= len(ids) else "",
                )
            except AssertionError:  # a stop word was there, and the request is aborted
                assert ends
                break
            position = end
            if chance.random() < 0.5:
                bench.dispatcher.settle()
        text, shown_log_probs = "", []
        for sequence in responder.wait().sequences():
            text += states.text_of(ChunkHeader.from_row(sequence.header.to_row()), sequence.token_ids)
            shown_log_probs += sequence.log_probs
        assert text == (question if echo else "") + expected, (question, answer, words)
        assert shown_log_probs == log_probs[: len(shown_log_probs)]
        assert len(shown_log_probs) == sum(sequence.num_output_tokens for sequence in responder.sequences())
        assert responder.finish_reasons()[-1] == "stop"
    assert len(states) == 0
    bench.assert_nothing_left()
