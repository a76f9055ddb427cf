"""What is computed of a recorded run, from raw data made by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from autoscaling.recorded_report import make_report, recorded_run, write_all
from autoscaling.recorded_run import read_recorded_run


def request(due: float, first: float | None, end: float, tokens: int = 100, outcome: str = "ok") -> dict[str, Any]:
    return {"due": due, "first_token": first, "end": end, "tokens": tokens, "outcome": outcome}


@pytest.fixture
def raw() -> dict[str, Any]:
    """One client, three from 100 to 300 s, one. A second Pod is wanted 12 s after the rise, to 90 s after the fall."""
    replicas = []
    for second in range(400):
        wanted = 2 if 112 <= second < 390 else 1
        ready = 2 if 120 <= second < 391 else 1
        replicas.append([1000.0 + second, wanted, ready, 3 if 100 <= second < 300 else 1])
    return {
        "command": "record",
        "began": 1000.0,
        "ended": 1400.0,
        "slots_per_pod": 8,
        "users_per_client": 7,
        "signals": {"concurrency": "12"},
        "steps": [[1000.0, 1], [1100.0, 3], [1300.0, 1], [1400.0, 0]],
        "replicas": replicas,
        "pods": {"a": {"created": 900.0}, "b": {"created": 1112.0, "ready": 1119.0}},
        "sent_by_client": {"a": 1, "b": 2},
        "requests": [
            request(1010.0, 1010.5, 1020.5),
            request(1260.0, 1262.0, 1282.0, tokens=400),
            request(1310.0, None, 1311.0, tokens=0, outcome="unavailable"),
        ],
        "prometheus": {
            name: {"query": "", "values": [[1000.0, 0.0], [1200.0, 1.0]]}
            for name in ("queue_compute_ratio", "requests_waiting")
        },
    }


def test_times_of_the_loop(raw: dict[str, Any]):
    report = make_report(raw)
    rise, fall = report["steps"][1], report["steps"][2]
    assert (rise["reaction_seconds"], rise["serving_seconds"], rise["settled_seconds"]) == (12.0, 8.0, 12.0)
    assert (fall["reaction_seconds"], fall["serving_seconds"]) == (90.0, None)
    assert report["pod_start_seconds"] == {"number": 1, "median": 7.0, "min": 7.0, "max": 7.0}
    assert report["changes_of_replicas"] == 2
    assert [report["reaction_seconds"][name]["median"] for name in ("up", "down")] == [12.0, 90.0]


@pytest.mark.parametrize(("target", "needed", "overshoot"), [("12", 2, 0), ("21", 1, 1)])
def test_overshoot_is_beyond_what_the_load_needs(raw: dict[str, Any], target: str, needed: int, overshoot: int):
    raw["signals"] = {"concurrency": target}
    report = make_report(raw)
    assert (report["most_needed"], report["overshoot"]) == (needed, overshoot)


def test_every_request_is_counted(raw: dict[str, Any]):
    report = make_report(raw)
    assert report["requests"] == {"all": 3, "ok": 2, "unavailable": 1}
    assert report["not_answered"] == 1
    assert report["time_to_first_token_seconds"]["p50"] == 1.25


def test_tokens_count_where_they_came(raw: dict[str, Any]):
    """20 tokens/s from 1262 to 1282; the last 45 s of the step begin at 1255."""
    assert make_report(raw)["steps"][1]["tokens_per_second_at_end"] == pytest.approx(400 / 45, abs=0.05)


def test_the_simulator_reads_it(raw: dict[str, Any], tmp_path: Path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(recorded_run(raw)))
    recorded = read_recorded_run(path)
    assert recorded.wanted.max() == 2
    assert recorded.schedule is not None and recorded.schedule.level(150) == 21


def test_files_and_table(raw: dict[str, Any], tmp_path: Path):
    table = write_all(raw, tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "run.png", "run.recorded.json"]
    assert "3 requests (3 that clients say they sent), 1 not answered" in table


RECORDED = sorted((Path(__file__).parents[2] / "docs/autoscaling").glob("*.raw.json.gz"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name.partition(".")[0])
def test_reports_in_the_docs_are_what_their_raw_data_say(path: Path):
    with gzip.open(path, "rt") as file:
        raw = json.load(file)
    assert len(raw["requests"]) == sum(raw["sent_by_client"].values())
    for suffix, content in (("json", make_report(raw)), ("recorded.json", recorded_run(raw))):
        assert json.loads(path.with_name(path.name.replace("raw.json.gz", suffix)).read_text()) == content
