"""Whole runs of the autoscaling simulator, and its command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulate_autoscaling
from autoscaling import options
from autoscaling.recommendation import recommend
from autoscaling.recorded_run import compare, read_recorded_run
from autoscaling.results import Objective, offered_concurrency, summarize
from autoscaling.simulation import Autoscaling, Run, simulate

OBJECTIVE = Objective(seconds=2, share=0.95)
STEP = "--rate 2@5m,12@15m,2@15m --output-tokens 251 --prefill-seconds 0 --max-replicas 10"  # answers of 5 s


def setting_of(text: str) -> Any:
    arguments = options.parser().parse_args(text.split())
    setting = simulate_autoscaling.read_setting(arguments, None)
    targets = (arguments.signal or [(simulate_autoscaling.default_target(setting.server),)])[0]
    return replace(setting, autoscaling=replace(setting.autoscaling, targets=targets))


def run_of(text: str) -> Run:
    return simulate(setting_of(text))


def wanted_at(run: Run, seconds: float) -> int:
    return int(run.timeline["replicas_wanted"][np.searchsorted(run.timeline["time_seconds"], seconds)])


def test_the_same_seed_is_the_same_run_and_another_is_not():
    first, again, other = run_of(STEP), run_of(STEP), run_of(f"{STEP} --seed 2")
    assert first.scalings == again.scalings
    assert (first.first_token_seconds == again.first_token_seconds).all()
    assert first.scalings != other.scalings


def test_every_request_is_answered_once_and_none_is_cut():
    run = run_of(STEP)
    assert len(run.arrivals) == len(run.setting.load.times)
    assert (run.arrivals == run.setting.load.times).all()
    assert run.ledger.cut == 0


def test_a_step_is_followed_up_within_the_loop_and_down_after_the_window():
    run = run_of(f"{STEP} --signal concurrency=12 --scrape-interval 5s --evaluation-interval 5s")
    ups = [scaling for scaling in run.scalings if scaling.after > scaling.before and scaling.seconds > 300]
    assert 300 < ups[0].seconds <= 300 + 5 + 5 + 15 + 15  # and a sync's worth, until enough requests have come
    # 60 requests are in flight, with a deviation of 8; the most of a window's 20 looks is near 75, and 75 / 12 is 6.3.
    assert wanted_at(run, 1100) in (6, 7)
    [drop] = [scaling.seconds for scaling in run.scalings if scaling.before >= 5 and scaling.after <= 3]
    assert 1200 + 270 < drop < 1200 + 300 + 60
    assert wanted_at(run, 2090) <= 2  # 10 in flight for a target of 12: now and then there are 14


def test_a_steady_load_in_the_middle_of_a_target_never_scales():
    run = run_of("--concurrency 30@30m --output-tokens 251 --begin-with 3 --signal concurrency=10 --max-replicas 6")
    assert run.scalings == []


def test_without_a_gpu_a_pod_is_pending_and_the_loop_does_not_climb_for_ever():
    run = run_of(f"{STEP} --gpus 3 --signal concurrency=12")
    assert run.timeline["replicas_ready"].max() == 3
    assert run.timeline["replicas_pending"].max() > 0
    assert run.timeline["replicas_wanted"].max() <= 10
    assert run.timeline["replicas_pending"][-1] == 0


# Two Pods too many, each of which has streams of two minutes when it is told to go.
TWO_TOO_MANY = (
    "--begin-with 4 --max-replicas 4 --slots 8 --output-tokens 6001 --signal concurrency=8 --scale-down-window 0"
)


def test_gpus_of_a_pod_that_drains_are_taken_until_it_has_ended():
    run = run_of(f"{TWO_TOO_MANY} --concurrency 16@45s,40@10m --gpus 4 --drain 10m")
    timeline = run.timeline
    taken = timeline["replicas_draining"] + timeline["replicas_ready"] + timeline["replicas_starting"]
    assert taken.max() == 4
    assert ((timeline["replicas_draining"] > 0) & (timeline["replicas_pending"] > 0)).any()
    assert timeline["replicas_ready"][-1] == 4
    assert run.ledger.cut == 0


def test_a_pod_that_is_killed_before_its_streams_end_cuts_them():
    patient, hasty = (run_of(f"{TWO_TOO_MANY} --concurrency 16@10m --drain {drain}") for drain in ("10m", "5s"))
    assert patient.ledger.cut == 0
    assert hasty.ledger.cut >= 8  # the four streams of each


@pytest.mark.parametrize("mode", ["keda", "hpa"])
@pytest.mark.parametrize(
    ("signal", "pods"),
    [
        ("concurrency=8", 5),  # 40 / 8
        ("queueComputeRatio=0.5", 8),  # 32 wait for 8 slots: 4 / 0.5
        ("kvCache=0.8 --kv-tokens 2000", 2),  # one that is full: 1 / 0.8
        ("concurrency=8+queueComputeRatio=0.5", 8),
    ],
)
def test_pods_that_load_are_credited_whatever_the_signal(mode: str, signal: str, pods: int):
    """A sum, or a Pods metric, over a target arrives at its number, and does not climb while engines load."""
    load = "--concurrency 2@5m,40@20m --slots 8 --output-tokens 251 --engine-load 120s --max-replicas 40"
    run = run_of(f"{load} --signal {signal} --mode {mode}")
    before_the_first_is_ready = run.timeline["time_seconds"] < 300 + 120
    assert run.timeline["replicas_wanted"][before_the_first_is_ready].max() == pods


@pytest.mark.parametrize("mode", ["keda", "hpa"])
def test_both_modes_arrive_at_the_same_number(mode: str):
    run = run_of(f"--concurrency 4@2m,48@20m --output-tokens 251 --signal concurrency=12 --mode {mode}")
    assert wanted_at(run, 1200) == 4


def test_a_slow_start_keeps_users_waiting_longer():
    quick, slow = (
        summarize(run_of(f"{STEP} --signal concurrency=10 --engine-load {start}"), OBJECTIVE, "")
        for start in ("20", "180")
    )
    assert slow.first_token_p95 > quick.first_token_p95


def test_pod_time_is_the_integral_of_the_pods_that_exist():
    run = run_of(f"{STEP} --signal concurrency=12")
    timeline = run.timeline
    existing = timeline["replicas_wanted"] + timeline["replicas_draining"]
    assert run.pod_seconds == pytest.approx(existing.mean() * run.seconds, rel=0.01)


def test_offered_concurrency_is_littles_law():
    run = run_of("--rate 8@30m --output-tokens 251 --prefill-seconds 0 --max-replicas 10")
    assert offered_concurrency(run)[50:].mean() == pytest.approx(8 * 5, rel=0.05)


def test_the_recommendation_is_within_its_own_bounds_and_holds():
    setting = setting_of("--pattern ramp --low 1 --high 20 --output-tokens 251 --max-replicas 20")
    recommendation = recommend(setting, OBJECTIVE)
    assert 1 <= recommendation.autoscaling.targets[0].value <= 16
    assert summarize(simulate(replace(setting, autoscaling=recommendation.autoscaling)), OBJECTIVE, "").holds


def test_a_slower_pod_start_never_asks_for_fewer_pods():
    fewest = []
    for start in (20, 120, 600):
        setting = setting_of(f"--pattern sawtooth --low 1 --high 20 --max-replicas 20 --engine-load {start}")
        spec: Autoscaling = recommend(setting, OBJECTIVE).autoscaling
        fewest.append(spec.behavior.min_replicas / spec.targets[0].value)
    assert fewest == sorted(fewest)


def test_a_search_ends_with_a_target_that_holds_beside_one_that_does_not(capsys: pytest.CaptureFixture[str]):
    text = "--pattern ramp --low 1 --high 20 --output-tokens 251 --max-replicas 20 --slots 8 --search --json"
    assert simulate_autoscaling.main(text.split()) == 0
    content = json.loads(capsys.readouterr().out)
    tried = {result["name"]: result["holds"] for result in content["results"] if result["name"].startswith("tried")}
    found = content["recommendation"]["targets"]["concurrency"]
    assert content["results"][-1]["holds"]
    assert tried[f"tried concurrency={found:g}"]
    assert found == 8 or not tried[f"tried concurrency={found + 1:g}"]


def recorded(run: Run, path: Path) -> Path:
    times, wanted = run.timeline["time_seconds"], run.timeline["replicas_wanted"]
    p50, p95 = np.quantile(run.first_token_seconds, (0.5, 0.95))
    content = {
        "time_seconds": times.tolist(),
        "replicas_wanted": wanted.tolist(),
        "replicas_ready": run.timeline["replicas_ready"].tolist(),
        "delays": {"time_to_first_token": {"p50": p50, "p95": p95}},
    }
    path.write_text(json.dumps(content))
    return path


def test_a_run_compared_with_itself_is_not_off(tmp_path: Path):
    run = run_of(STEP)
    differences = compare(read_recorded_run(recorded(run, tmp_path / "run.json")), run)
    assert len(differences) == 6
    assert all(difference.recorded == pytest.approx(difference.simulated, abs=15.1) for difference in differences)
    assert all(difference.holds is not False for difference in differences)


def test_a_comparison_that_is_off_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "run.json"
    content = {"time_seconds": [0, 300, 600], "replicas_wanted": [1, 4, 4], "replicas_ready": [1, 1, 4],
               "offered": {"kind": "concurrency", "values": [4, 4, 4]}}  # fmt: skip
    path.write_text(json.dumps(content))
    assert simulate_autoscaling.main(["--compare", str(path), "--no-recommendation"]) == 1
    assert "NOT within tolerance" in capsys.readouterr().out


def test_a_trace_of_the_load_client_is_simulated_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trace, picture = tmp_path / "trace.jsonl", tmp_path / "run.png"
    lines = [{"time": at / 2, "input_tokens": 100, "output_tokens": 100} for at in range(600)]
    lines[1] = {"time": 0.5, "prompt": "What is the capital of France?"}
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert simulate_autoscaling.main(["--trace", str(trace), "--json", "--plot", str(picture)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [result["requests"] for result in content["results"]] == [600, 600]
    assert content["recommendation"]["targets"]["concurrency"] >= 1
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no load; give --trace, --rate, --concurrency or --pattern"),
        ("--rate 5", "--rate never ends; give --duration"),
        ("--pattern step --low 5 --high 2", "--low 5 is above --high 2; swap them"),
        ("--rate 5@1m --min-replicas 9", "--min-replicas 9 is above --max-replicas 8; swap or raise one"),
        (
            "--rate 5@1m --gpus 1 --min-replicas 2",
            "--gpus 1 are too few for the 2 Pods at the start with 1 each; give at least 2",
        ),
        ("--rate 5@1m --signal kvCache=0.9", "--signal kvCache needs a KV cache that can be full; give --kv-tokens"),
        (
            "--concurrency 0@1m,5@1m --duration 30",
            "no request comes within 30 s; give a longer --duration",
        ),
        (
            "--rate 5@1m --plot run.jpg2",
            "--plot run.jpg2 has the ending '.jpg2'; it must be one of .png,",
        ),
        ("--rate 5@1m --plot /no/run.png", "--plot /no/run.png is in a folder that does not exist; make /no first"),
        ("--rate 5@1m --prefill-seconds 3", "--first-token-within 2 is not above the prefill of 3.00 s"),
    ],
)
def test_options_that_do_not_go_together_are_refused(text: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert simulate_autoscaling.main(text.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--signal concurency=5", "'concurency' is no signal; perhaps you meant 'concurrency'"),
        ("--signal concurrency", "'concurrency' has no target; write concurrency=NUMBER"),
        ("--signal kvCache=1+kvCache=2", "has kvCache twice"),
        ("--scale-up-policies pod:4:15", "'pod:4:15' is no policy; write pods:4:15"),
        ("--scale-up-policies pods:4:3600", "the value is at least 1, the period 1 to 1800 s"),
        ("--engine-load uniform:9:1", "write uniform:1:9"),
    ],
)
def test_an_option_that_is_wrong_is_refused(text: str, message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        simulate_autoscaling.main(["--rate", "5@1m", *text.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "it is no JSON object"),
        ({"time_second": []}, "'time_second' is no key of a recorded run; perhaps you meant 'time_seconds'"),
        ({"time_seconds": [0]}, "time_seconds must have at least two times, rising from 0 or later"),
        ({"time_seconds": [0, 1]}, "replicas_wanted must be a list of numbers, none below 0"),
        ({"time_seconds": [0, 1], "replicas_wanted": [1]}, "replicas_wanted has 1 values for 2 times"),
        ({"time_seconds": [0, 1], "offered": {"kind": "users"}}, "offered.kind is 'users'; it must be 'rate' or"),
        ({"time_seconds": [0, 1], "replicas_wanted": [1, 1], "delays": {"ttft": {}}}, "delays has 'ttft'"),
        (
            {"time_seconds": [0, 1], "replicas_wanted": [1, 1], "delays": {"queue": {"mean": 1}}},
            "percentiles are named",
        ),
    ],
)
def test_a_recorded_run_that_is_wrong_is_refused(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    assert simulate_autoscaling.main(["--compare", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("shift", "holds"), [(20, True), (200, False)])
def test_a_comparison_allows_a_curve_to_be_one_round_of_the_loop_late(shift: int, holds: bool, tmp_path: Path):
    run = run_of(f"{STEP} --signal concurrency=12")
    path = tmp_path / "run.json"
    times, wanted = run.timeline["time_seconds"], run.timeline["replicas_wanted"]
    content = {"time_seconds": [0, *(times[1:] + shift).tolist()], "replicas_wanted": wanted.tolist()}
    path.write_text(json.dumps(content))
    assert compare(read_recorded_run(path), run)[0].holds is holds
