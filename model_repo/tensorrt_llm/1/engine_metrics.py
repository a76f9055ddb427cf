"""The model's own Prometheus metrics, under the names and labels of NVIDIA's TensorRT-LLM backend."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import triton_python_backend_utils as pb_utils
from generation import Engine, EngineStats

# NVIDIA's default `stats_check_period_ms`: a gauge is at most this old, also when nothing runs any more.
PERIOD_SECONDS = 0.1


def gauge_values(stats: EngineStats, max_requests: int) -> Mapping[str, Mapping[str, float]]:
    """Family -> value of its sub-label -> number. `active` requests have a slot; those beyond are in Triton's queue."""
    used, most = stats.kv_blocks_used, stats.kv_blocks_max
    return {
        "nv_trt_llm_request_metrics": {
            "active": stats.num_active_requests,
            "max": max_requests,
            "scheduled": stats.num_scheduled_requests,
            "waiting": max(0, stats.num_active_requests - stats.num_scheduled_requests),
        },
        "nv_trt_llm_kv_cache_block_metrics": {
            "max": most,
            "free": most - used,
            "used": used,
            "tokens_per": stats.kv_tokens_per_block,
            "fraction": used / most if most else 0.0,
        },
    }


_FAMILIES = {
    "nv_trt_llm_request_metrics": ("request_type", "TRT LLM request metrics"),
    "nv_trt_llm_kv_cache_block_metrics": ("kv_cache_block_type", "TRT LLM KV cache block metrics"),
}


class EngineMetrics:
    """Sets the gauges from a thread of its own; each change costs a round trip to Triton, so only changes are sent."""

    def __init__(self, engine: Engine, labels: Mapping[str, str], max_requests: int):
        self._engine, self._labels, self._max_requests = engine, dict(labels), max_requests
        self._families = {
            name: pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.GAUGE)
            for name, (_, description) in _FAMILIES.items()
        }
        self._gauges: dict[tuple[str, str], object] = {}
        self._last: dict[tuple[str, str], float] = {}
        self._update()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._gauges.clear()  # before their families
        self._families.clear()

    def _run(self) -> None:
        while not self._stopping.wait(PERIOD_SECONDS):
            self._update()

    def _update(self) -> None:
        for family, values in gauge_values(self._engine.stats(), self._max_requests).items():
            for kind, value in values.items():
                if self._last.get((family, kind)) != value:
                    self._gauge(family, kind).set(value)
                    self._last[family, kind] = value

    def _gauge(self, family: str, kind: str):
        if (family, kind) not in self._gauges:
            label, _ = _FAMILIES[family]
            self._gauges[family, kind] = self._families[family].Metric(labels=self._labels | {label: kind})
        return self._gauges[family, kind]
