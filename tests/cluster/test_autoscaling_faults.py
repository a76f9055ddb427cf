"""`autoscaling.mode=keda`: faults of the loop, one by one. docs/autoscaling-faults.md has what these tests print.

A release `one` has the load: 4 clients that always ask, and 16 more that make it grow from one Pod to three. Beside it
are a release `two` with the same model and no load, and somebody else's Triton with 500 requests. The tests that take
Prometheus and KEDA's metrics API away do so for the whole cluster.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from autoscaled import (
    PEAK,
    STEADY,
    TARGET,
    Watch,
    condition,
    load,
    lost,
    pods_that_run,
    signal_server,
    values_of,
)
from cluster_client import CommandError, Namespace, is_ready, kubectl, selector, until
from loads import Load
from prometheus import BUSY_TRITON, PROMETHEUS, ask, exporter, monitor

pytestmark = pytest.mark.figures

REQUESTS = "triton:requests:current"
WINDOW = 70  # seconds: podStartSeconds + 60, in which the most that was wanted is kept
# With the blog's signal, which is made of counters.
VALUES = ("autoscaling.signals.queueComputeRatio=1", "startupSeconds=40")


@pytest.fixture(scope="module")
def place(make_namespace: Callable[[str], Namespace], image_tag: str) -> Iterator[Namespace]:
    installed = {line.split(".")[0] for line in kubectl("api-resources", "--output=name").split()}
    if missing := {"podmonitors", "prometheusrules", "scaledobjects"} - installed:
        pytest.skip(f"the cluster has no {', '.join(sorted(missing))}")
    namespace = make_namespace("privileged")
    namespace.apply(monitor("stranger"), monitor("kube-state"))
    exporter(namespace, image_tag, "stranger", BUSY_TRITON)
    install(namespace)
    namespace.install("two", *values_of(namespace, "keda", *VALUES, "monitoring.rules=false"))
    for release in ("one", "two"):
        namespace.rolled_out(release, 180)
    until("numbers of three servers", lambda: len(requests(namespace)) == 3, 180)
    for release in ("one", "two"):
        scaled(namespace, release)
    yield namespace
    namespace.helm("uninstall", "one", "two", "--wait=false")


def install(namespace: Namespace, *more: str) -> None:
    namespace.install("one", *values_of(namespace, "keda", *VALUES, *more))


def scaled(namespace: Namespace, release: str) -> None:
    until(
        f"an autoscaler of {release} that has a number",
        lambda: condition(namespace, release, "ScalingActive")[0] == "True",
        180,
    )


def requests(namespace: Namespace) -> dict[str, float]:
    """By Pod, as Prometheus has them."""
    found = ask(f'{REQUESTS}{{namespace="{namespace.name}"}}')
    return {sample["metric"]["pod"]: float(sample["value"][1]) for sample in found}


@pytest.fixture
def watch(place: Namespace) -> Iterator[Watch]:
    """Of release `one`, which has one Pod at first."""
    with Watch(place, "one") as watch:
        until("one Pod", lambda: watch.settled(1), 240)
        scaled(place, "one")
        yield watch


@pytest.fixture
def steady(watch: Watch, place: Namespace, image_tag: str) -> Iterator[Load]:
    yield from a_load(place, image_tag, "steady", **STEADY)


@pytest.fixture
def peak(watch: Watch, steady: Load, place: Namespace, image_tag: str) -> Iterator[Load]:
    yield from a_load(place, image_tag, "peak", **PEAK)


def a_load(place: Namespace, image_tag: str, name: str, **clients: int) -> Iterator[Load]:
    started = load(place, image_tag, "one", name, **clients)
    yield started
    place.kubectl("delete", "pods", "--ignore-not-found", *(f"{name}-{part}" for part in PARTS))


PARTS = ("grpc-streams", "grpc-whole", "http")


def grown(watch: Watch, *, seconds: float = 120) -> None:
    until("three Pods", lambda: watch.settled(3), seconds)
    time.sleep(10)  # their share of the load comes to the new ones


def shrunk(watch: Watch) -> float:
    """How long it takes until one Pod is wanted."""
    began = watch.seconds
    until("one Pod is wanted", lambda: watch.wanted == 1, WINDOW + 120)
    return watch.seconds - began


def scaled_object(namespace: Namespace) -> str:
    conditions = namespace.get("scaledobject", "one")["status"]["conditions"]
    return ", ".join(f"{found['type']}={found['status']}" for found in conditions)


# ---- what everybody shares goes away


@contextmanager
def without_prometheus() -> Iterator[None]:
    namespace = PROMETHEUS.split("/")[0]
    (found,) = json.loads(kubectl("--namespace", namespace, "get", "prometheuses", "--output", "json"))["items"]
    name, replicas = found["metadata"]["name"], found["spec"].get("replicas", 1)

    def scale(number: int) -> None:
        patch = json.dumps({"spec": {"replicas": number}})
        kubectl("--namespace", namespace, "patch", "prometheus", name, "--type=merge", "--patch", patch)

    def answers() -> bool:
        try:
            return bool(ask("vector(1)"))
        except CommandError:
            return False

    try:
        scale(0)
        until("Prometheus is gone", lambda: not answers(), 60)
        yield
    finally:
        scale(replicas)
        until("Prometheus is back", answers, 180)


def test_prometheus_is_gone_for_three_minutes(place: Namespace, watch: Watch, steady: Load, peak: Load):
    """Most of the load goes meanwhile, which nobody can see."""
    grown(watch)
    with without_prometheus():
        began = watch.seconds
        time.sleep(30)
        gone = lost(peak.stop())
        time.sleep(180 - (watch.seconds - began))
        print(f"\nat its end: {scaled_object(place)}; HPA {condition(place, 'one', 'ScalingActive')}")
        print(f"wanted without Prometheus: {watch.since(began)}")
        assert watch.since(began) == {3}
    back = watch.seconds
    until("its own numbers again", lambda: len(requests(place)) >= 4, 180)
    print(f"\nnumbers of all servers {watch.seconds - back:.0f} s after it answered")
    shrunk(watch)
    print(f"one wanted {watch.seconds - back:.0f} s after it answered; wanted meanwhile: {watch.since(back)}")
    assert gone + lost(steady.stop()) == 0


@contextmanager
def without_metrics_api() -> Iterator[None]:
    api = json.loads(kubectl("get", "apiservice", "v1beta1.external.metrics.k8s.io", "--output", "json"))
    reference = api["spec"]["service"]
    of = ("--namespace", reference["namespace"])
    service = json.loads(kubectl(*of, "get", "service", reference["name"], "--output", "json"))["spec"]["selector"]
    deployments = json.loads(kubectl(*of, "get", "deployments", "--output", "json"))["items"]
    (name,) = [
        found["metadata"]["name"]
        for found in deployments
        if service.items() <= found["spec"]["template"]["metadata"]["labels"].items()
    ]
    try:
        kubectl(*of, "scale", f"deployment/{name}", "--replicas=0")
        yield
    finally:
        kubectl(*of, "scale", f"deployment/{name}", "--replicas=1")
        kubectl(*of, "rollout", "status", f"deployment/{name}", "--timeout=120s")


def test_the_metrics_api_is_gone(place: Namespace, watch: Watch, steady: Load, peak: Load):
    grown(watch)
    with without_metrics_api():
        began = watch.seconds
        until("it is noticed", lambda: condition(place, "one", "ScalingActive")[0] == "False", 90)
        print(f"\nHPA says {condition(place, 'one', 'ScalingActive')} after {watch.seconds - began:.0f} s")
        gone = lost(peak.stop())
        time.sleep(max(0.0, WINDOW + 40 - (watch.seconds - began)))
        assert watch.since(began) == {3}
    print(f"\none wanted {shrunk(watch):.0f} s after it was back")
    assert gone + lost(steady.stop()) == 0


# ---- Pods that do not work


def test_a_pod_never_becomes_ready(place: Namespace, watch: Watch, steady: Load, peak: Load):
    """It hangs while it loads, for as long as startupSeconds (40) lets it; then the kubelet starts it anew."""
    before = {pod["metadata"]["name"] for pod in place.pods(selector("one")) if is_ready(pod)}

    def hang_one() -> str | None:
        for pod in place.pods(selector("one")):
            statuses = pod["status"].get("containerStatuses", [])
            if pod["metadata"]["name"] in before or not statuses or "running" not in statuses[0]["state"]:
                continue
            try:
                signal_server(place, pod["metadata"]["name"], signal.SIGSTOP)
            except CommandError:  # there is no tritonserver in it yet
                continue
            return pod["metadata"]["name"]
        return None

    hangs = until("a new Pod", hang_one, 120, every=0.1)
    began = watch.seconds
    assert not is_ready(place.get("pod", hangs)), "it was ready before it was stopped"
    until("two Pods serve", lambda: watch.ready == 2, 60)
    time.sleep(30)
    print(f"\nwanted {watch.since(began)}, ready {watch.ready}; requests {requests(place)}")
    assert watch.since(began) <= {2, 3}

    def restarted() -> bool:
        return place.get("pod", hangs)["status"]["containerStatuses"][0]["restartCount"] == 1

    until("the kubelet starts it anew", restarted, 180)
    print(f"started anew after {watch.seconds - began:.0f} s")
    until("three Pods", lambda: watch.settled(3), 60)
    print(f"ready after {watch.seconds - began:.0f} s; wanted {watch.since(began)}")
    assert watch.since(began) <= {2, 3}
    assert lost(peak.stop()) + lost(steady.stop()) == 0


# Runs a tenth of the time.
SLOW = """
import os, pathlib, signal, sys, time
pids = [int(comm.parent.name) for comm in pathlib.Path("/proc").glob("[0-9]*/comm")
        if comm.read_text().strip() == "tritonserver"]
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    for signal_number, seconds in ((signal.SIGSTOP, 1.8), (signal.SIGCONT, 0.2)):
        for pid in pids:
            os.kill(pid, signal_number)
        time.sleep(seconds)
"""


def test_a_pod_answers_slowly(place: Namespace, watch: Watch, steady: Load, peak: Load):
    grown(watch)
    slow = pods_that_run(place, "one")[0]
    print(f"\nrequests before: {requests(place)}")
    began = watch.seconds
    command = ["kubectl", "--namespace", place.name, "exec", slow, "--container", "server", "--"]
    with subprocess.Popen([*command, "python3", "-c", SLOW, "90"]) as slowing:
        for _ in range(4):
            time.sleep(20)
            print(f"{watch.seconds - began:.0f} s: slow {slow}: {requests(place)}, wanted {watch.wanted}")
        assert slowing.wait(30) == 0
    assert watch.since(began) <= {3, 4}
    assert lost(peak.stop()) + lost(steady.stop()) == 0


def test_the_server_is_restarted_and_its_counters_begin_at_nought(
    place: Namespace, watch: Watch, steady: Load, peak: Load
):
    grown(watch)
    began = watch.seconds
    killed = pods_that_run(place, "one")[0]
    signal_server(place, killed, signal.SIGKILL)
    seen: dict[str, set[float]] = {"concurrency": set(), "queueComputeRatio": set()}
    own = f'{{namespace="{place.name}",app_kubernetes_io_instance="one"}}'
    while watch.seconds - began < 100:
        for signal_name, record in (("concurrency", REQUESTS), ("queueComputeRatio", "triton:queue_compute:ratio")):
            for sample in ask(f"sum({record}{own})"):
                seen[signal_name].add(round(float(sample["value"][1]), 2))
        time.sleep(2)
    print("\n" + "; ".join(f"{name}: {min(values)} to {max(values)}" for name, values in seen.items()))
    print(f"wanted {watch.since(began)}, ready {sorted({ready for at, _, ready in watch.seen if at > began})}")
    assert watch.since(began) == {3}
    broken = lost(peak.stop()) + lost(steady.stop())
    assert broken <= 20, "those of the killed server, at most"


# ---- Deployments


def test_an_image_that_does_not_exist(place: Namespace, watch: Watch, steady: Load, image_tag: str):
    began = watch.seconds
    install(place, "image.tag=nowhere")
    until("a Pod that has no image", lambda: "ImagePull" in json.dumps(place.get("pods")), 90)
    peak = load(place, image_tag, "one", "peak", **PEAK)
    try:
        time.sleep(100)
        pods = place.pods(selector("one"))
        print(f"\nPods {len(pods)}, of them ready {len(pods_that_run(place, 'one'))}; wanted {watch.since(began)}")
        assert watch.since(began) <= {1, 2, 3}
        assert watch.ready >= 1
        rolled_back = watch.seconds
        place.helm("rollback", "one")
        until("three Pods", lambda: watch.settled(3) and len(pods_that_run(place, "one")) == 3, 120)
        print(f"three ready {watch.seconds - rolled_back:.0f} s after helm rollback; wanted {watch.since(began)}")
    finally:
        broken = lost(peak.stop())
    assert broken + lost(steady.stop()) == 0


def test_a_rolling_update_during_scale_up(place: Namespace, watch: Watch, steady: Load, peak: Load):
    until("more Pods are wanted", lambda: watch.wanted > 1, 90)
    began = watch.seconds
    place.kubectl("rollout", "restart", "deployment/one")
    place.rolled_out("one", 240)
    until("three Pods", lambda: watch.settled(3), 60)
    print(f"\nrolled out {watch.seconds - began:.0f} s later")
    until("the old ones have ended", lambda: len(place.pods(selector("one"))) == 3, 120)
    time.sleep(30)
    print(f"wanted {watch.since(began)}")
    assert watch.since(began) <= {2, 3, 4}
    assert watch.wanted == 3
    assert lost(peak.stop()) + lost(steady.stop()) == 0


def evict(namespace: Namespace, pod: str) -> bool:
    """As `kubectl drain` asks; whether the disruption budget lets it."""
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": namespace.name}}
    path = f"/api/v1/namespaces/{namespace.name}/pods/{pod}/eviction"
    try:
        kubectl("create", "--raw", path, "--filename", "-", input=json.dumps(eviction))
    except CommandError as error:
        assert "disruption budget" in str(error), error
        return False
    return True


def test_hpa_and_disruption_budget_at_one_pod(place: Namespace, watch: Watch, steady: Load):
    """A node is drained: the budget lets the only Pod go, and clients wait for the next one."""
    time.sleep(10)
    began = watch.seconds
    (only,) = pods_that_run(place, "one")
    assert evict(place, only)
    until("no Pod", lambda: watch.ready == 0, 30)
    gone = watch.seconds
    until("another Pod", lambda: watch.ready == 1, 60)
    print(f"\nnone ready for {watch.seconds - gone:.0f} s")
    (new,) = pods_that_run(place, "one")
    until("the old one has ended", lambda: len(place.pods(selector("one"))) == 1, 90)
    print(f"wanted {watch.since(began)}, again after {new}")
    assert watch.since(began) == {1}
    assert lost(steady.stop()) == 0


# ---- who is counted


def test_another_release_and_somebody_elses_triton_are_not_counted(
    place: Namespace, watch: Watch, steady: Load, peak: Load
):
    grown(watch)
    time.sleep(30)
    counted = requests(place)
    print(f"\n{counted}")
    assert counted["stranger"] == 500
    assert watch.since(0) <= {1, 2, 3}
    assert place.get("deployment", "two")["spec"]["replicas"] == 1
    (metric, *_) = place.get("hpa", "two")["status"]["currentMetrics"]
    assert metric["external"]["current"]["averageValue"] == "0"
    assert lost(peak.stop()) + lost(steady.stop()) == 0


# ---- no GPU left


def kube_state_metrics(namespace: Namespace, image_tag: str, release: str) -> None:
    """What kube-state-metrics would say of a release's Pods, as they are now."""
    lines = []
    for pod in namespace.pods(selector(release)):
        labels = f'namespace="{namespace.name}",pod="{pod["metadata"]["name"]}"'
        for phase in ("Pending", "Running"):
            lines.append(f'kube_pod_status_phase{{{labels},phase="{phase}"}} {int(pod["status"]["phase"] == phase)}')
        conditions: dict[str, Any] = {found["type"]: found for found in pod["status"]["conditions"]}
        if conditions["PodScheduled"].get("reason") == "Unschedulable":
            lines.append(f"kube_pod_status_unschedulable{{{labels}}} 1")
        of_container = f'{labels},container="server",resource="nvidia_com_gpu",unit="integer"'
        lines.append(f"kube_pod_container_resource_requests{{{of_container}}} 4")
    exporter(namespace, image_tag, "kube-state", lines)


def test_no_gpu_is_left(place: Namespace, image_tag: str):
    """Nodes have four GPUs, and a Pod takes four: there is room for one per node, and the load wants two more.

    The engine is the synthetic one, so the chart asks for no GPU; the Deployment is given them.
    """
    place.install("gpu", *values_of(place, "keda", "monitoring.rules=false"))
    quantity = {"nvidia.com/gpu": "4"}
    container = {"name": "server", "resources": {"requests": quantity, "limits": quantity}}
    patch = {"spec": {"template": {"spec": {"containers": [container]}}}}
    place.kubectl("patch", "deployment/gpu", "--patch", json.dumps(patch))
    place.rolled_out("gpu", 120)
    scaled(place, "gpu")
    num_nodes = len(place.get("nodes"))
    clients = TARGET * (num_nodes + 2)
    with Watch(place, "gpu") as watch:
        node = place.get("nodes")[0]["metadata"]["name"]
        wants = Load(
            place,
            image_tag,
            "gpu",
            "demo-gpt2",
            node=node,
            tokens=(60, 180),
            name="gpu",
            streams=clients // 2 - 2,
            whole=2,
        )
        wants.running()
        until(f"{num_nodes + 2} Pods are wanted", lambda: watch.wanted >= num_nodes + 2, 180)
        until(f"{num_nodes} are ready", lambda: watch.ready == num_nodes, 120)
        began = watch.seconds
        kube_state_metrics(place, image_tag, "gpu")
        alert = f'ALERTS{{alertname="TritonPendingForGpu",namespace="{place.name}"}}'
        until("the alert is pending", lambda: ask(alert), 180)
        until("the alert fires", lambda: [s for s in ask(alert) if s["metric"]["alertstate"] == "firing"], 700, every=5)
        fired = ask(alert)
        messages = {
            found["message"]
            for pod in place.pods(selector("gpu"))
            for found in pod["status"]["conditions"]
            if found.get("reason") == "Unschedulable"
        }
        print(f"\nfires for {len(fired)} Pods after {watch.seconds - began:.0f} s; wanted {watch.since(began)}")
        print(messages)
        assert watch.since(began) == {num_nodes + 2}, "neither up nor down for ten minutes"
        assert {sample["metric"]["alertstate"] for sample in fired} == {"firing"} and len(fired) == 2
        broken = lost(wants.stop())
        print(f"one wanted {shrunk(watch):.0f} s after the load")
    place.helm("uninstall", "gpu", "--wait=false")
    assert broken == 0
