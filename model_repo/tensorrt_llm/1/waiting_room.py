"""Who waits for the engine, and in which order they get in.

Normally there is hardly anybody here. While the engine is full, the call that brought the first one in line does not
return to Triton, so that all others stay in Triton's scheduler, where `nv_inference_pending_request_count` and
`nv_inference_queue_duration_us` count them.

Triton's scheduler can also bound its queue, time requests out and honour priorities, but not together with this: a
model with any such policy is handed its next request only when another one arrives, or after up to half a second
(measured with tritonserver 2.51, and the same code in later releases; docs/decisions.md). So where one of them is
asked for, Triton hands over everything at once, and all wait here.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass

from exchanges import Answer, Exchange
from generation import AdmissionRefused, GenerationRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """`max_size` in requests, 0 for any number; `timeout_seconds` 0 for no limit."""

    max_size: int = 0
    timeout_seconds: float = 0.0


class WaitingRoom:
    """Owned by the dispatcher's thread. Times are monotonic seconds.

    Requests of the lowest `priority` number go first, and of these the one that came first, with all of its sequences.
    """

    def __init__(self, limits: QueueLimits):
        self._limits = limits
        self._numbers = itertools.count()
        self._line: list[tuple[int, int, Exchange]] = []  # a heap; those that have left stay until they come up
        self._inside: dict[Exchange, list[tuple[Answer, GenerationRequest]]] = {}  # what is left of each, last first
        self._until: dict[Exchange, float] = {}  # of those of which nothing has been taken, in order of arrival

    def __len__(self) -> int:
        return len(self._inside)

    def enter(self, exchange: Exchange, now: float) -> None:
        """Raises AdmissionRefused when too many wait."""
        limits = self._limits
        if limits.max_size and len(self._until) >= limits.max_size:
            exchange.has_left.set()
            raise AdmissionRefused(
                "queue_full",
                f"the server is busy: {limits.max_size} requests wait, which is all that may (--max-queue-size); "
                "send the request again in a moment",
            )
        generations = [(answer, each) for answer in exchange.answers for each in answer.prompt.generations]
        self._inside[exchange] = generations[::-1]
        self._until[exchange] = now + limits.timeout_seconds if limits.timeout_seconds else math.inf
        heapq.heappush(self._line, (exchange.request.priority, next(self._numbers), exchange))

    def next(self) -> tuple[Answer, GenerationRequest] | None:
        """Takes the next sequence in line; None when nobody waits."""
        while self._line:
            exchange = self._line[0][2]
            if left := self._inside.get(exchange):
                self._until.pop(exchange, None)
                taken = left.pop()
                if not left:
                    self.leave(exchange)
                return taken
            heapq.heappop(self._line)
        return None

    def leave(self, exchange: Exchange) -> None:
        """Nothing more is to be taken from this one."""
        self._inside.pop(exchange, None)
        self._until.pop(exchange, None)
        exchange.has_left.set()

    def take_expired(self, now: float) -> list[tuple[Exchange, AdmissionRefused]]:
        """Those that have waited too long, and what to tell them."""
        expired = []
        for exchange, until in self._until.items():
            if until > now:
                break  # all wait equally long, so those behind are younger
            expired.append(exchange)
        for exchange in expired:
            self.leave(exchange)
        sentence = (
            f"the server is busy: the request has waited {self._limits.timeout_seconds:g} s, which is as long as it "
            "may (--queue-timeout); send it again later"
        )
        return [(exchange, AdmissionRefused("queue_timeout", sentence)) for exchange in expired]
