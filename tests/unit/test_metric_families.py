"""What is exported is what docs/metrics.md says, and what it is made of."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from generation import EngineStats
from measurements import INTER_TOKEN_BUCKETS, Measurements, Taken
from metric_families import FAMILIES, gauges, increments, observations

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/metrics.md"


def documented() -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """name -> kind, label, values, of the first table."""
    rows = {}
    for line in DOCUMENT.read_text().split("## Triton's own")[0].splitlines():
        if line.startswith("| `"):
            name, kind, label, *_ = (cell.strip() for cell in line.strip("|").split("|"))
            words = re.findall(r"`([^`]+)`", label)
            rows[name.strip("`")] = (kind, words[0] if words else "", tuple(words[1:]))
    return rows


def test_the_table_in_the_documents_is_the_one_in_the_code():
    in_code = {family.name: (family.kind, family.label) for family in FAMILIES}
    assert {name: row[:2] for name, row in documented().items()} == in_code


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.label and f.label != "le"], ids=lambda f: f.name)
def test_the_documents_have_every_value_of_a_label(family):
    assert set(documented()[family.name][2]) == set(family.values)


def test_names_are_unique_and_prometheus_style():
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"(nv_trt_llm|nv_llm|triton_trtllm)_[a-z_]+", name) for name in names)


STATS = EngineStats(
    num_active_requests=3,
    num_scheduled_requests=2,
    num_context_requests=1,
    kv_blocks_max=10,
    kv_blocks_used=4,
    kv_tokens_per_block=32,
)


def everything() -> Taken:
    counted = Measurements(4)
    counted.arrived(7)
    counted.waited(2_000_000)
    counted.first_token(3_000_000)
    counted.tokens(1, None)
    counted.tokens(4, 40_000_000)
    counted.tokens(1, 9_000_000_000)
    counted.refused("queue_full")
    counted.ended("length", 0.5, [(7, 6)])
    return counted.take()


def test_every_counter_and_histogram_is_made_of_something():
    taken = everything()
    fed = {name for (name, _), _ in increments(taken)} | {name for (name, _), _ in observations(taken)}
    assert fed == {family.name for family in FAMILIES if family.kind != "gauge"}


def test_every_value_belongs_to_a_metric_that_is_declared():
    taken = everything()
    declared = {(family.name, value) for family in FAMILIES for value in family.values}
    used = {key for key, _ in increments(taken)} | {key for key, _ in observations(taken)} | set(gauges(STATS, 3, 9))
    assert used <= declared
    assert set(gauges(STATS, 3, 9)) == {(f.name, v) for f in FAMILIES if f.kind == "gauge" for v in f.values}


def test_buckets_are_cumulative_and_end_with_the_count():
    values = dict(increments(everything()))
    bounds = [*(f"{bound:g}" for bound in INTER_TOKEN_BUCKETS), "+Inf"]
    buckets = [values["triton_trtllm_inter_token_seconds_bucket", bound] for bound in bounds]
    assert buckets == sorted(buckets)
    assert buckets[bounds.index("0.005")] == 0
    assert buckets[bounds.index("0.01")] == 4
    assert buckets[-1] == values["triton_trtllm_inter_token_seconds_count", ""] == 5
    assert values["triton_trtllm_inter_token_seconds_sum", ""] == pytest.approx(9.04)


@pytest.mark.parametrize(
    ("in_flight", "scheduled", "expected"),
    [
        (0, 5, {"active": 0, "scheduled": 0, "waiting": 0}),  # the engine's own numbers are a moment older
        (3, 2, {"active": 3, "scheduled": 2, "waiting": 1}),
        (9, 8, {"active": 9, "scheduled": 8, "waiting": 1}),
    ],
)
def test_gauges_of_requests_fit_each_other(in_flight: int, scheduled: int, expected: dict[str, int]):
    stats = replace(
        STATS, num_active_requests=scheduled, num_scheduled_requests=scheduled, num_context_requests=scheduled
    )
    values = gauges(stats, in_flight, 9)
    assert {kind: values["nv_trt_llm_request_metrics", kind] for kind in expected} == expected
    assert values["nv_trt_llm_request_metrics", "context"] <= expected["scheduled"]
    assert values["nv_trt_llm_kv_cache_block_metrics", "fraction"] == 0.4


def test_an_engine_without_a_kv_cache_has_an_empty_one():
    stats = replace(STATS.when_idle(), kv_blocks_max=0)
    assert gauges(stats, 0, 9)["nv_trt_llm_kv_cache_block_metrics", "fraction"] == 0.0
