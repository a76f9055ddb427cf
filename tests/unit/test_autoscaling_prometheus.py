"""The simulator's signals against promtool: the same series through monitoring/rules.yaml give the same numbers."""

from __future__ import annotations

import math
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import packed_binaries
import pytest
import yaml
from autoscaling.balancing import ReadyPods, RoundRobin
from autoscaling.offered_load import OpenLoad, poisson_times
from autoscaling.prometheus import RECORDS, Prometheus, PrometheusSettings, of, total
from autoscaling.servers import Fleet, Gauges, ServerModel
from schedules import parse_schedule

ROOT = Path(__file__).resolve().parents[2]
MODEL = ServerModel(slots=8, tokens_per_second=50, prefill_seconds=0.2, kv_tokens=64_000)
SECONDS = 600
SECOND_POD_FROM = 200.0


def load() -> OpenLoad:
    """Idle, one Pod's capacity, twice of that, idle again; answers of 10 s."""
    generator = np.random.default_rng(1)
    times = poisson_times(parse_schedule("0@60s,0.8@60s,2@120s,0.1@1m,1.5@2m,0@3m"), SECONDS, generator)
    return OpenLoad(
        description="",
        seconds=SECONDS,
        times=times,
        input_tokens=np.full(len(times), 100),
        output_tokens=generator.integers(200, 800, len(times)),
    )


def series(name: str, pod: int, labels: str, values: list[float]) -> dict[str, str]:
    text = " ".join("_" if math.isnan(value) else f"{value:.9g}" for value in values)
    return {"series": f'{name}{{instance="{pod}"{labels}}}', "values": text}


def scraped(model: ServerModel, pod: int, samples: list[Gauges | None]) -> list[dict[str, str]]:
    """What a server of this project would have answered; None: it was not there."""

    def column(name: str, factor: float = 1.0) -> list[float]:
        return [math.nan if sample is None else float(getattr(sample, name)[0]) * factor for sample in samples]

    requests, engine = "nv_trt_llm_request_metrics", ', model="tensorrt_llm"'
    places = [math.nan if sample is None else model.slots + model.margin for sample in samples]
    return [
        series(requests, pod, ', request_type="max"', places),
        series(requests, pod, ', request_type="scheduled"', column("running")),
        series(requests, pod, ', request_type="waiting"', column("waiting")),
        series("nv_inference_pending_request_count", pod, engine, column("pending")),
        series("nv_inference_queue_duration_us", pod, engine, column("queue_seconds", 1e6)),
        series("triton_trtllm_waiting_seconds_total", pod, "", column("waiting_seconds")),
        series("triton_trtllm_compute_seconds_total", pod, "", column("compute_seconds")),
        series("nv_trt_llm_kv_cache_block_metrics", pod, ', kv_cache_block_type="fraction"', column("kv_fraction")),
    ]


@pytest.mark.parametrize(
    ("scrape", "evaluation", "kv_tokens"),
    [(15, 15, 64_000), (10, 15, 64_000), (5, 5, 64_000), (30, 15, 64_000), (60, 15, 64_000), (15, 15, 1_600)],
)
def test_signals_are_those_of_the_recording_rules(scrape: int, evaluation: int, kv_tokens: int, tmp_path: Path):
    """With 1,600 tokens of KV cache two to four requests run, and others wait beside free slots."""
    promtool = packed_binaries.find("promtool")
    model = replace(MODEL, kv_tokens=kv_tokens)
    fleet = Fleet(model, load().source(model), RoundRobin())
    fleet.open(0)
    ready = ReadyPods([0])
    fleet.balance(ready)
    prometheus = Prometheus(PrometheusSettings(scrape_seconds=scrape, evaluation_seconds=evaluation), fleet)
    samples: dict[int, list[Gauges | None]] = {0: [], 1: []}
    expected: list[tuple[int, str, int, float]] = []
    for now in range(SECONDS):
        if now == SECOND_POD_FROM:
            fleet.advance(now)
            fleet.open(1)
            ready.add(1)
        if now % scrape == 0:
            fleet.advance(now)
            fleet.settle()
            pods = [0] if now < SECOND_POD_FROM else [0, 1]
            prometheus.next_row()
            prometheus.scrape(now, np.array(pods))
            for pod, taken in samples.items():
                taken.append(fleet.gauges(np.array([pod])) if pod in pods else None)
        if now % evaluation == 0:
            records = prometheus.evaluate(now)
            expected += [
                (now, RECORDS[signal], pod, float(value))
                for signal, values in records.values.items()
                for pod, value in enumerate(values)
            ]

    tests = []
    for now, record, pod, value in expected:
        selector = f'{record}{{instance="{pod}"}}'
        if math.isnan(value):
            tests.append({"expr": selector, "eval_time": f"{now}s", "exp_samples": []})
        else:
            near = f"abs({selector} - {value:.9g}) < bool 1e-6"
            wanted = [{"labels": f'{{instance="{pod}"}}', "value": 1}]
            tests.append({"expr": near, "eval_time": f"{now}s", "exp_samples": wanted})
    rules = (ROOT / "monitoring/rules.yaml").read_text()
    (tmp_path / "rules.yaml").write_text(rules.replace("[1m]", f"[{prometheus.settings.window_seconds:.0f}s]"))
    content = {
        "rule_files": [str(tmp_path / "rules.yaml")],
        "evaluation_interval": f"{evaluation}s",
        "tests": [
            {
                "interval": f"{scrape}s",
                "input_series": scraped(model, 0, samples[0]) + scraped(model, 1, samples[1]),
                "promql_expr_test": tests,
            }
        ],
    }
    path = tmp_path / "simulated.yaml"
    path.write_text(yaml.safe_dump(content))
    done = subprocess.run([promtool, "test", "rules", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (done.stdout + done.stderr)[:4000]
    ratios = [value for _, record, _, value in expected if record == RECORDS["queueComputeRatio"]]
    assert np.nanmax(ratios) > 1  # it was really overloaded


def test_a_pod_that_is_gone_has_no_record_and_its_number_begins_anew():
    fleet = Fleet(MODEL, load().source(MODEL), RoundRobin())
    fleet.open(0)
    fleet.balance(ReadyPods([0]))
    prometheus = Prometheus(PrometheusSettings(), fleet)
    for now in range(0, 240, 15):
        fleet.advance(now)
        fleet.settle()
        prometheus.next_row()
        prometheus.scrape(now, np.array([0]))
        records = prometheus.evaluate(now)
    assert total(records.values["concurrency"]) > 8
    prometheus.forget(0)
    gone = prometheus.evaluate(240).values
    assert [total(values) for values in gone.values()] == [None, None, None]
    fleet.open(0)
    prometheus.next_row()
    prometheus.scrape(241, np.array([0]))
    again = prometheus.evaluate(255).values
    assert total(again["concurrency"]) == 0
    assert total(again["queueComputeRatio"]) is None  # a rate needs two scrapes


def test_answers_are_as_old_as_the_delay():
    fleet = Fleet(MODEL, load().source(MODEL), RoundRobin())
    prometheus = Prometheus(PrometheusSettings(delay_seconds=40), fleet)
    for now in range(0, 120, 15):
        prometheus.evaluate(now)
    assert prometheus.query(110).seconds == 60
    assert prometheus.query(39) is None or prometheus.query(39).seconds <= 0


def test_pods_without_a_value_are_in_no_aggregate():
    values = np.array([1.0, math.nan, 5.0])
    assert total(values) == 6
    assert of(values, np.array([0, 1, 7])).tolist() == [1.0]
