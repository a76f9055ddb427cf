"""What the chart's autoscalers ask, and how fast they may change the pool.

KEDA's queries are taken from the rendered ScaledObject and answered by promtool.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import packed_binaries
import pytest
import yaml
from autoscaling.prometheus import PrometheusSettings
from rendering import CHART, EXAMPLES, ROOT, RefusedError, render, render_text

RECORDS = {
    "concurrency": "triton:requests:current",
    "queueComputeRatio": "triton:queue_compute:ratio",
    "kvCache": "triton:kv_cache:fraction",
}
# Numbers whose multiples are exact.
TARGETS: dict[str, float] = {"concurrency": 8, "queueComputeRatio": 1, "kvCache": 0.5}
COMBINATIONS = [["concurrency"], ["queueComputeRatio"], ["kvCache"], ["concurrency", "kvCache"], list(RECORDS)]


@pytest.fixture(scope="module")
def helm() -> Path:
    return packed_binaries.find("helm")


def autoscaling(mode: str, *signals: str, **others: Any) -> dict[str, Any]:
    targets = {signal: TARGETS[signal] if signal in signals else None for signal in RECORDS}
    return {"autoscaling": {"mode": mode, "signals": targets, **others}, "monitoring": {"enabled": True}}


def behavior(helm: Path, mode: str, *signals: str, **others: Any) -> dict[str, Any]:
    objects = render(helm, values=autoscaling(mode, *signals, **others))
    if mode == "hpa":
        return objects["HorizontalPodAutoscaler/llm"]["spec"]["behavior"]
    return objects["ScaledObject/llm"]["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]


# ---- one actuator, any signals


@pytest.mark.parametrize("signals", COMBINATIONS, ids="+".join)
def test_keda_has_a_trigger_per_signal(helm: Path, signals: list[str]):
    spec = render(helm, values=autoscaling("keda", *signals))["ScaledObject/llm"]["spec"]
    assert {trigger["name"] for trigger in spec["triggers"]} == set(signals)
    for trigger in spec["triggers"]:
        assert trigger["metricType"] == "AverageValue"
        assert trigger["metadata"]["threshold"] == f"{TARGETS[trigger['name']]:g}"
        assert trigger["metadata"]["ignoreNullValues"] == "false"  # else no answer would be 0, and the fewest Pods
        assert RECORDS[trigger["name"]] in trigger["metadata"]["query"]
    assert spec["fallback"]["behavior"] == "currentReplicasIfHigher"


@pytest.mark.parametrize("signals", COMBINATIONS, ids="+".join)
def test_the_autoscaler_of_kubernetes_has_a_metric_per_signal(helm: Path, signals: list[str]):
    spec = render(helm, values=autoscaling("hpa", *signals))["HorizontalPodAutoscaler/llm"]["spec"]
    found = {metric["pods"]["metric"]["name"]: metric["pods"]["target"] for metric in spec["metrics"]}
    assert found == {
        RECORDS[signal]: {"type": "AverageValue", "averageValue": f"{TARGETS[signal]:g}"} for signal in signals
    }


def test_the_adapter_serves_what_is_asked_for():
    content = yaml.safe_load((ROOT / "monitoring/prometheus-adapter.yaml").read_text())
    assert content["rules"]["default"] is False
    rules = {rule["seriesQuery"].partition("{")[0]: rule for rule in content["rules"]["custom"]}
    assert set(rules) == set(RECORDS.values())
    for rule in rules.values():
        assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}
        assert "<<.LabelMatchers>>" in rule["metricsQuery"] and "<<.GroupBy>>" in rule["metricsQuery"]


# ---- how fast


@pytest.mark.parametrize("mode", ["keda", "hpa"])
@pytest.mark.parametrize(
    ("start", "up", "down"), [(1, 15, 61), (10, 15, 70), (120, 120, 180), (1800, 1800, 1860), (9000, 1800, 3600)]
)
def test_windows_follow_from_a_pods_start(helm: Path, mode: str, start: int, up: int, down: int):
    assert behavior(helm, mode, "concurrency", "queueComputeRatio", podStartSeconds=start) == {
        "scaleUp": {
            "stabilizationWindowSeconds": 0,
            "selectPolicy": "Max",
            "policies": [
                {"type": "Pods", "value": 4, "periodSeconds": up},
                {"type": "Percent", "value": 100, "periodSeconds": up},
            ],
        },
        "scaleDown": {
            "stabilizationWindowSeconds": down,
            "selectPolicy": "Max",
            "policies": [{"type": "Percent", "value": 100, "periodSeconds": 15}],
        },
    }


@pytest.mark.parametrize(("start", "period"), [(120, 180), (3000, 1800)])
def test_without_concurrency_pods_go_one_by_one(helm: Path, start: int, period: int):
    for signals in (["queueComputeRatio"], ["kvCache"], ["queueComputeRatio", "kvCache"]):
        found = behavior(helm, "keda", *signals, podStartSeconds=start)
        assert found["scaleDown"]["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": period}]


def test_a_behavior_of_ones_own_is_taken_as_it_is(helm: Path):
    own = {"scaleDown": {"selectPolicy": "Disabled"}}
    assert behavior(helm, "keda", "concurrency", behavior=own) == own
    assert behavior(helm, "hpa", "concurrency", behavior=own) == own


@pytest.mark.parametrize(
    ("interval", "group", "window"),
    [("1s", "1s", "30s"), ("5s", "5s", "30s"), ("10s", "10s", "40s"), ("15s", "15s", "1m"), ("60s", "15s", "1m")],
)
def test_records_follow_the_scrapes(helm: Path, interval: str, group: str, window: str):
    """They are made as often, of the last four."""
    objects = render(helm, values={"monitoring": {"enabled": True, "scrapeInterval": interval}})
    groups = {found["name"]: found for found in objects["PrometheusRule/llm-rules"]["spec"]["groups"]}
    assert groups["triton-now"]["interval"] == group
    (rate,) = [
        rule["expr"] for rule in groups["triton-now"]["rules"] if rule["record"] == "triton:generated_tokens:rate"
    ]
    assert f"tokens_total[{window}]) or rate(" in rate
    simulated = PrometheusSettings(scrape_seconds=float(interval.removesuffix("s")))
    assert simulated.window_seconds == {"30s": 30, "40s": 40, "1m": 60}[window]


# ---- what it refuses, and what it warns of

REFUSED: list[tuple[dict[str, Any], str]] = [
    (autoscaling("keda"), "autoscaling.mode is keda and none of autoscaling.signals has a target; set concurrency"),
    (autoscaling("hpa"), "autoscaling.mode is hpa and none of autoscaling.signals has a target"),
    (autoscaling("both", "concurrency"), "value must be one of 'none', 'keda', 'hpa'"),
    (autoscaling("keda", requestsPerPod=8), "additional properties 'requestsPerPod' not allowed"),
    (
        {**autoscaling("keda", "concurrency"), "engine": {"maxBatchSize": 7}},
        "autoscaling.signals.concurrency is 8 and engine.maxBatchSize is 7, so every Pod would have a queue",
    ),
    ({"autoscaling": {"signals": {"concurrency": 0}}}, "at '/autoscaling/signals/concurrency': minimum: got 0"),
    ({"autoscaling": {"signals": {"concurrency": "8"}}}, "got string, want null or number"),
    ({"autoscaling": {"signals": {"kvCache": 90}}}, "at '/autoscaling/signals/kvCache': maximum: got 90, want 1"),
    ({"autoscaling": {"signals": {"kvcache": 0.9}}}, "additional properties 'kvcache' not allowed"),
    ({"autoscaling": {"podStartSeconds": 0}}, "at '/autoscaling/podStartSeconds': minimum: got 0, want 1"),
    ({"client": {"replicas": -1}}, "at '/client/replicas': minimum: got -1, want 0"),
]
_FULL = autoscaling("keda", "kvCache")
_FULL["autoscaling"]["signals"]["kvCache"] = 0.95
REFUSED.append((_FULL, "autoscaling.signals.kvCache is 0.95, and Kubernetes lets a tenth above a target pass"))


@pytest.mark.parametrize(("values", "sentence"), REFUSED, ids=lambda value: str(value)[:50])
def test_values_that_make_no_sense_get_a_sentence(helm: Path, values: dict[str, Any], sentence: str):
    with pytest.raises(RefusedError) as refused:
        render_text(helm, "demo-cpu", values)
    assert sentence in str(refused.value)


def test_signals_and_slots_are_no_contradiction_without_an_autoscaler(helm: Path):
    render(helm, values={"engine": {"maxBatchSize": 8}, "autoscaling": {"signals": {"concurrency": 12}}})


def notes(helm: Path, folder: Path, values: dict[str, Any]) -> str:
    """`helm template` leaves NOTES.txt out, so a copy of the chart has them in an object."""
    copy = shutil.copytree(CHART, folder / "chart")
    (copy / "templates/notes.yaml").write_text(
        'kind: Notes\ntext: {{ include (print .Template.BasePath "/NOTES.txt") . | quote }}\n'
    )
    command = [helm, "template", "llm", copy, "--namespace=models", "--kube-version=1.35.0"]
    done = subprocess.run(
        [*command, "--values", EXAMPLES["demo-cpu"], "--values=-", "--show-only=templates/notes.yaml"],
        input=yaml.safe_dump(values),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)["text"]


@pytest.mark.parametrize("mode", ["none", "keda", "hpa"])
def test_the_notes_say_how_to_see_why_it_scales(helm: Path, tmp_path: Path, mode: str):
    said = notes(helm, tmp_path, autoscaling(mode, "concurrency"))
    is_scaled = mode != "none"
    assert ("kubectl -n models describe hpa llm" in said) is is_scaled
    assert ("kubectl -n models get scaledobject llm" in said) is (mode == "keda")
    assert ("/namespaces/models/pods/*/triton:requests:current'" in said) is (mode == "hpa")
    assert ('triton:requests:current{namespace="models", app_kubernetes_io_instance="llm"}' in said) is is_scaled


@pytest.mark.parametrize("signals", COMBINATIONS, ids="+".join)
def test_the_notes_warn_of_a_ratio_alone(helm: Path, tmp_path: Path, signals: list[str]):
    said = notes(helm, tmp_path, autoscaling("keda", *signals))
    assert ("shrinks until there is a queue again" in said) is (signals == ["queueComputeRatio"])


# ---- the load client is measured


def test_prometheus_reads_the_load_client(helm: Path):
    objects = render(helm, values={"client": {"enabled": True, "replicas": 3}, "monitoring": {"enabled": True}})
    client = objects["Deployment/llm-client"]["spec"]
    labels = client["template"]["metadata"]["labels"]
    (container,) = client["template"]["spec"]["containers"]
    (port,) = container["ports"]
    monitors = {
        name: found["spec"]
        for name, found in objects.items()
        if found["kind"] == "PodMonitor" and found["spec"]["selector"]["matchLabels"].items() <= labels.items()
    }
    assert client["replicas"] == 3
    assert f"--prometheus-port={port['containerPort']}" in container["args"]
    assert monitors["PodMonitor/llm-client"]["podMetricsEndpoints"] == [{"port": port["name"], "interval": "15s"}]
    assert len(monitors) == 1


# ---- what KEDA's queries answer

INTERVAL = 15
LENGTH = 75 * 60 // INTERVAL  # samples of a series


def looks(minutes: float) -> int:
    return round(minutes * 60 / INTERVAL)


def over_time(*spans: tuple[float, float | str]) -> list[float | str]:
    """(from which minute on, the value in targets). stale: the series ends; _: nothing was written."""
    values: list[float | str] = []
    for number, (begin, value) in enumerate(spans):
        end = looks(spans[number + 1][0]) if number + 1 < len(spans) else LENGTH
        values += [value] * (end - looks(begin))
    return values


class Prometheus:
    """Series of servers, as promtool takes them."""

    def __init__(self, signal: str):
        self.signal, self.series = signal, []

    def add(self, name: str, values: list[float | str], factor: float, **labels: str) -> None:
        written = [value if isinstance(value, str) else f"{value * factor:g}" for value in values]
        matched = ", ".join(f'{label}="{value}"' for label, value in labels.items() if value)
        self.series.append({"series": f"{name}{{{matched}}}", "values": " ".join(written)})

    def pod(
        self,
        name: str,
        record: list[float | str] | None,
        up: list[float | str] | None = None,
        namespace: str = "models",
        release: str = "llm",
        job: str = "models/llm",
    ) -> None:
        labels = {"namespace": namespace, "app_kubernetes_io_instance": release, "pod": name, "job": job}
        labels |= {"instance": f"{name}:8002", "container": "server", "endpoint": "metrics"}
        if record is not None:
            self.add(RECORDS[self.signal], record, TARGETS[self.signal], **labels)
        self.add("up", over_time((0, 1)) if up is None else up, 1, **labels)


Answers = dict[float, float | None]  # at which minute, in targets; None: no answer
LOST = over_time((0, 1), (5, 0))


def normal(prometheus: Prometheus) -> Answers:
    prometheus.pod("a", over_time((0, 0.5)))
    prometheus.pod("b", over_time((0, 1.5)))
    return {10: 2}


def idle(prometheus: Prometheus) -> Answers:
    prometheus.pod("a", over_time((0, 0)))
    prometheus.pod("b", over_time((0, 0)))
    return {10: 0, 70: 0}


def no_data(prometheus: Prometheus) -> Answers:
    return {10: None}


def loading_pods_count_0(prometheus: Prometheus) -> Answers:
    prometheus.pod("a", over_time((0, 3)))
    prometheus.pod("b", None, up=over_time((0, 0)))
    prometheus.pod("c", over_time((0, "_"), (9, 1)), up=over_time((0, 0), (9, 1)))
    return {8: 3, 10: 4}


def only_loading_pods(prometheus: Prometheus) -> Answers:
    prometheus.pod("a", None, up=over_time((0, 0)))
    return {10: None}


def a_pod_that_is_not_seen_counts_as_its_target(prometheus: Prometheus) -> Answers:
    """After a minute with what it had, at most its target; and after an hour no more."""
    prometheus.pod("a", over_time((0, 0.25)))
    prometheus.pod("b", over_time((0, 3), (5, "stale")), up=LOST)
    return {4.75: 3.25, 5: 1.25, 5.5: 1.25, 6: 1.25, 30: 1.25, 64: 1.25, 66: 0.25}


def a_pod_that_ends_idle_is_no_reason_to_add_one(prometheus: Prometheus) -> Answers:
    prometheus.pod("a", over_time((0, 0.25)))
    prometheus.pod("b", over_time((0, 0), (5, "stale")), up=over_time((0, 1), (5, 0), (5.5, "stale")))
    return {5: 0.25, 5.25: 0.25, 5.5: 0.25, 10: 0.25}


def a_pod_that_is_gone_counts_0_at_once(prometheus: Prometheus) -> Answers:
    prometheus.pod("a", over_time((0, 0.25)))
    prometheus.pod("b", over_time((0, 3), (5, "stale")), up=over_time((0, 1), (5, "stale")))
    return {4.75: 3.25, 5: 0.25, 10: 0.25}


def a_container_that_starts_again_counts_as_its_target(prometheus: Prometheus) -> Answers:
    prometheus.pod("a", over_time((0, 2)))
    prometheus.pod("b", over_time((0, 2), (5, "stale"), (10, 0)), up=over_time((0, 1), (5, 0), (10, 1)))
    return {7: 3, 10: 2}


def no_pod_is_seen(prometheus: Prometheus) -> Answers:
    prometheus.pod("a", over_time((0, 3), (5, "stale")), up=LOST)
    prometheus.pod("b", over_time((0, 0), (5, "stale")), up=LOST)
    return {5.25: 1, 10: 2, 64: 2, 67: None}


def servers_answer_and_records_are_missing(prometheus: Prometheus) -> Answers:
    prometheus.pod("a", over_time((0, 0.5), (5, "stale")))
    prometheus.pod("b", over_time((0, 0.5), (5, "stale")))
    return {5.25: 1, 10: 2}


def prometheus_comes_back_without_its_data(prometheus: Prometheus) -> Answers:
    """`a` is seen first; `b` a quarter of a minute later."""
    prometheus.pod("a", over_time((0, "_"), (10, 1)), up=over_time((0, "_"), (10, 1)))
    prometheus.pod("b", over_time((0, "_"), (10.25, 2)), up=over_time((0, "_"), (10.25, 1)))
    return {10: None, 10.25: None, 10.75: None, 11: 3}


def prometheus_comes_back_with_its_data(prometheus: Prometheus) -> Answers:
    """It was away for ten minutes. Of `b` it knows from before."""
    away: list[tuple[float, float | str]] = [(0, 1), (5, "_")]
    prometheus.pod("a", over_time(*away, (15, 2)), up=over_time(*away, (15, 1)))
    prometheus.pod("b", over_time(*away, (16, 2)), up=over_time(*away, (15, 0), (16, 1)))
    return {14: None, 15: 3, 16: 4}


def nan(prometheus: Prometheus) -> Answers:
    prometheus.pod("a", over_time((0, 1)))
    prometheus.pod("b", over_time((0, 1), (5, "NaN"), (10, 1)))
    return {4: 2, 5: None, 9: None, 10: 2}


def others(prometheus: Prometheus) -> Answers:
    """Another release, another namespace, somebody else's Triton, the load client."""
    prometheus.pod("a", over_time((0, 1)))
    prometheus.pod("b", over_time((0, 5)), release="other")
    prometheus.pod("a", over_time((0, 5)), namespace="elsewhere")
    prometheus.pod("c", over_time((0, 5)), release="")
    prometheus.pod("d", over_time((0, 5), (5, "stale")), up=LOST, release="other")
    prometheus.pod("client", None, job="models/llm-client")
    return {10: 1}


def only_others(prometheus: Prometheus) -> Answers:
    prometheus.pod("b", over_time((0, 5)), release="other")
    prometheus.pod("a", over_time((0, 5)), namespace="elsewhere")
    return {10: None}


def two_monitors_of_the_same_pods(prometheus: Prometheus) -> Answers:
    for job in ("models/llm", "monitoring/all"):
        prometheus.pod("a", over_time((0, 2)), job=job)
        prometheus.pod("b", over_time((0, 2), (5, "stale")), up=LOST, job=job)
    return {4: 4, 5.25: 3, 10: 3}


CASES = [
    normal,
    idle,
    no_data,
    loading_pods_count_0,
    only_loading_pods,
    a_pod_that_is_not_seen_counts_as_its_target,
    a_pod_that_ends_idle_is_no_reason_to_add_one,
    a_pod_that_is_gone_counts_0_at_once,
    a_container_that_starts_again_counts_as_its_target,
    no_pod_is_seen,
    servers_answer_and_records_are_missing,
    prometheus_comes_back_without_its_data,
    prometheus_comes_back_with_its_data,
    nan,
    others,
    only_others,
    two_monitors_of_the_same_pods,
]


@pytest.mark.parametrize("signal", RECORDS)
def test_what_kedas_query_answers(helm: Path, signal: str, tmp_path: Path):
    objects = render(helm, values=autoscaling("keda", signal))
    (trigger,) = objects["ScaledObject/llm"]["spec"]["triggers"]
    tests = []
    for case in CASES:
        prometheus = Prometheus(signal)
        answers = case(prometheus)
        expected = [
            {
                "expr": trigger["metadata"]["query"],
                "eval_time": f"{round(minute * 60)}s",
                "exp_samples": [] if value is None else [{"labels": "{}", "value": value * TARGETS[signal]}],
            }
            for minute, value in answers.items()
        ]
        tests.append(
            {
                "name": case.__name__,
                "interval": f"{INTERVAL}s",
                "input_series": prometheus.series,
                "promql_expr_test": expected,
            }
        )
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"evaluation_interval": f"{INTERVAL}s", "tests": tests}))
    done = subprocess.run(
        [packed_binaries.find("promtool"), "test", "rules", path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
