"""Scrapes and recording rules: what an autoscaler is told of the servers, and how late.

The rules are those of monitoring/rules.yaml that a signal needs, in arrays over all Pods; NaN is "no value". The rates
are those of Prometheus 3: of samples later than the begin of the window, extrapolated to its borders.
tests/unit/test_autoscaling_prometheus.py compares them with promtool.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
from autoscaling.servers import Fleet, Floats, Numbers

SignalName = Literal["concurrency", "queueComputeRatio", "kvCache"]
RECORDS: dict[SignalName, str] = {
    "concurrency": "triton:requests:current",
    "queueComputeRatio": "triton:queue_compute:ratio",
    "kvCache": "triton:kv_cache:fraction",
}

NUM_PHASES = 5  # Prometheus spreads its targets over the interval; a Pod is in one of so many parts of it

_LONG_RATE = 300.0  # rate(...[5m]), where the short window has fewer than two samples
_WAITING_RUNNING_WINDOW = 120.0


@dataclass(frozen=True, kw_only=True)
class PrometheusSettings:
    scrape_seconds: float = 15.0
    evaluation_seconds: float = 15.0  # the interval of the group triton-now
    delay_seconds: float = 0.0  # of an adapter, or of KEDA's cache: how old an answer may be

    @property
    def window_seconds(self) -> float:
        """[1m] of monitoring/rules.yaml, which is four scrapes in the chart: its templates/monitoring.yaml."""
        return min(max(4 * self.scrape_seconds, 30.0), 60.0)


@dataclass(frozen=True, slots=True)
class Records:
    """Of one evaluation, an element per Pod; NaN where there is no value."""

    seconds: float
    values: dict[SignalName, Floats]


class Prometheus:
    """`scrape` and `evaluate` are called when it is time; Pods are the fleet's numbers."""

    def __init__(self, settings: PrometheusSettings, fleet: Fleet, *, has_ratio: bool = True):
        """Without `has_ratio` the ratio, which costs more than all others together, has no value."""
        self.settings = settings
        self._has_ratio = has_ratio
        self._fleet = fleet
        self._slots = fleet.model.slots
        self._num_rows = math.ceil(_LONG_RATE / settings.scrape_seconds) + 2
        self._num_short_rows = min(self._num_rows, math.ceil(settings.window_seconds / settings.scrape_seconds) + 2)
        evaluations = math.ceil(_WAITING_RUNNING_WINDOW / settings.evaluation_seconds) + 1
        self._waiting_running: deque[tuple[float, Floats]] = deque(maxlen=evaluations)
        self._current: deque[tuple[float, Floats]] = deque(maxlen=evaluations)
        self._row = 0
        # (rows, Pods): the time of a sample and the three counters that rates are made of.
        self._times, self._queue, self._waiting_total, self._compute = (np.full((self._num_rows, 0), np.nan),) * 4
        # The last scrape of each Pod: waiting in both places, running, part of the KV cache.
        self._waiting, self._running, self._kv = (np.full(0, np.nan),) * 3
        keep = math.ceil(settings.delay_seconds / settings.evaluation_seconds) + 2
        self._records: deque[Records] = deque(maxlen=keep)

    def next_row(self) -> None:
        """A new interval begins."""
        self._row = (self._row + 1) % self._num_rows
        self._times[self._row] = np.nan

    def scrape(self, now: float, pods: Numbers) -> None:
        """These answer; the fleet must be settled."""
        if not len(pods):
            return
        self._widen(int(pods.max()) + 1)
        gauges, row = self._fleet.gauges(pods), self._row
        self._times[row, pods] = now
        self._queue[row, pods] = gauges.queue_seconds
        self._waiting_total[row, pods] = gauges.waiting_seconds
        self._compute[row, pods] = gauges.compute_seconds
        self._waiting[pods] = gauges.pending + gauges.waiting
        self._running[pods] = gauges.running
        self._kv[pods] = gauges.kv_fraction

    def forget(self, pod: int) -> None:
        """Its target is gone: no record outlives it. A new Pod with the number begins anew."""
        if pod >= len(self._waiting):
            return
        self._times[:, pod] = np.nan
        self._waiting[pod] = self._running[pod] = self._kv[pod] = np.nan
        for _, values in (*self._waiting_running, *self._current):
            if pod < len(values):
                values[pod] = np.nan

    def evaluate(self, now: float) -> Records:
        requests = self._waiting + self._running
        ratio = self._ratio(now, requests) if self._has_ratio else np.full(len(requests), np.nan)
        records = Records(now, {"concurrency": requests, "queueComputeRatio": ratio, "kvCache": self._kv.copy()})
        self._records.append(records)
        return records

    def _ratio(self, now: float, requests: Floats) -> Floats:
        """triton:queue_compute:ratio, and what it is made of."""
        requests_slots = requests / self._slots
        waiting_running = self._waiting / np.maximum(self._running, 1)
        self._waiting_running.append((now, waiting_running))
        least = _over_time(np.fmin, self._waiting_running, now - _WAITING_RUNNING_WINDOW)
        self._current.append((now, np.maximum(np.maximum(requests_slots - 1, 0), least)))
        least = _over_time(np.fmin, self._current, now - self.settings.window_seconds)
        most = _over_time(np.fmax, self._current, now - self.settings.window_seconds)
        rate = self._queue_compute_rate(now)
        ratio = np.minimum(np.maximum(rate, least), most)  # NaN where there is no rate
        ratio[np.isnan(self._running)] = np.nan
        return ratio

    def query(self, now: float) -> Records | None:
        """The newest records that are as old as answers are. None: nothing was evaluated yet."""
        newest = None
        for records in self._records:
            if records.seconds <= now - self.settings.delay_seconds:
                newest = records
        return newest

    def _queue_compute_rate(self, now: float) -> Floats:
        """triton:queue_compute:rate"""
        queued, computed = self._rates(now, self.settings.window_seconds, self._num_short_rows, None)
        without = np.isnan(computed) & ~np.isnan(self._running)
        if without.any():
            pods = np.flatnonzero(without)
            queued[pods], computed[pods] = self._rates(now, _LONG_RATE, self._num_rows, pods)
        return queued / np.maximum(computed, 1)

    def _rates(self, now: float, window: float, num_rows: int, pods: Numbers | None) -> tuple[Floats, Floats]:
        """Of the seconds waited and of those computed; NaN with fewer than two samples in the window."""
        rows = [(self._row - back) % self._num_rows for back in range(num_rows - 1, -1, -1)]
        where = np.ix_(rows, range(self._times.shape[1]) if pods is None else pods)
        times, columns = self._times[where], np.arange(len(self._running) if pods is None else len(pods))
        is_inside = (times > now - window) & (times <= now)
        number = is_inside.sum(axis=0)
        first = is_inside.argmax(axis=0)
        last = num_rows - 1 - is_inside[::-1].argmax(axis=0)
        begin, end = times[first, columns], times[last, columns]

        def rate(counter: Floats) -> Floats:
            values = counter[where]
            first_value = values[first, columns]
            return _extrapolated(first_value, values[last, columns] - first_value, begin, end, number, now, window)

        # Each counter is extrapolated by itself, since each has its own zero.
        return rate(self._queue) + rate(self._waiting_total), rate(self._compute)

    def _widen(self, number: int) -> None:
        missing = number - len(self._waiting)
        if missing <= 0:
            return
        rows, column = np.full((self._num_rows, missing), np.nan), np.full(missing, np.nan)
        self._times, self._queue, self._waiting_total, self._compute = (
            np.hstack([old, rows]) for old in (self._times, self._queue, self._waiting_total, self._compute)
        )
        self._waiting, self._running, self._kv = (
            np.concatenate([old, column]) for old in (self._waiting, self._running, self._kv)
        )


def total(values: Floats) -> float | None:
    """sum(...): None where nothing has a value."""
    values = values[~np.isnan(values)]
    return float(values.sum()) if len(values) else None


def of(values: Floats, pods: Numbers) -> Floats:
    """Those that these Pods have; a Pod that is newer than the records has none."""
    found = values[pods[pods < len(values)]]
    return found[~np.isnan(found)]


def _over_time(choose: np.ufunc, history: deque[tuple[float, Floats]], after: float) -> Floats:
    """min_over_time or max_over_time; the newest is as long as there are Pods."""
    _, newest = history[-1]
    result = newest.copy()
    for seconds, values in history:
        if seconds > after:
            result[: len(values)] = choose(result[: len(values)], values)
    return result


def _extrapolated(
    first_value: Floats, increase: Floats, begin: Floats, end: Floats, number: Numbers, now: float, window: float
) -> Floats:
    """rate() of a counter without resets: the increase between two samples, extrapolated as Prometheus does."""
    with np.errstate(all="ignore"):  # of those with too few samples, which get no value below
        sampled = end - begin
        average = sampled / (number - 1)
        to_start, to_end = begin - (now - window), now - end
        # Up to a little more than a usual gap it is taken for granted that the series goes on; else, by half a gap.
        to_start = np.where(to_start >= average * 1.1, average / 2, to_start)
        to_end = np.where(to_end >= average * 1.1, average / 2, to_end)
        # A counter was never below zero.
        to_zero = np.where(increase > 0, sampled * first_value / increase, np.inf)
        to_start = np.minimum(to_start, to_zero)
        result = increase * (sampled + to_start + to_end) / sampled / window
    return np.where(number >= 2, result, np.nan)
