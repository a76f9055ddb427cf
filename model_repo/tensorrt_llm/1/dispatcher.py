"""Between Triton's requests and the engine: admission, stop words, paced responses, cancellation, endings.

One thread, the dispatcher's, owns all state of the requests in flight. Everybody else only puts events on its
queue, so there is no lock to hold wrongly:

    execute()       --Begin-->  +------------+  --> Responder.send / fail  (one owner, exactly one final response)
    engine          --Step--->  | dispatcher |
    postprocessing  --Done--->  |            |  --> Engine.submit
    cancel          --Cancel->  +------------+  --> Engine.abort

Admission: see waiting_room.py. Pacing: see pacing.py. docs/request-life.md tells a request's whole life, this part of
it included.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from chunks import Chunk
from exchanges import Answer, Exchange, Responder, Sequence, new_exchange
from generation import AdmissionRefused, Engine, EngineError, GenerationRequest, RequestCancelled, RequestError, Step
from measurements import Measurements, Outcome
from pacing import MAX_SECONDS, MAX_SECONDS_BESIDE_CPU_ENGINE, Pacer
from request_reading import Prompt, Request
from stop_words import Released, StopWordMatcher
from text_decoding import CONTEXT_TOKENS, TextStream
from tokenizers import Tokenizer
from waiting_room import QueueLimits, WaitingRoom

_log = logging.getLogger(__name__)

# Direct callers of `tensorrt_llm` are asked whether they are still there; each question is a round trip to Triton.
_CANCEL_POLL_SECONDS = 0.1
_CANCEL_POLLS_AT_ONCE = 16

# An error that overtakes a response in the ensemble leaves its request in flight for ever (Triton before 26.03), and
# the server then cannot end before its exit timeout. So an error waits until the responses before it are decoded, and
# their texts on their way; but no longer than clients can be left waiting.
_TEXT_IS_OUT_SECONDS = 0.02
_ERROR_WAITS_SECONDS = 0.5

_LOOK_AGAIN_SECONDS = 0.01  # when responses are held back: postprocessing's next report comes in about that time

_SHUTTING_DOWN = "the server is shutting down; send the request again"
_OUR_FAULT = "the server failed on this request; its log has the reason"


@dataclass(slots=True)
class _Begin:
    exchange: Exchange


@dataclass(slots=True)
class _Event:
    engine_key: int
    what: Step | RequestError | EngineError
    time_ns: int


@dataclass(slots=True)
class _Done:
    number: int


@dataclass(slots=True)
class _End:
    pass


@dataclass(slots=True)
class _CancelKey:
    text_key: int


@dataclass(slots=True)
class _CancelRequestId:
    request_id: str


@dataclass(slots=True)
class _TellWhenIdle:
    is_idle: threading.Event


@dataclass(slots=True)
class _LateError:
    """The end of an exchange that is closed, and whose last texts are still on their way. Monotonic seconds."""

    exchange: Exchange
    error: Exception
    due: float


class Dispatcher:
    """Serves requests with one engine.

    `queue_limits`: None where requests wait in Triton's queue. `on_fatal` is called once, after every request in flight
    has failed: when the engine says that it has failed, or has said nothing for `hang_seconds` while it had work.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        responses_per_second: float,
        hang_seconds: float,
        queue_limits: QueueLimits | None,
        measurements: Measurements,
        on_fatal: Callable[[EngineError], None],
    ):
        self._engine, self._tokenizer, self._on_fatal = engine, tokenizer, on_fatal
        self._hang_seconds, self._measurements = hang_seconds, measurements
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        # A slot that becomes free is refilled by the engine itself, from the margin, before Triton hands over the next.
        margin = max(1, engine.limits.max_batch_size // 8)
        self.max_in_engine = engine.limits.max_batch_size + margin
        self._waits_in_triton = queue_limits is None
        self._fatal: EngineError | None = None
        self._closing_ns = 0  # Unix time after which nobody is let in any more; 0: not yet
        self._events: queue.SimpleQueue = queue.SimpleQueue()
        # Owned by the dispatcher's thread.
        max_seconds = MAX_SECONDS_BESIDE_CPU_ENGINE if engine.computes_on_cpu else MAX_SECONDS
        self._pacer = Pacer(responses_per_second, max_seconds)
        self._engine_pace = math.nan  # what the engine was last told
        self._room = WaitingRoom(queue_limits or QueueLimits())
        self._by_engine_key: dict[int, list[Sequence]] = {}
        self._by_text_key: dict[int, Sequence] = {}
        self._exchanges: dict[Exchange, None] = {}  # in order of arrival
        self._ready: dict[Sequence, None] = {}  # have something to send
        self._late_errors: list[_LateError] = []
        self._breakdown: EngineError | None = None  # to be told when all have failed
        self._idle_waiters: list[threading.Event] = []
        self._num_in_engine = 0
        self._last_news = 0.0  # from the engine, monotonic seconds
        self._is_holding_back = False
        self._next_cancel_poll = 0.0
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)
        self._thread.start()

    # ---- called by other threads -------------------------------------------------------------------------------

    def submit(self, request: Request, responder: Responder) -> None:
        """Begin one request. Errors go to the responder, never to the caller.

        Where requests wait in Triton's queue, this one's caller is the head of it and is kept until the engine has
        taken the request or it is over: Triton then hands over no other.
        """
        deadline = math.inf
        if request.timeout_seconds is not None:
            deadline = time.monotonic() + request.timeout_seconds - (time.time_ns() - request.arrival_ns) / 1e9
        exchange = new_exchange(request, responder, deadline, self._make_matcher)
        self._events.put(_Begin(exchange))
        if self._waits_in_triton:
            exchange.has_left.wait()

    def done(self, number: int) -> None:
        """`postprocessing` has decoded the response of this number, and all before it."""
        self._events.put(_Done(number))

    def drain(self) -> None:
        """The server is about to end: those who came before are served, those who come now are not."""
        self._closing_ns = self._closing_ns or time.time_ns()

    def end(self) -> None:
        """End whatever is in flight."""
        self._events.put(_End())

    def cancel_key(self, text_key: int) -> None:
        self._events.put(_CancelKey(text_key))

    def cancel_request_id(self, request_id: str) -> None:
        """NVIDIA's convention: a request with `stop` ends the requests in flight that have its id."""
        self._events.put(_CancelRequestId(request_id))

    @property
    def num_in_flight(self) -> int:
        """Sequences that have left Triton's queue and are not over."""
        return len(self._by_engine_key)

    def wait_until_idle(self, seconds: float) -> bool:
        """Until nothing is in flight. False if something still is after so long."""
        is_idle = threading.Event()
        self._events.put(_TellWhenIdle(is_idle))
        return is_idle.wait(seconds)

    def close(self) -> None:
        """Fail what is still in flight and end the thread. The engine is the caller's to shut down.

        Nothing may be submitted any more: Triton finalizes a model after its last `execute` has returned.
        """
        self._events.put(EngineError(_SHUTTING_DOWN))
        self._thread.join()

    def _deliver_to(self, engine_key: int) -> Callable[[Step | RequestError | EngineError], None]:
        return lambda what: self._put_event(engine_key, what)

    def _put_event(self, engine_key: int, what: Step | RequestError | EngineError) -> None:
        self._events.put(_Event(engine_key, what, time.time_ns()))

    def _make_matcher(self, prompt: Prompt) -> StopWordMatcher | None:
        if not prompt.stop_words:
            return None
        keep = prompt.keep_special_tokens
        text = TextStream(self._tokenizer, prompt.prompt_ids[-CONTEXT_TOKENS:], skip_special_tokens=not keep)
        stop_ids = () if keep else {self._special_ids.get(word) for word in prompt.stop_words} - {None}
        return StopWordMatcher(prompt.stop_words, text, stop_ids)

    # ---- the dispatcher's thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        is_open = True
        while is_open or self._late_errors:
            for event in self._wait_for_events():
                if isinstance(event, EngineError):
                    self._fail_all(event)
                    is_open = False
                    continue
                try:
                    self._handle(event)
                    if self._ready and not self._pacer.seconds_between:
                        self._send_what_is_due(time.monotonic())  # each by itself, also those that came together
                except Exception:
                    _log.exception("dispatcher failed on %r", event)
                    if isinstance(event, _Event):
                        self._fail_one(event.engine_key, RuntimeError(_OUR_FAULT))
            try:
                self._do_what_is_due(time.monotonic())
            except Exception:
                _log.exception("dispatcher failed")
                self._break_down(EngineError("the server failed and must be restarted; its log has the reason"))

    def _do_what_is_due(self, now: float) -> None:
        self._end_what_is_due(now)
        self._fill_engine()
        self._refuse_who_waited_too_long(now)
        self._send_what_is_due(now)
        self._send_late_errors(now)
        self._ask_who_is_gone(now)
        self._look_after_engine(now)
        self._measurements.now_in_flight(len(self._by_engine_key), self._num_in_engine)
        if not self._exchanges and not self._late_errors:
            self._tell_that_all_ended()

    def _wait_for_events(self) -> list:
        """At least one event, or none when something has to be sent or asked first."""
        events = []
        try:
            events.append(self._events.get(timeout=self._seconds_to_wait()))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            return events

    def _seconds_to_wait(self) -> float | None:
        times = list(self._times_to_look())
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _times_to_look(self) -> Iterator[float]:
        """Monotonic seconds at which there may be something to do without an event."""
        if self._exchanges:
            yield self._next_cancel_poll  # deadlines need no better clock
        if self._is_holding_back:
            yield time.monotonic() + _LOOK_AGAIN_SECONDS
        elif self._ready:
            yield min(sequence.next_send for sequence in self._ready)
        if self._late_errors:
            yield min(late.due for late in self._late_errors)

    def _handle(self, event) -> None:
        match event:
            case _Event(engine_key, Step() as step, time_ns):
                self._last_news = time.monotonic()
                self._take_step(engine_key, step, time_ns)
            case _Event(engine_key, RequestError() as error):
                self._last_news = time.monotonic()
                self._fail_one(engine_key, error)
            case _Event(_, EngineError() as error):
                self._break_down(error)
            case _Done(number):
                self._pacer.done(number, time.monotonic())
            case _Begin(exchange):
                self._begin(exchange)
            case _End():
                for exchange in list(self._exchanges):
                    self._close(exchange, EngineError(_SHUTTING_DOWN))
            case _TellWhenIdle(is_idle):
                self._idle_waiters.append(is_idle)
            case _CancelKey(text_key):
                if sequence := self._by_text_key.get(text_key):
                    self._close(sequence.answer.exchange, RequestCancelled("the client cancelled the request"))
            case _CancelRequestId(request_id):
                for exchange in [e for e in self._exchanges if e.responder.request_id == request_id]:
                    self._close(exchange, RequestCancelled(f"request '{request_id}' was stopped"))

    def _begin(self, exchange: Exchange) -> None:
        self._exchanges[exchange] = None
        self._measurements.arrived(sum(len(answer.prompt.prompt_ids) for answer in exchange.answers))
        for answer in exchange.answers:
            self._count_streams(len(answer.sequences) * answer.prompt.streaming)
            for sequence in answer.sequences:
                self._by_engine_key.setdefault(sequence.engine_key, []).append(sequence)
                self._by_text_key[sequence.text_key] = sequence
        try:
            if self._fatal is not None:
                raise self._fatal
            if self._closing_ns and exchange.request.arrival_ns > self._closing_ns:
                raise EngineError(_SHUTTING_DOWN)
            self._room.enter(exchange, time.monotonic())
            self._fill_engine()  # so that only those who really wait are in the way of the next
        except (EngineError, AdmissionRefused) as error:
            self._close(exchange, error)

    # ---- admission ---------------------------------------------------------------------------------------------

    def _fill_engine(self) -> None:
        while self._num_in_engine < self.max_in_engine and (waiting := self._room.next()):
            self._hand_over(*waiting)

    def _refuse_who_waited_too_long(self, now: float) -> None:
        for exchange, error in self._room.take_expired(now):
            self._close(exchange, error)

    def _hand_over(self, answer: Answer, generation: GenerationRequest) -> None:
        exchange = answer.exchange
        now_ns = time.time_ns()
        if not any(each.scheduled_ns for each in exchange.answers):
            self._measurements.waited(now_ns - exchange.request.arrival_ns)
        answer.scheduled_ns = answer.scheduled_ns or now_ns
        if not self._num_in_engine:
            self._last_news = time.monotonic()
        exchange.engine_keys.add(generation.key)
        self._num_in_engine += 1
        try:
            self._engine.submit(generation, self._deliver_to(generation.key))
        except RequestError as error:
            self._close(exchange, error)
        except Exception as error:
            _log.exception("the engine refused request %d", generation.key)
            self._close(exchange, RequestError(f"the engine refused the request: {error}"))

    def _count_streams(self, more: int) -> None:
        self._pacer.num_streams += more
        pace = self._pacer.seconds_between
        if pace != self._engine_pace:
            self._engine_pace = pace
            self._engine.pace(pace)

    # ---- tokens ------------------------------------------------------------------------------------------------

    def _take_step(self, engine_key: int, step: Step, time_ns: int) -> None:
        sequences = self._by_engine_key.get(engine_key)
        if sequences is None:  # cancelled, or ended by a stop word: the engine was a step ahead
            return
        sequence = sequences[step.beam]
        if sequence.answer.exchange.closed or sequence.finish_reason:
            return
        if step.token_ids:
            self._count_tokens(sequence, len(step.token_ids), time_ns)
        if step.log_probs is not None:
            sequence.log_probs.extend(step.log_probs)
        if sequence.matcher is None:
            sequence.token_ids.extend(step.token_ids)
            sequence.finish_reason = step.finish_reason
        else:
            self._match_stop_words(sequence, step)
        if sequence.finish_reason:
            sequence.cut_short = not step.finish_reason
            self._finish(sequence)
        elif sequence.answer.prompt.streaming and sequence.token_ids:
            self._ready[sequence] = None

    def _count_tokens(self, sequence: Sequence, number: int, time_ns: int) -> None:
        answer = sequence.answer
        self._measurements.tokens(number, time_ns - sequence.last_token_ns if sequence.last_token_ns else None)
        sequence.last_token_ns = answer.last_token_ns = time_ns
        if not answer.first_token_ns:
            answer.first_token_ns = time_ns
            self._measurements.first_token(time_ns - answer.exchange.request.arrival_ns)

    def _match_stop_words(self, sequence: Sequence, step: Step) -> None:
        for token_id in step.token_ids:
            sequence.held.append(token_id)
            released = sequence.matcher.feed(token_id)
            self._let_go(sequence, released)
            if released.stopped:
                return
        if step.finish_reason:
            sequence.finish_reason = step.finish_reason
            self._let_go(sequence, sequence.matcher.finish())

    @staticmethod
    def _let_go(sequence: Sequence, released: Released) -> None:
        sequence.token_ids += sequence.held[: released.num_tokens]
        del sequence.held[: released.num_tokens]
        if released.stopped:
            sequence.finish_reason = "stop"
            sequence.trim_characters = released.trim_characters

    # ---- responses ---------------------------------------------------------------------------------------------

    def _send_what_is_due(self, now: float) -> None:
        self._is_holding_back = False
        for sequence in [s for s in self._ready if s.next_send <= now]:
            exchange = sequence.answer.exchange
            if exchange.closed:  # just now, by a sequence before this one
                continue
            if exchange.goes_to_postprocessing and not self._pacer.may_send(now):
                self._is_holding_back = True
                continue
            del self._ready[sequence]
            try:
                self._send(sequence, now)
            except Exception:
                _log.exception("a response could not be sent")
                self._close(exchange, RuntimeError(_OUR_FAULT))
            sequence.next_send = now + self._pacer.seconds_between

    def _send(self, sequence: Sequence, now: float) -> None:
        answer = sequence.answer
        exchange = answer.exchange
        together = [sequence] if answer.prompt.streaming else answer.sequences
        if exchange.goes_to_postprocessing:
            exchange.last_number = self._pacer.next_number(now)
        chunk = Chunk(
            batch_index=answer.prompt.batch_index,
            sequence_index=sequence.index if answer.prompt.streaming else 0,
            num_input_tokens=len(answer.prompt.prompt_ids),
            sequences=[s.take_chunk(listener_pid=self._pid, number=exchange.last_number) for s in together],
            times_ns=(
                exchange.request.arrival_ns,
                answer.scheduled_ns,
                answer.first_token_ns,
                answer.last_token_ns,
            ),
        )
        if sequence.finish_reason:
            for ended in together:
                self._by_text_key.pop(ended.text_key, None)
            self._count_streams(-answer.prompt.streaming)
            # A stream's answer is complete when its last sequence is out, not when the engine has finished it.
            waiting = answer.sequences_left or any(s in self._ready for s in answer.sequences)
            exchange.prompts_left -= not waiting
        final = exchange.prompts_left == 0
        exchange.responder.send(chunk, final=final)
        if final:
            self._end(exchange, sequence.finish_reason)

    # ---- endings -----------------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence) -> None:
        """`sequence` has its last token, which is still to be sent."""
        answer = sequence.answer
        answer.sequences_left -= 1
        if answer.prompt.streaming or not answer.sequences_left:
            self._ready[sequence] = None
            sequence.next_send = 0.0
        siblings = self._by_engine_key[sequence.engine_key]
        if all(sibling.finish_reason for sibling in siblings):
            self._release(answer.exchange, sequence.engine_key, abort=any(s.cut_short for s in siblings))

    def _release(self, exchange: Exchange, engine_key: int, *, abort: bool) -> None:
        """The engine is done with this key, or must be: its slot is free for the next request."""
        self._by_engine_key.pop(engine_key, None)
        if engine_key in exchange.engine_keys:
            exchange.engine_keys.discard(engine_key)
            if abort:
                self._engine.abort(engine_key)
            self._num_in_engine -= 1

    def _end(self, exchange: Exchange, outcome: Outcome) -> None:
        exchange.closed = True
        self._exchanges.pop(exchange, None)
        self._room.leave(exchange)
        lengths = [
            (len(answer.prompt.prompt_ids), sum(sequence.num_tokens for sequence in answer.sequences))
            for answer in exchange.answers
        ]
        self._measurements.ended(outcome, (time.time_ns() - exchange.request.arrival_ns) / 1e9, lengths)

    def _end_what_is_due(self, now: float) -> None:
        """Requests that may not take longer end with what they have."""
        for exchange in [e for e in self._exchanges if e.deadline <= now]:
            exchange.deadline = math.inf
            self._room.leave(exchange)
            for sequence in exchange.sequences():
                if sequence.finish_reason:
                    continue
                if sequence.matcher is not None:
                    self._let_go(sequence, sequence.matcher.finish())
                sequence.finish_reason = sequence.finish_reason or "timeout"
                sequence.cut_short = True
                self._finish(sequence)

    def _fail_one(self, engine_key: int, error: Exception) -> None:
        if sequences := self._by_engine_key.get(engine_key):
            self._close(sequences[0].answer.exchange, error)

    def _close(self, exchange: Exchange, error: Exception) -> None:
        """End a request before its time: its one final response is `error`, and all it holds is free."""
        if exchange.closed:
            return
        for sequence in exchange.sequences():
            if self._by_text_key.pop(sequence.text_key, None) is not None:
                self._ready.pop(sequence, None)
                self._count_streams(-sequence.answer.prompt.streaming)
            self._release(exchange, sequence.engine_key, abort=True)
        if isinstance(error, AdmissionRefused):
            self._measurements.refused(error.reason)
        self._end(exchange, _outcome(error))
        # Nobody reads the end of a cancelled request, and it is no error (see TritonResponder).
        wait = exchange.last_number > 0 and not isinstance(error, RequestCancelled)
        late = _LateError(exchange, error, time.monotonic() + _ERROR_WAITS_SECONDS * wait)
        self._late_errors.append(late)
        if not wait:
            self._send_late_errors(late.due)

    def _send_late_errors(self, now: float) -> None:
        for late in self._late_errors:
            if self._pacer.is_done(late.exchange.last_number):
                late.due = min(late.due, now + _TEXT_IS_OUT_SECONDS)
        due = [late for late in self._late_errors if late.due <= now]
        self._late_errors = [late for late in self._late_errors if late.due > now]
        for late in due:
            try:
                late.exchange.responder.fail(late.error)
            except Exception:
                _log.exception("an error could not be sent")

    def _fail_all(self, error: EngineError) -> None:
        self._fatal = error
        for exchange in list(self._exchanges):
            self._close(exchange, error)

    def _break_down(self, error: EngineError) -> None:
        if self._fatal is None:
            self._breakdown = error
            self._fail_all(error)

    def _tell_that_all_ended(self) -> None:
        if self._breakdown is not None:
            error, self._breakdown = self._breakdown, None
            self._on_fatal(error)
        for is_idle in self._idle_waiters:
            is_idle.set()
        self._idle_waiters.clear()

    # ---- looking after others ----------------------------------------------------------------------------------

    def _look_after_engine(self, now: float) -> None:
        if self._num_in_engine and now - self._last_news > self._hang_seconds:
            self._break_down(
                EngineError(
                    f"the engine has {self._num_in_engine} requests and has said nothing for {self._hang_seconds:g} s"
                )
            )

    def _ask_who_is_gone(self, now: float) -> None:
        if now < self._next_cancel_poll or not self._exchanges:
            return
        self._next_cancel_poll = now + _CANCEL_POLL_SECONDS
        # Inside an ensemble Triton never says so, see feedback_channel.py.
        direct = [exchange for exchange in self._exchanges if not exchange.goes_to_postprocessing]
        for exchange in direct[:_CANCEL_POLLS_AT_ONCE]:
            del self._exchanges[exchange]  # to the end of the line
            self._exchanges[exchange] = None
            try:
                if exchange.responder.is_cancelled():
                    self._close(exchange, RequestCancelled("the client cancelled the request"))
            except Exception:
                _log.exception("Triton does not say whether a client is still there")


def _outcome(error: Exception) -> Outcome:
    match error:
        case RequestCancelled():
            return "cancelled"
        case AdmissionRefused():
            return "refused"
        case RequestError():
            return "invalid"
        case _:
            return "failed"
