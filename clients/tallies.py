"""What is measured, in bounded memory however long it runs: counts, HDR histograms, a row per second."""

from __future__ import annotations

import math
import time
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import get_args

import numpy as np
from failures import ErrorKind
from hdrh.histogram import HdrHistogram

ERROR_KINDS: tuple[ErrorKind, ...] = get_args(ErrorKind)
PERCENTILES = (50, 90, 95, 99, 99.9)
ROWS_KEPT = 6 * 3600  # seconds; 250 bytes each. A file of --csv keeps all
EXAMPLE_CHARACTERS = 300

_HIGHEST_MICROSECONDS = 3_600_000_000  # an hour; longer ones count as this, their maximum and mean stay exact
_SIGNIFICANT_DIGITS = 3


class Timings:
    """Durations in seconds, exact to 0.1 % (one microsecond below 2 ms), in 190 kB."""

    def __init__(self) -> None:
        self._histogram = HdrHistogram(1, _HIGHEST_MICROSECONDS, _SIGNIFICANT_DIGITS)
        self.count = 0
        self.sum_seconds = 0.0
        self.min_seconds = math.inf
        self.max_seconds = 0.0
        self._recent = array("d")

    def record(self, seconds: float, count: int = 1) -> None:
        """`count` times the same duration."""
        self._histogram.record_value(min(max(round(seconds * 1e6), 0), _HIGHEST_MICROSECONDS), count)
        self.count += count
        self.sum_seconds += seconds * count
        self.min_seconds = min(self.min_seconds, seconds)
        self.max_seconds = max(self.max_seconds, seconds)
        self._recent.append(seconds)

    def take_recent(self) -> np.ndarray:
        """What was recorded since the last call, each duration once whatever its count."""
        recent, self._recent = self._recent, array("d")
        return np.frombuffer(recent) if recent else np.empty(0)

    def percentile(self, percent: float) -> float:
        """In seconds; nan when there is nothing."""
        return self.summary([percent])[percent_key(percent)] if self.count else math.nan

    def summary(self, percentiles: Sequence[float] = PERCENTILES) -> dict[str, float | int | None]:
        """count, mean, min, the percentiles as p50, p99_9, and max, in seconds; None where there is nothing."""
        if not self.count:
            return {"count": 0, **dict.fromkeys(["mean", "min", *map(percent_key, percentiles), "max"])}
        values = self._histogram.get_percentile_to_value_dict(percentiles)
        return {
            "count": self.count,
            "mean": self.sum_seconds / self.count,
            "min": self.min_seconds,
            # A percentile is the upper edge of its bucket, which may lie above everything that was seen.
            **{percent_key(p): min(values[p] / 1e6, self.max_seconds) for p in percentiles},
            "max": self.max_seconds,
        }

    def counts_up_to(self, bounds_seconds: Sequence[float]) -> list[int]:
        """How many durations were at most this long, to 0.1 % of each bound. Safe to call from another thread."""
        cumulative = np.cumsum(np.frombuffer(self._histogram.counts, dtype=np.uint64))
        buckets = np.searchsorted(_lowest_microseconds(), np.rint(np.array(bounds_seconds) * 1e6), side="right")
        return cumulative[buckets - 1].astype(int).tolist()


@cache
def _lowest_microseconds() -> np.ndarray:
    """The lowest value of every bucket of a histogram, ascending."""
    histogram = HdrHistogram(1, _HIGHEST_MICROSECONDS, _SIGNIFICANT_DIGITS)
    return np.array([histogram.get_value_from_index(index) for index in range(histogram.counts_len)])


def percent_key(percent: float) -> str:
    return f"p{percent:g}".replace(".", "_")


# The columns of a row, each for one second; percentiles are of what ended or arrived in it.
COLUMNS = (
    "time_seconds",  # the end of the second, from the start of the load
    "width_seconds",  # 1, or more when this program was held up
    "offered",  # requests/s, or users; nothing for a trace
    "in_flight",  # at the end of the second
    "sent",
    "ok",
    "cancelled",
    *(f"errors_{kind}" for kind in ERROR_KINDS),
    "retries",
    "responses",
    "tokens",
    "time_to_first_token_p50_seconds",
    "time_to_first_token_p99_seconds",
    "response_gap_p99_seconds",
    "end_to_end_p50_seconds",
    "end_to_end_p99_seconds",
    "lateness_max_seconds",
)
# Columns that count; over all rows they add up to the totals.
COUNTED = COLUMNS[COLUMNS.index("sent") : COLUMNS.index("tokens") + 1]


@dataclass
class Tally:
    """Everything that happened. Times are time.monotonic()."""

    offers_rate: bool = False  # `offered` is a rate, not users
    started: float = field(default_factory=time.monotonic)
    sent: int = 0
    ok: int = 0
    cancelled: int = 0  # on purpose, by --cancel-ratio
    cut_off: int = 0  # by the end of the run
    retries: int = 0
    responses: int = 0
    tokens: int = 0
    in_flight: int = 0
    offered: float | None = None
    errors: dict[ErrorKind, int] = field(default_factory=lambda: dict.fromkeys(ERROR_KINDS, 0))
    examples: dict[ErrorKind, str] = field(default_factory=dict)
    time_to_first_token: Timings = field(default_factory=Timings)
    inter_token: Timings = field(default_factory=Timings)
    response_gap: Timings = field(default_factory=Timings)
    end_to_end: Timings = field(default_factory=Timings)
    lateness: Timings = field(default_factory=Timings)
    loop_delay: Timings = field(default_factory=Timings)
    rows: deque[array[float]] = field(default_factory=lambda: deque(maxlen=ROWS_KEPT))
    sending_seconds: float | None = None
    tokens_while_sending: int = 0
    ok_while_sending: int = 0

    def __post_init__(self) -> None:
        self._row_began = self.started
        self._counted_before = dict.fromkeys(COUNTED, 0)

    # ---- events ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The load begins now."""
        self.started = self._row_began = time.monotonic()

    def request_sent(self, lateness_seconds: float) -> None:
        self.sent += 1
        self.in_flight += 1
        self.lateness.record(lateness_seconds)

    def request_over(self) -> None:
        self.in_flight -= 1

    def response_arrived(self, tokens: int) -> None:
        self.responses += 1
        self.tokens += tokens

    def gap(self, seconds: float, tokens: int) -> None:
        """Between two responses; the later one brought `tokens`, and each of them is taken to have come at its pace."""
        self.response_gap.record(seconds)
        self.inter_token.record(seconds / tokens, tokens)

    def answer_complete(self, seconds: float) -> None:
        self.ok += 1
        self.end_to_end.record(seconds)

    def request_failed(self, kind: ErrorKind, message: str) -> None:
        self.errors[kind] += 1
        self.examples.setdefault(kind, message[:EXAMPLE_CHARACTERS])

    def sending_over(self) -> None:
        self.sending_seconds = time.monotonic() - self.started
        self.tokens_while_sending, self.ok_while_sending = self.tokens, self.ok

    # ---- sums --------------------------------------------------------------------------------------------------

    @property
    def not_sent(self) -> int:
        return self.errors["not_sent"]

    @property
    def failed(self) -> int:
        """Of those that were sent."""
        return sum(self.errors.values()) - self.not_sent

    @property
    def error_ratio(self) -> float:
        """Of the requests that were due and were to end by themselves."""
        errors = self.failed + self.not_sent
        return errors / max(errors + self.ok, 1)

    def close_row(self) -> dict[str, float]:
        """The second that ends now, by COLUMNS."""
        now = time.monotonic()
        counted = self._counted()
        first, gaps, ends, late = (
            timings.take_recent()
            for timings in (self.time_to_first_token, self.response_gap, self.end_to_end, self.lateness)
        )
        self.inter_token.take_recent()
        self.loop_delay.take_recent()
        row = {
            "time_seconds": now - self.started,
            "width_seconds": now - self._row_began,
            "offered": math.nan if self.offered is None else self.offered,
            "in_flight": self.in_flight,
            **{name: value - self._counted_before[name] for name, value in counted.items()},
            "time_to_first_token_p50_seconds": quantile(first, 0.5),
            "time_to_first_token_p99_seconds": quantile(first, 0.99),
            "response_gap_p99_seconds": quantile(gaps, 0.99),
            "end_to_end_p50_seconds": quantile(ends, 0.5),
            "end_to_end_p99_seconds": quantile(ends, 0.99),
            "lateness_max_seconds": quantile(late, 1.0),
        }
        self._row_began, self._counted_before = now, counted
        self.rows.append(array("d", [row[name] for name in COLUMNS]))
        return row

    def _counted(self) -> dict[str, int]:
        return {
            "sent": self.sent,
            "ok": self.ok,
            "cancelled": self.cancelled + self.cut_off,
            **{f"errors_{kind}": number for kind, number in self.errors.items()},
            "retries": self.retries,
            "responses": self.responses,
            "tokens": self.tokens,
        }


def quantile(values: np.ndarray, fraction: float) -> float:
    """nan when there is nothing."""
    return float(np.quantile(values, fraction, method="inverted_cdf")) if values.size else math.nan
