"""An engine whose steps a test writes out, strict about `generation.Engine`'s rules.

    engine = ScriptedEngine(max_batch_size=4)
    dispatcher.submit(...)                      # in the test's own or another thread
    request = engine.next_request()             # waits until it has come
    engine.step(request.key, [1, 2])
    engine.step(request.key, [3], finish="stop")

What breaks the rules is written down, also when it happens in a thread whose exceptions nobody sees, and
`assert_rules_kept` tells it: a key that is used twice, a step after the end or after `abort`, a request after
`shutdown`, log probabilities that are not one per token.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from generation import (
    Capability,
    Deliver,
    EngineError,
    EngineLimits,
    EngineStats,
    FinishReason,
    GenerationRequest,
    RequestError,
    Step,
)

SECONDS = 10.0  # to wait for what must come


class RuleBroken(AssertionError):
    """Somebody does not keep to the protocol."""


@dataclass
class _InFlight:
    request: GenerationRequest
    deliver: Deliver
    beams_left: set[int] = field(default_factory=set)


class ScriptedEngine:
    """See `generation.Engine`. Generates nothing by itself."""

    capabilities: Collection[Capability] = frozenset(
        {"beam_search", "log_probs", "bad_words", "min_tokens", "no_end_id", "penalties", "seed"}
    )

    computes_on_cpu = False

    def __init__(self, *, max_batch_size: int = 4, max_seq_len: int = 1024, vocab_size: int = 1000):
        self.limits = EngineLimits(
            max_batch_size=max_batch_size,
            max_input_len=max_seq_len - 1,
            max_seq_len=max_seq_len,
            max_beam_width=4,
            vocab_size=vocab_size,
        )
        self.most_in_flight = 0
        self.paces: list[float] = []  # every value that pace() was called with
        self.aborted: list[int] = []  # every key that abort() was called with, known or not
        self._changed = threading.Condition()
        self._in_flight: dict[int, _InFlight] = {}
        self._keys: set[int] = set()  # ever submitted
        self._requests: queue.SimpleQueue[GenerationRequest] = queue.SimpleQueue()
        self._refusals: dict[int, Exception] = {}  # by number of the call
        self._num_submits = 0
        self._error: EngineError | None = None
        self._is_shut_down = False
        self._broken: list[str] = []

    # ---- generation.Engine -------------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        with self._changed:
            if self._is_shut_down:
                self._break(f"request {request.key} came after shutdown()")
            if request.key in self._keys:
                self._break(f"key {request.key} is used a second time")
            if not request.prompt_ids or request.max_tokens < 1:
                self._break(f"request {request.key} has no prompt or wants no token")
            self._keys.add(request.key)
            self._num_submits += 1
            if refusal := self._refusals.pop(self._num_submits, None):
                raise refusal
            if self._error is None:
                beams = set(range(request.num_beams_returned))
                self._in_flight[request.key] = _InFlight(request, deliver, beams)
                self.most_in_flight = max(self.most_in_flight, len(self._in_flight))
                self._changed.notify_all()
        if self._error is None:
            self._requests.put(request)
        else:
            deliver(self._error)

    def abort(self, key: int) -> None:
        with self._changed:
            self.aborted.append(key)
            self._in_flight.pop(key, None)
            self._changed.notify_all()

    def pace(self, seconds: float) -> None:
        self.paces.append(seconds)

    def stats(self) -> EngineStats:
        number = len(self._in_flight)
        return EngineStats(
            num_active_requests=number,
            num_scheduled_requests=number,
            num_context_requests=0,
            kv_blocks_max=100,
            kv_blocks_used=number,
            kv_tokens_per_block=32,
        )

    def shutdown(self) -> None:
        with self._changed:
            if self._is_shut_down:
                self._break("shutdown() was called twice")
            self._is_shut_down = True
        self.fail("the engine was shut down")

    # ---- for the test ------------------------------------------------------------------------------------------

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def next_request(self) -> GenerationRequest:
        """The next request that was submitted, in order; waits for it."""
        try:
            return self._requests.get(timeout=SECONDS)
        except queue.Empty:
            raise AssertionError(f"no request came in {SECONDS:g} s") from None

    def has_request(self) -> bool:
        """Whether `next_request` would return at once."""
        return not self._requests.empty()

    def step(
        self,
        key: int,
        token_ids: Sequence[int] = (),
        *,
        log_probs: Sequence[float] | None = None,
        finish: FinishReason = "",
        beam: int = 0,
    ) -> None:
        """Deliver one step of one sequence. Only for requests in flight."""
        with self._changed:
            entry = self._in_flight.get(key)
            if entry is None:
                raise RuleBroken(f"the test steps request {key}, which is not in flight")
            if beam not in entry.beams_left:
                raise RuleBroken(f"the test steps beam {beam} of request {key}, which is over or never was")
            if not token_ids and not finish:
                raise RuleBroken(f"the test makes a step of request {key} that says nothing")
            if finish == "cancelled":
                raise RuleBroken("an engine only ever reports stop and length")
            if log_probs is not None and (len(log_probs) != len(token_ids) or not entry.request.log_probs):
                raise RuleBroken(f"the log probabilities of request {key} are not one per token, or nobody wants them")
            if finish:
                entry.beams_left.discard(beam)
                if not entry.beams_left:
                    del self._in_flight[key]
                    self._changed.notify_all()
        entry.deliver(Step(list(token_ids), log_probs, finish, beam))

    def fail_request(self, key: int, sentence: str) -> None:
        """A RequestError in the middle of a request, which ends it."""
        with self._changed:
            entry = self._in_flight.pop(key, None)
        if entry is None:
            raise RuleBroken(f"the test fails request {key}, which is not in flight")
        entry.deliver(RequestError(sentence))

    def fail(self, sentence: str) -> EngineError:
        """The engine is dead: all requests in flight hear it, and those that come later."""
        error = EngineError(sentence)
        with self._changed:
            self._error = error
            entries, self._in_flight = list(self._in_flight.values()), {}
            self._changed.notify_all()
        for entry in entries:
            entry.deliver(error)
        return error

    def refuse_next(self, error: Exception, *, after: int = 0) -> None:
        """The next submit(), or one `after` that many more, raises this."""
        self._refusals[self._num_submits + after + 1] = error

    def wait_until_in_flight(self, number: int) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._in_flight) == number, SECONDS):
                raise AssertionError(f"{len(self._in_flight)} requests are in flight, not {number}")

    def assert_rules_kept(self) -> None:
        if self._broken:
            raise RuleBroken("; ".join(self._broken))

    def _break(self, sentence: str) -> None:
        self._broken.append(sentence)
        raise RuleBroken(sentence)
