"""Monitoring objects on a cluster with the Prometheus Operator, and an autoscaler that reads the same numbers.

Prometheus is asked through the API server. kube-state-metrics is played by a Pod that gives, under its names, what the
API server says of this test's Pods and autoscaler; there is no GPU, so the panels of dcgm-exporter are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import dashboard
import pytest
from autoscaled import lost
from cluster_client import Namespace, kubectl, selector, until
from loads import Load
from prometheus import api, ask, exporter, monitor

KINDS = {"podmonitors", "prometheusrules", "scaledobjects"}
MODEL = "demo-gpt2"
SMALL = "resources.cpu=500m"


@pytest.fixture(scope="module")
def watched(make_namespace: Callable[[str], Namespace]) -> Iterator[Namespace]:
    """A release of this name, of one Pod, scraped and scaled; no window hides what its autoscaler thinks."""
    installed = {line.split(".")[0] for line in kubectl("api-resources", "--output=name").split()}
    if missing := KINDS - installed:
        pytest.skip(f"the cluster has no {', '.join(sorted(missing))}")
    namespace = make_namespace("privileged")
    namespace.apply(monitor("kube-state"))
    values = [
        "monitoring.enabled=true",
        "autoscaling.mode=keda",
        "autoscaling.signals.concurrency=8",
        "engine.maxBatchSize=8",
    ]
    values += ["autoscaling.maxReplicas=2", "monitoring.scrapeInterval=5s", SMALL]
    values += ["autoscaling.behavior.scaleDown.stabilizationWindowSeconds=0"]
    namespace.install("watched", *values, f"engine.node.path=/mnt/node/{namespace.name}", wait=240)
    yield namespace
    namespace.helm("uninstall", "watched", "--wait=false")


@pytest.fixture(scope="module")
def load(watched: Namespace, image_tag: str) -> Load:
    (pod,) = watched.ready_pods()
    load = Load(watched, image_tag, "watched", MODEL, node=pod["spec"]["nodeName"], tokens=(20, 60), streams=8, whole=2)
    load.running()
    return load


@pytest.fixture(scope="module")
def service(watched: Namespace, load: Load, image_tag: str) -> Namespace:
    """The release with two Pods, under the load."""
    until("an autoscaler that has a number", lambda: scaler(watched)["status"].get("currentMetrics"), 180)
    until("two servers", lambda: scaler(watched)["status"].get("desiredReplicas") == 2, 120)
    play_kube_state_metrics(watched, image_tag)
    until("kube-state-metrics", lambda: ask(f'kube_pod_created{{namespace="{watched.name}"}}'), 120)
    time.sleep(20)  # for the rules that read it
    return watched


def scaler(namespace: Namespace) -> dict[str, Any]:
    found = namespace.get("horizontalpodautoscalers")
    return found[0] if found else {"status": {}}


def play_kube_state_metrics(namespace: Namespace, image_tag: str) -> None:
    hpa = scaler(namespace)
    of_hpa = f'{{namespace="{namespace.name}",horizontalpodautoscaler="{hpa["metadata"]["name"]}"}}'
    lines = [
        f"kube_horizontalpodautoscaler_status_desired_replicas{of_hpa} {hpa['status']['desiredReplicas']}",
        f"kube_horizontalpodautoscaler_status_current_replicas{of_hpa} {hpa['status']['currentReplicas']}",
        f"kube_horizontalpodautoscaler_spec_max_replicas{of_hpa} {hpa['spec']['maxReplicas']}",
    ]
    for pod in namespace.pods():
        labels = f'namespace="{namespace.name}",pod="{pod["metadata"]["name"]}"'
        lines.append(f"kube_pod_created{{{labels}}} {seconds(pod['metadata']['creationTimestamp'])}")
        for condition in pod["status"]["conditions"]:
            if condition["type"] == "Ready" and condition["status"] == "True":
                lines.append(f"kube_pod_status_ready_time{{{labels}}} {seconds(condition['lastTransitionTime'])}")
        for status in pod["status"].get("containerStatuses", []):
            of_container = f'{{{labels},container="{status["name"]}"}}'
            lines.append(f"kube_pod_container_status_running{of_container} {int('running' in status['state'])}")
            lines.append(f"kube_pod_container_status_ready{of_container} {int(status['ready'])}")
    exporter(namespace, image_tag, "kube-state", lines)


def seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()


def filled_in(query: str, namespace: Namespace) -> str:
    chosen = {"namespace": namespace.name, "release": "watched", "model": MODEL, "pod": ".*"}
    for name, value in chosen.items():
        query = query.replace(f"${name}", value)
    return query


PANELS = [panel for panels in dashboard.ROWS.values() for panel in panels if panel.needs != "dcgm-exporter"]


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_every_query_of_the_dashboard_has_data(service: Namespace, panel: dashboard.Panel):
    for legend, query in panel.queries.items():
        assert ask(filled_in(query, service)), f"{legend}: {query}"


@pytest.mark.parametrize("name", dashboard.VARIABLES)
def test_every_variable_of_the_dashboard_has_values(service: Namespace, name: str):
    inner = dashboard.VARIABLES[name].removeprefix("label_values(").removesuffix(")")
    query, _, label = inner.rpartition(", ")
    values = {series["metric"].get(label) for series in ask(filled_in(query, service))}
    wanted = {"namespace": service.name, "release": "watched", "model": MODEL}.get(name)
    assert values and None not in values
    assert wanted is None or wanted in values


def test_prometheus_has_every_rule_and_none_fails(service: Namespace):
    ours = [group for group in api("rules")["groups"] if service.name in group["file"]]
    assert {group["name"] for group in ours} >= {"triton-now", "triton-ended", "triton-kubernetes", "triton-objectives"}
    assert [rule["name"] for group in ours for rule in group["rules"] if rule["health"] == "err"] == []


def test_the_autoscaler_scales_on_requests(service: Namespace):
    """20 clients, 8 requests per Pod: the most that it may."""
    assert len(service.pods(selector("watched"))) == 2
    conditions = {found["type"]: found["status"] for found in scaler(service)["status"]["conditions"]}
    assert conditions["ScalingActive"] == "True"


def test_it_goes_back_to_one_without_a_broken_answer(service: Namespace, load: Load):
    """The last of the story: nobody asks any more."""
    assert lost(load.stop()) == 0
    until("one server", lambda: scaler(service)["status"].get("desiredReplicas") == 1, 120)
    until("the other has drained", lambda: len(service.pods(selector("watched"))) == 1, 120)
