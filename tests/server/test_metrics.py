"""What a real server exports is what metric_families.py and docs/metrics.md say, and it is true at every moment."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from measurements import INTER_TOKEN_BUCKETS
from metric_families import FAMILIES
from running_server import Server, ServerError

SECONDS = 20
PROMPT = {"text_input": "Count", "max_tokens": 40}  # two seconds
SAMPLE = re.compile(r"(?P<name>\w+)\{(?P<labels>.*)\} (?P<value>\S+)")


@pytest.fixture(scope="module")
def fresh(build_synthetic: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that nobody has asked anything yet. Its prompts take half a second, its tokens come 20 a second."""
    rates = ("tokens_per_second=20,prefill_seconds=0.5", "--max-batch-size", "4", "--max-seq-len", "1000")
    with Server(build_synthetic(*rates), tmp_path_factory.mktemp("metrics") / "log") as server:
        yield server


Samples = dict[str, dict[str, float]]


def scrape(server: Server) -> Samples:
    """name -> {labels -> value}, of everything that a model of ours exports."""
    samples: Samples = {}
    for line in server.get("/metrics", server.metrics_port).splitlines():
        if (match := SAMPLE.fullmatch(line)) and match["name"].startswith(("nv_trt_llm", "nv_llm", "triton_trtllm")):
            samples.setdefault(match["name"], {})[match["labels"]] = float(match["value"])
    return samples


def test_before_the_first_request_everything_is_there_and_zero(fresh: Server):
    samples = scrape(fresh)
    expected = {
        name
        for family in FAMILIES
        for name in (
            [f"{family.name}_{part}" for part in ("bucket", "sum", "count")]
            if family.kind == "histogram"
            else [family.name]
        )
    }
    assert set(samples) == expected
    for family in FAMILIES:
        if family.kind == "gauge":
            continue
        for name, values in samples.items():
            if name.startswith(family.name):
                assert set(values.values()) == {0.0}, name
    requests, blocks = samples["nv_trt_llm_request_metrics"], samples["nv_trt_llm_kv_cache_block_metrics"]
    assert sum(requests.values()) == fresh.metric("nv_trt_llm_request_metrics", request_type="max") == 5
    assert fresh.metric("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="used") == 0
    assert len(blocks) == 5


def test_every_family_has_its_kind_and_a_description(fresh: Server):
    page = fresh.get("/metrics", fresh.metrics_port)
    for family in FAMILIES:
        assert f"# TYPE {family.name} {family.kind}\n" in page
        assert f"# HELP {family.name} {family.description}\n" in page


def test_every_metric_has_the_labels_of_the_model(fresh: Server):
    for name, values in scrape(fresh).items():
        for labels in values:
            assert 'model="tensorrt_llm"' in labels, name
            assert 'version="1"' in labels, name


def value(server: Server, name: str, **labels: str) -> float:
    return server.metric(f"triton_trtllm_{name}", **labels)


def test_while_a_request_runs_it_can_be_seen_running(fresh: Server):
    """Not only when it has ended."""
    with ThreadPoolExecutor() as pool:
        future = pool.submit(fresh.generate, **PROMPT)
        seen: list[dict[str, float]] = []
        while not future.done():
            seen.append(
                {
                    kind: fresh.metric("nv_trt_llm_request_metrics", request_type=kind)
                    for kind in ("active", "scheduled", "context", "waiting")
                }
                | {name: value(fresh, name) for name in ("compute_seconds_total", "generated_tokens_total")}
                | {"blocks": fresh.metric("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="used")}
            )
            time.sleep(0.05)
    assert {row["active"] for row in seen} <= {0, 1}
    running = [row for row in seen if row["active"]]
    assert {row["context"] for row in running} == {0, 1}  # its prompt first, then its tokens
    assert {row["blocks"] for row in running} >= {2}  # 41 tokens and some
    for name in ("compute_seconds_total", "generated_tokens_total"):
        values = [row[name] for row in running]
        assert values == sorted(values)
        assert len(set(values)) > 5  # it grows meanwhile


def test_when_a_request_has_ended_all_of_it_is_counted(fresh: Server):
    names = {
        "prompt": ("prompt_tokens_total", {}),
        "generated": ("generated_tokens_total", {}),
        "ended": ("requests_total", {"finish_reason": "length"}),
        "gaps": ("inter_token_seconds_count", {}),
        "gap seconds": ("inter_token_seconds_sum", {}),
        "first tokens": ("time_to_first_token_seconds_count", {}),
        "first token seconds": ("time_to_first_token_seconds_sum", {}),
        "request seconds": ("request_seconds_sum", {}),
        "queue seconds": ("queue_seconds_sum", {}),
        "compute seconds": ("compute_seconds_total", {}),
        "waiting seconds": ("waiting_seconds_total", {}),
    }
    before, earlier = {}, None
    while before != earlier:  # until all of the test before is counted, which takes 0.1 s
        before, earlier = {key: value(fresh, name, **labels) for key, (name, labels) in names.items()}, before
        time.sleep(0.3)
    prompt_tokens = fresh.generate(**PROMPT)["num_input_tokens"]
    deadline = time.monotonic() + SECONDS
    while value(fresh, "requests_total", finish_reason="length") == before["ended"] and time.monotonic() < deadline:
        time.sleep(0.05)
    more = {key: value(fresh, name, **labels) - before[key] for key, (name, labels) in names.items()}
    assert (more["prompt"], more["generated"], more["ended"]) == (prompt_tokens, 40, 1)
    assert (more["gaps"], more["first tokens"]) == (39, 1)
    assert more["gap seconds"] == pytest.approx(39 / 20, rel=0.1)
    assert 0.5 <= more["first token seconds"] < 1.5
    assert more["gap seconds"] + more["first token seconds"] == pytest.approx(more["request seconds"], abs=0.2)
    assert more["compute seconds"] == pytest.approx(more["request seconds"], abs=0.3)
    assert more["queue seconds"] < 0.3
    assert more["waiting seconds"] < 0.3


def test_buckets_of_the_time_between_tokens_are_those_of_a_histogram(fresh: Server):
    bounds = [f"{bound:g}" for bound in INTER_TOKEN_BUCKETS] + ["+Inf"]
    counts = [value(fresh, "inter_token_seconds_bucket", le=bound) for bound in bounds]
    assert counts == sorted(counts)
    assert counts[-1] == value(fresh, "inter_token_seconds_count") > 0
    assert counts[bounds.index("0.075")] > 0.8 * counts[-1]  # 50 ms, on a machine that is not too busy
    assert counts[bounds.index("0.01")] < 0.2 * counts[-1]


def test_a_request_that_is_wrong_for_the_engine_is_counted_as_invalid(fresh: Server):
    before = value(fresh, "requests_total", finish_reason="invalid")
    with pytest.raises(ServerError):
        fresh.generate(**PROMPT, temperature=-1.0)
    deadline = time.monotonic() + SECONDS
    while value(fresh, "requests_total", finish_reason="invalid") == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert value(fresh, "requests_total", finish_reason="invalid") == before + 1
    assert value(fresh, "requests_total", finish_reason="failed") == 0


def test_every_engine_fills_them(server: Server):
    """The one that the session shares, whatever it has been asked so far."""
    before = {name: value(server, name) for name in ("generated_tokens_total", "compute_seconds_total")}
    assert server.generate(text_input="Count", max_tokens=50, end_id=-1)["num_output_tokens"] == 50
    deadline = time.monotonic() + SECONDS
    while value(server, "generated_tokens_total") < before["generated_tokens_total"] + 50:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert value(server, "compute_seconds_total") > before["compute_seconds_total"]
    assert value(server, "inter_token_seconds_count") >= 49
    assert server.metric("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="max") > 0
