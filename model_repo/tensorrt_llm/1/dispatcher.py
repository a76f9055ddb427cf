"""Between Triton's requests and the engine: admission, stop words, paced responses, cancellation, endings.

One thread, the dispatcher's, owns all state of the requests in flight. Everybody else only puts events on its
queue, so there is no lock to hold wrongly:

    execute()  --Begin-->  +------------+  --> Responder.send / fail  (one owner, exactly one final response)
    engine     --Step--->  | dispatcher |
    cancel     --Cancel->  +------------+  --> Engine.abort

Admission: `submit` does not return while all engine slots (and a small margin) are taken, so that waiting requests
stay in Triton's scheduler, where its queue metrics, priorities, timeouts and `max_queue_size` are true.

Pacing: every response of an ensemble costs CPU time. While few streams run, each token is sent at once; as streams
grow, the tokens of one stream are sent together, at most `responses_per_second` responses in all.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from chunk_header import ChunkHeader
from chunks import Chunk, SequenceChunk
from generation import Engine, EngineError, FinishReason, RequestCancelled, RequestError, Step
from request_reading import Prompt
from stop_words import Released, StopWordMatcher
from text_decoding import CONTEXT_TOKENS, TextStream
from tokenizers import Tokenizer

_log = logging.getLogger(__name__)

# Direct callers of `tensorrt_llm` are asked whether they are still there; each question is a round trip to Triton.
_CANCEL_POLL_SECONDS = 0.1
_CANCEL_POLLS_AT_ONCE = 16

_OUR_FAULT = "the server failed on this request; its log has the reason"


class Responder(Protocol):
    """The way back to one Triton request. Only the dispatcher's thread calls it."""

    request_id: str

    def send(self, chunk: Chunk, *, final: bool) -> None: ...

    def fail(self, error: Exception) -> None:
        """The final response, in place of what is missing."""

    def is_cancelled(self) -> bool: ...


@dataclass(slots=True, eq=False)
class _Exchange:
    """One Triton request with all of its prompts."""

    responder: Responder
    prompts_left: int
    engine_keys: set[int] = field(default_factory=set)  # the engine has them, and each has a slot
    closed: bool = False  # its final response is out


@dataclass(slots=True, eq=False)
class _Answer:
    """One prompt's sequences."""

    exchange: _Exchange
    prompt: Prompt
    arrival_ns: int
    sequences: list[_Sequence] = field(default_factory=list)
    sequences_left: int = 0
    scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0


@dataclass(slots=True, eq=False)
class _Sequence:
    """One sequence: tokens that came and have not been sent."""

    answer: _Answer
    engine_key: int
    text_key: int  # names its text in postprocessing
    index: int
    matcher: StopWordMatcher | None
    held: list[int] = field(default_factory=list)  # waiting for the matcher
    token_ids: list[int] = field(default_factory=list)  # may go
    log_probs: list[float] = field(default_factory=list)
    cumulative_log_prob: float = 0.0
    trim_characters: int = 0
    finish_reason: FinishReason = ""
    cut_short: bool = False  # ended by us: for all we know, the engine goes on with it
    is_first: bool = True
    next_send: float = 0.0  # monotonic seconds


@dataclass(slots=True)
class _Begin:
    exchange: _Exchange
    answers: list[_Answer]


@dataclass(slots=True)
class _Admitted:
    """The engine has it, or has refused it: only now can it be aborted, and its slot be given away."""

    exchange: _Exchange
    engine_key: int


@dataclass(slots=True)
class _Event:
    engine_key: int
    what: Step | RequestError | EngineError


@dataclass(slots=True)
class _CancelKey:
    text_key: int


@dataclass(slots=True)
class _CancelRequestId:
    request_id: str


class Dispatcher:
    """Serves requests with one engine. `on_fatal` is called once, after every request in flight has failed."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        responses_per_second: float,
        on_fatal: Callable[[EngineError], None],
    ):
        self._engine, self._tokenizer, self._on_fatal = engine, tokenizer, on_fatal
        self._seconds_per_response = 1.0 / responses_per_second
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        # A slot that becomes free is refilled by the engine itself, from the margin, before Triton hands over the next.
        margin = max(1, engine.limits.max_batch_size // 8)
        self.max_in_flight = engine.limits.max_batch_size + margin
        self._slots = threading.Semaphore(self.max_in_flight)
        self._fatal: EngineError | None = None
        self._events: queue.SimpleQueue = queue.SimpleQueue()
        # Owned by the dispatcher's thread.
        self._by_engine_key: dict[int, list[_Sequence]] = {}
        self._by_text_key: dict[int, _Sequence] = {}
        self._exchanges: dict[_Exchange, None] = {}  # in order of arrival
        self._ready: dict[_Sequence, None] = {}  # have something to send
        self._num_streams = 0
        self._next_cancel_poll = 0.0
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)
        self._thread.start()

    # ---- called by other threads -------------------------------------------------------------------------------

    def submit(self, prompts: Sequence[Prompt], responder: Responder) -> None:
        """Begin one request. Blocks while the engine is full. Errors go to the responder, never to the caller."""
        arrival_ns = time.time_ns()
        exchange = _Exchange(responder, len(prompts))
        answers = [self._make_answer(exchange, prompt, arrival_ns) for prompt in prompts]
        self._events.put(_Begin(exchange, answers))
        for answer in answers:
            for generation in answer.prompt.generations:
                self._slots.acquire()
                if self._fatal is not None or exchange.closed:
                    self._slots.release()
                    continue
                answer.scheduled_ns = answer.scheduled_ns or time.time_ns()
                try:
                    self._engine.submit(generation, self._deliver_to(generation.key))
                except RequestError as error:
                    self._events.put(_Event(generation.key, error))
                except Exception as error:
                    _log.exception("the engine refused request %d", generation.key)
                    self._events.put(_Event(generation.key, RequestError(f"the engine refused the request: {error}")))
                self._events.put(_Admitted(exchange, generation.key))

    def cancel_key(self, text_key: int) -> None:
        self._events.put(_CancelKey(text_key))

    def cancel_request_id(self, request_id: str) -> None:
        """NVIDIA's convention: a request with `stop` ends the requests in flight that have its id."""
        self._events.put(_CancelRequestId(request_id))

    @property
    def num_in_flight(self) -> int:
        return len(self._by_engine_key)

    def close(self) -> None:
        """Fail what is still in flight and end the thread. The engine is the caller's to shut down.

        Nothing may be submitted any more: Triton finalizes a model after its last `execute` has returned.
        """
        self._events.put(EngineError("the server is shutting down; send the request again"))
        self._thread.join()

    def _deliver_to(self, engine_key: int) -> Callable[[Step | RequestError | EngineError], None]:
        put = self._events.put
        return lambda what: put(_Event(engine_key, what))

    def _make_answer(self, exchange: _Exchange, prompt: Prompt, arrival_ns: int) -> _Answer:
        answer = _Answer(exchange, prompt, arrival_ns)
        for generation in prompt.generations:
            for beam in range(generation.num_beams_returned):
                matcher = None
                if prompt.stop_words:
                    context = prompt.prompt_ids[-CONTEXT_TOKENS:]
                    keep = prompt.keep_special_tokens
                    text = TextStream(self._tokenizer, context, skip_special_tokens=not keep)
                    stop_ids = () if keep else {self._special_ids.get(word) for word in prompt.stop_words} - {None}
                    matcher = StopWordMatcher(prompt.stop_words, text, stop_ids)
                sequence = _Sequence(
                    answer=answer,
                    engine_key=generation.key,
                    # Beams share the engine's key; the highest bits tell their texts apart.
                    text_key=generation.key | beam << 56,
                    index=len(answer.sequences),
                    matcher=matcher,
                )
                answer.sequences.append(sequence)
        answer.sequences_left = len(answer.sequences)
        return answer

    # ---- the dispatcher's thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            for event in self._wait_for_events():
                if isinstance(event, EngineError):
                    self._fail_all(event)
                    return
                try:
                    self._handle(event)
                except Exception:
                    _log.exception("dispatcher failed on %r", event)
                    if isinstance(event, _Event):
                        self._fail_one(event.engine_key, RuntimeError(_OUR_FAULT))
            now = time.monotonic()
            self._send_what_is_due(now)
            self._ask_who_is_gone(now)

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
        if not self._exchanges:
            return None
        due = min((sequence.next_send for sequence in self._ready), default=self._next_cancel_poll)
        return max(0.0, min(due, self._next_cancel_poll) - time.monotonic())

    def _handle(self, event) -> None:
        match event:
            case _Event(engine_key, Step() as step):
                self._take_step(engine_key, step)
            case _Event(engine_key, RequestError() as error):
                self._fail_one(engine_key, error)
            case _Event(_, EngineError() as error):
                if self._fatal is None:
                    self._fail_all(error)
                    self._on_fatal(error)
            case _Begin(exchange, answers):
                self._begin(exchange, answers)
            case _Admitted(exchange, engine_key):
                exchange.engine_keys.add(engine_key)
                if engine_key not in self._by_engine_key:  # it ended while submit() was still handing it over
                    self._release(exchange, engine_key, abort=True)
            case _CancelKey(text_key):
                if sequence := self._by_text_key.get(text_key):
                    self._close(sequence.answer.exchange, RequestCancelled("the client cancelled the request"))
            case _CancelRequestId(request_id):
                for exchange in [e for e in self._exchanges if e.responder.request_id == request_id]:
                    self._close(exchange, RequestCancelled(f"request '{request_id}' was stopped"))

    def _begin(self, exchange: _Exchange, answers: list[_Answer]) -> None:
        self._exchanges[exchange] = None
        for answer in answers:
            self._num_streams += len(answer.sequences) * answer.prompt.streaming
            for sequence in answer.sequences:
                self._by_engine_key.setdefault(sequence.engine_key, []).append(sequence)
                self._by_text_key[sequence.text_key] = sequence
        if self._fatal is not None:
            self._close(exchange, self._fatal)

    def _take_step(self, engine_key: int, step: Step) -> None:
        sequences = self._by_engine_key.get(engine_key)
        if sequences is None:  # cancelled, or ended by a stop word: the engine was a step ahead
            return
        sequence = sequences[step.beam]
        answer = sequence.answer
        if answer.exchange.closed or sequence.finish_reason:
            return
        if step.token_ids:
            answer.last_token_ns = time.time_ns()
            answer.first_token_ns = answer.first_token_ns or answer.last_token_ns
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
        elif answer.prompt.streaming and sequence.token_ids:
            self._ready[sequence] = None

    def _match_stop_words(self, sequence: _Sequence, step: Step) -> None:
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
    def _let_go(sequence: _Sequence, released: Released) -> None:
        sequence.token_ids += sequence.held[: released.num_tokens]
        del sequence.held[: released.num_tokens]
        if released.stopped:
            sequence.finish_reason = "stop"
            sequence.trim_characters = released.trim_characters

    def _finish(self, sequence: _Sequence) -> None:
        answer = sequence.answer
        answer.sequences_left -= 1
        if answer.prompt.streaming or not answer.sequences_left:
            self._ready[sequence] = None
            sequence.next_send = 0.0
        siblings = self._by_engine_key[sequence.engine_key]
        if all(sibling.finish_reason for sibling in siblings):
            self._release(answer.exchange, sequence.engine_key, abort=any(s.cut_short for s in siblings))

    def _release(self, exchange: _Exchange, engine_key: int, *, abort: bool) -> None:
        """The engine is done with this key, or must be: its slot is free for the next request."""
        self._by_engine_key.pop(engine_key, None)
        if engine_key in exchange.engine_keys:
            exchange.engine_keys.discard(engine_key)
            if abort:
                self._engine.abort(engine_key)
            self._slots.release()

    def _send_what_is_due(self, now: float) -> None:
        for sequence in [s for s in self._ready if s.next_send <= now]:
            exchange = sequence.answer.exchange
            if exchange.closed:  # just now, by a sequence before this one
                continue
            del self._ready[sequence]
            try:
                self._send(sequence)
            except Exception:
                _log.exception("a response could not be sent")
                self._close(exchange, RuntimeError(_OUR_FAULT))
            sequence.next_send = now + self._num_streams * self._seconds_per_response

    def _send(self, sequence: _Sequence) -> None:
        answer = sequence.answer
        exchange = answer.exchange
        together = [sequence] if answer.prompt.streaming else answer.sequences
        chunk = Chunk(
            batch_index=answer.prompt.batch_index,
            sequence_index=sequence.index if answer.prompt.streaming else 0,
            num_input_tokens=len(answer.prompt.prompt_ids),
            sequences=[self._take_chunk(s) for s in together],
            times_ns=(answer.arrival_ns, answer.scheduled_ns, answer.first_token_ns, answer.last_token_ns),
        )
        if sequence.finish_reason:
            for ended in together:
                self._by_text_key.pop(ended.text_key, None)
            self._num_streams -= answer.prompt.streaming
            # A stream's answer is complete when its last sequence is out, not when the engine has finished it.
            waiting = answer.sequences_left or any(s in self._ready for s in answer.sequences)
            exchange.prompts_left -= not waiting
        final = exchange.prompts_left == 0
        exchange.responder.send(chunk, final=final)
        if final:
            exchange.closed = True
            self._exchanges.pop(exchange, None)

    def _take_chunk(self, sequence: _Sequence) -> SequenceChunk:
        prompt = sequence.answer.prompt
        token_ids, log_probs = sequence.token_ids, sequence.log_probs[: len(sequence.token_ids)]
        sequence.token_ids = []
        del sequence.log_probs[: len(log_probs)]
        sequence.cumulative_log_prob += sum(log_probs)
        is_first, sequence.is_first = sequence.is_first, False
        echo = is_first and prompt.echo
        return SequenceChunk(
            header=ChunkHeader(
                key=sequence.text_key,
                is_first=is_first,
                is_last=bool(sequence.finish_reason),
                keep_special_tokens=prompt.keep_special_tokens,
                trim_characters=sequence.trim_characters,
                context=() if echo or not is_first else prompt.prompt_ids[-CONTEXT_TOKENS:],
            ),
            token_ids=[*prompt.prompt_ids, *token_ids] if echo else token_ids,
            num_output_tokens=len(token_ids),
            log_probs=log_probs,
            cumulative_log_prob=sequence.cumulative_log_prob,
            finish_reason=sequence.finish_reason,
        )

    def _fail_one(self, engine_key: int, error: Exception) -> None:
        if sequences := self._by_engine_key.get(engine_key):
            self._close(sequences[0].answer.exchange, error)

    def _close(self, exchange: _Exchange, error: Exception) -> None:
        """End a request before its time: its one final response is `error`, and all it holds is free."""
        if exchange.closed:
            return
        exchange.closed = True
        self._exchanges.pop(exchange, None)
        for sequence in [s for s in self._by_text_key.values() if s.answer.exchange is exchange]:
            del self._by_text_key[sequence.text_key]
            self._ready.pop(sequence, None)
            self._num_streams -= sequence.answer.prompt.streaming
            self._release(exchange, sequence.engine_key, abort=True)
        try:
            exchange.responder.fail(error)
        except Exception:
            _log.exception("an error could not be sent")

    def _fail_all(self, error: EngineError) -> None:
        self._fatal = error
        for exchange in list(self._exchanges):
            self._close(exchange, error)
        self._slots.release(self.max_in_flight)  # whoever waits in submit() finds `_fatal`

    def _ask_who_is_gone(self, now: float) -> None:
        if now < self._next_cancel_poll or not self._exchanges:
            return
        self._next_cancel_poll = now + _CANCEL_POLL_SECONDS
        for exchange in list(self._exchanges)[:_CANCEL_POLLS_AT_ONCE]:
            del self._exchanges[exchange]  # to the end of the line
            self._exchanges[exchange] = None
            try:
                if exchange.responder.is_cancelled():
                    self._close(exchange, RequestCancelled("the client cancelled the request"))
            except Exception:
                _log.exception("Triton does not say whether a client is still there")
