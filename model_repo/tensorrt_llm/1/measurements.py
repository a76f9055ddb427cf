"""What is counted about requests, in plain numbers: the dispatcher writes it down, engine_metrics.py exports it.

Nothing is exported from here at the moment it happens, because each change costs a round trip to Triton: at 40,000
tokens a second there is no time for that. Instead what has come together is taken ten times a second.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from generation import Refusal

# How a request ended: with the finish reason of its last sequence, or with an error.
Outcome = Literal["stop", "length", "timeout", "cancelled", "invalid", "refused", "failed"]

# Seconds between two tokens of a sequence; the last bucket is +Inf.
INTER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


@dataclass(slots=True)
class Taken:
    """What has come together since it was last taken."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    compute_seconds: float = 0.0
    waiting_seconds: float = 0.0
    inter_token_seconds: float = 0.0
    inter_token_counts: list[int] = field(default_factory=lambda: [0] * (len(INTER_TOKEN_BUCKETS) + 1))
    ended: Counter[Outcome] = field(default_factory=Counter)
    refusals: Counter[Refusal] = field(default_factory=Counter)
    # One number per request, for histograms.
    queue_seconds: list[float] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)
    request_seconds: list[float] = field(default_factory=list)
    input_lengths: list[int] = field(default_factory=list)
    output_lengths: list[int] = field(default_factory=list)


class Measurements:
    """Written by the dispatcher, taken by the thread of the metrics. Times are Unix times in ns.

    `max_batch_size` sequences compute at the same time; those that the engine holds beyond wait inside it.
    """

    def __init__(self, max_batch_size: int):
        self._max_batch_size = max_batch_size
        self._lock = threading.Lock()
        self._taken = Taken()
        self._num_computing = 0
        self._num_waiting = 0
        self._counted_until = time.monotonic()

    def arrived(self, prompt_tokens: int) -> None:
        """A request has come out of Triton's queue."""
        with self._lock:
            self._taken.prompt_tokens += prompt_tokens

    def waited(self, since_arrival_ns: int) -> None:
        """A request's first sequence has got its slot."""
        with self._lock:
            self._taken.queue_seconds.append(since_arrival_ns / 1e9)

    def first_token(self, since_arrival_ns: int) -> None:
        with self._lock:
            self._taken.first_token_seconds.append(since_arrival_ns / 1e9)

    def tokens(self, number: int, since_last_ns: int | None) -> None:
        """`number` tokens of one sequence came together, so long after those before them; None for the first."""
        with self._lock:
            taken = self._taken
            taken.generated_tokens += number
            if since_last_ns is not None and number:
                seconds = since_last_ns / 1e9
                taken.inter_token_seconds += seconds
                taken.inter_token_counts[bisect_left(INTER_TOKEN_BUCKETS, seconds / number)] += number

    def now_in_flight(self, number: int, in_engine: int) -> None:
        """From now on there are so many sequences, and the engine has so many of them."""
        with self._lock:
            self._count_time()
            self._num_computing = min(in_engine, self._max_batch_size)
            self._num_waiting = number - self._num_computing

    def ended(self, outcome: Outcome, seconds: float, lengths: list[tuple[int, int]]) -> None:
        """A request is over. `lengths`: tokens of each prompt and of all its answers together."""
        with self._lock:
            taken = self._taken
            taken.ended[outcome] += 1
            taken.request_seconds.append(seconds)
            taken.input_lengths += [length for length, _ in lengths]
            taken.output_lengths += [length for _, length in lengths]

    def invalid(self) -> None:
        """A request was wrong and never began."""
        with self._lock:
            self._taken.ended["invalid"] += 1

    def refused(self, reason: Refusal) -> None:
        """A request was not let in."""
        with self._lock:
            self._taken.refusals[reason] += 1

    def take(self) -> Taken:
        with self._lock:
            self._count_time()
            taken, self._taken = self._taken, Taken()
            return taken

    def _count_time(self) -> None:
        now = time.monotonic()
        elapsed, self._counted_until = now - self._counted_until, now
        self._taken.compute_seconds += elapsed * self._num_computing
        self._taken.waiting_seconds += elapsed * self._num_waiting
