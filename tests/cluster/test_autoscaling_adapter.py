"""`autoscaling.mode=hpa`: the cluster's own HorizontalPodAutoscaler, and a double of prometheus-adapter with our rules.

In one namespace: release `one`, which has the load; release `two` with the same model, which has none; and somebody
else's Triton with 500 requests. Tests are in the order of one story: 4 clients all the time, 16 more in its first half.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from autoscaled import PEAK, STEADY, TARGET, Watch, condition, load, lost, pods_that_run, values_of
from cluster_client import CommandError, Namespace, kubectl, selector, until
from loads import Load
from metrics_adapter import MetricsAdapter, api_server
from prometheus import BUSY_TRITON, ask, exporter, monitor

REQUESTS = "triton:requests:current"
METRICS = {REQUESTS, "triton:queue_compute:ratio", "triton:kv_cache:fraction"}
SYNC = 15  # seconds between two looks of the autoscaler
# Down at once: no window hides what the autoscaler thinks.
AT_ONCE = "autoscaling.behavior.scaleDown.stabilizationWindowSeconds=0"
PEAK_LOAD = pytest.StashKey[Load]()


@dataclass(frozen=True)
class Story:
    namespace: Namespace
    adapter: MetricsAdapter
    watch: Watch
    steady: Load

    def requests(self, release: str = "one") -> dict[str, str]:
        return self.adapter.values(self.namespace, REQUESTS, selector(release))


@pytest.fixture(scope="module")
def story(make_namespace: Callable[[str], Namespace], image_tag: str) -> Iterator[Story]:
    installed = {line.split(".")[0] for line in kubectl("api-resources", "--output=name").split()}
    if missing := {"podmonitors", "prometheusrules"} - installed:
        pytest.skip(f"the cluster has no {', '.join(sorted(missing))}")
    if serving := api_server():
        pytest.skip(f"custom.metrics.k8s.io is already served, by {serving}")
    if not shutil.which("openssl"):
        pytest.skip("no openssl, for the certificate of the metrics API")
    namespace = make_namespace("privileged")
    namespace.apply(monitor("stranger"))
    exporter(namespace, image_tag, "stranger", BUSY_TRITON)
    for release, rules in (("one", "true"), ("two", "false")):
        namespace.install(release, *values_of(namespace, "hpa", AT_ONCE, f"monitoring.rules={rules}"))
    # For a Pod without a sample: what is labelled so is not scraped. Prometheus may take two minutes to know of this.
    drop = {"sourceLabels": ["__meta_kubernetes_pod_label_unseen"], "regex": "true", "action": "drop"}
    patch = [{"op": "add", "path": "/spec/podMetricsEndpoints/0/relabelings", "value": [drop]}]
    namespace.kubectl("patch", "podmonitor", "one", "--type=json", "--patch", json.dumps(patch))
    adapter = MetricsAdapter(namespace, image_tag)
    try:
        for release in ("one", "two"):
            namespace.rolled_out(release, 120)
        of_namespace = f'{REQUESTS}{{namespace="{namespace.name}"}}'
        until("numbers of three servers", lambda: len(ask(of_namespace)) == 3, 180)
        steady = load(namespace, image_tag, "one", "steady", **STEADY)
        with Watch(namespace, "one") as watch:
            yield Story(namespace, adapter, watch, steady)
    finally:
        adapter.remove()
        namespace.helm("uninstall", "one", "two", "--wait=false")


def test_the_metrics_api_has_our_metrics_for_our_pods(story: Story):
    until("all metrics", lambda: (story.adapter.names() or set()) >= METRICS, 60)
    assert story.requests("two") == {pods_that_run(story.namespace, "two")[0]: "0"}
    until("the steady load", lambda: [*story.requests().values()] == ["4"], 60)
    with pytest.raises(CommandError, match="NotFound"):
        story.adapter.values(story.namespace, "triton:requests:nowhere", selector("one"))
    with pytest.raises(CommandError, match="NotFound"):
        story.adapter.values(story.namespace, REQUESTS, "app.kubernetes.io/instance=nobody")
    until(
        "an autoscaler that has a number", lambda: condition(story.namespace, "one", "ScalingActive")[0] == "True", 60
    )


def test_a_load_makes_three_of_one(story: Story, image_tag: str, request: pytest.FixtureRequest):
    """20 requests at 8 per Pod. Neither the other release grows, nor do the stranger's requests count."""
    began = story.watch.seconds
    peak = load(story.namespace, image_tag, "one", "peak", **PEAK)
    request.config.stash[PEAK_LOAD] = peak
    until("three Pods", lambda: story.watch.settled(3), 120)
    print(f"\n3 ready after {story.watch.seconds - began:.0f} s")
    until("all are measured", lambda: len(story.requests()) == 3, 60)
    assert story.watch.since(began) <= {1, 2, 3}
    assert story.namespace.get("deployment", "two")["spec"]["replicas"] == 1
    assert set(story.requests("two").values()) == {"0"}
    stranger = story.adapter.values(story.namespace, REQUESTS, "test=stranger")
    assert stranger == {"stranger": "500"}, "it has a number, and nobody asks for it"


def test_a_pod_without_a_sample_is_no_reason_to_scale_down(story: Story):
    """Were it counted as 0, its requests would be missing, and a third Pod would be one too many."""

    def has_its_share() -> str | None:
        return next((pod for pod, number in story.requests().items() if 4 <= int(number) <= 8), None)

    unseen = until("a Pod with about a third of the requests", has_its_share, 60)
    began = story.watch.seconds
    story.namespace.kubectl("label", "pod", unseen, "unseen=true")
    until("one Pod less is measured", lambda: unseen not in story.requests(), 60)
    measured = []
    for _ in range(2 * SYNC):
        measured.append(story.requests())
        time.sleep(1)
    story.namespace.kubectl("label", "pod", unseen, "unseen-")
    print(f"\nmeasured: {[[*found.values()] for found in measured[::5]]}")
    assert all(len(found) == 2 and unseen not in found for found in measured)
    assert min(sum(map(int, found.values())) for found in measured) <= 2 * TARGET, "two Pods would do for those"
    assert story.watch.since(began) == {3}
    until("all are measured", lambda: len(story.requests()) == 3, 60)


def test_without_the_metrics_api_the_number_stays(story: Story, request: pytest.FixtureRequest):
    """The load goes while nobody can see it; 4 requests would be for one Pod."""
    story.adapter.stop()
    until("the autoscaler says so", lambda: condition(story.namespace, "one", "ScalingActive")[0] == "False", 60)
    print(f"\n{condition(story.namespace, 'one', 'ScalingActive')}")
    began, before = story.watch.seconds, story.watch.wanted
    assert lost(request.config.stash[PEAK_LOAD].stop()) == 0
    time.sleep(max(0.0, 2 * SYNC + 5 - (story.watch.seconds - began)))
    assert story.watch.since(began) == {before}, "neither up nor down"
    assert before >= 3


def test_it_comes_back_and_goes_down_to_one_without_a_broken_answer(story: Story):
    began = story.watch.seconds
    story.adapter.start()
    until("one Pod", lambda: story.watch.settled(1), 120)
    print(f"\none after {story.watch.seconds - began:.0f} s")
    until("the others have drained", lambda: len(story.namespace.pods(selector("one"))) == 1, 90)
    assert story.watch.wanted == 1
    assert lost(story.steady.stop()) == 0
