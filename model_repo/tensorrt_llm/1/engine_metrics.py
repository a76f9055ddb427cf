"""Exports what metric_families.py names to Triton's Prometheus endpoint, ten times a second."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable, Mapping

import triton_python_backend_utils as pb_utils
from measurements import Taken
from metric_families import FAMILIES, Family, Key, increments, observations

_log = logging.getLogger(__name__)

# NVIDIA's default `stats_check_period_ms`: a number is at most this old, also when nothing runs any more.
PERIOD_SECONDS = 0.1
REFRESH_SECONDS = 1.0


class EngineMetrics:
    """A thread of its own, since each change costs a round trip to Triton of 30 to 70 microseconds.

    `gauges` gives the numbers of this moment, of which only changes are sent; `take` what has come together since it
    was last called. All metrics are there from the beginning, with zeros.
    """

    def __init__(self, labels: Mapping[str, str], gauges: Callable[[], Mapping[Key, float]], take: Callable[[], Taken]):
        self._gauges, self._take = gauges, take
        self._families = {family.name: _declare(family) for family in FAMILIES}
        self._metrics = {
            (family.name, value): self._make_metric(family, value, labels)
            for family in FAMILIES
            for value in family.values
        }
        self._last: dict[Key, float] = {}
        self._next_refresh = 0.0
        self._update()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The metrics stay, at their last values, with their families.

        During a reload the next `tensorrt_llm` has the same ones already, and in tritonserver 2.51 deleting a metric
        that two models have leaves the other one with a dangling pointer: /metrics and every request hang then.
        """
        self._stopping.set()
        self._thread.join()
        self._update()
        for each in (*self._metrics.values(), *self._families.values()):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))  # so that their destructors never run

    def _make_metric(self, family: Family, value: str, labels: Mapping[str, str]):
        all_labels = {**labels, family.label: value} if family.label else dict(labels)
        buckets = {"buckets": list(family.buckets)} if family.buckets else {}
        return self._families[family.name].Metric(labels=all_labels, **buckets)

    def _run(self) -> None:
        while not self._stopping.wait(PERIOD_SECONDS):
            try:
                self._update()
            except Exception:
                _log.exception("metrics could not be updated")

    def _update(self) -> None:
        if time.monotonic() >= self._next_refresh:
            # During a reload two models share each metric, and the older one may have the last word.
            self._next_refresh = time.monotonic() + REFRESH_SECONDS
            self._last.clear()
        for key, value in self._gauges().items():
            if self._last.get(key) != value:
                self._metrics[key].set(value)
                self._last[key] = value
        taken = self._take()
        for key, value in observations(taken):
            self._metrics[key].observe(value)
        for key, value in increments(taken):
            if value:
                self._metrics[key].increment(value)


def _declare(family: Family):
    kind = getattr(pb_utils.MetricFamily, family.kind.upper())
    return pb_utils.MetricFamily(name=family.name, description=family.description, kind=kind)
