"""How 64 streams spread over four Pods, by the way that the clients connect, and what Pods get that are added.

The figures are in docs/operations.md. The engine is synthetic.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

import pytest
from cluster_client import Namespace, kubectl
from loads import SYNTHETIC, grpc_client

STREAMS = 64
# Answers of 4 to 12 s, so that everybody has asked again after a quarter of a minute.
ASKING = ("--model=demo-gpt2", "--end-id=-1", "--input-tokens=8", "--output-tokens=uniform:60:180", "--retries=20")

pytestmark = pytest.mark.figures


@pytest.fixture(scope="module")
def namespace(make_namespace: Callable[[str], Namespace]) -> Namespace:
    return make_namespace("privileged")


def install(namespace: Namespace, age: int) -> None:
    folder = f"engine.node.path=/mnt/node/{namespace.name}"
    namespace.install("llm", *SYNTHETIC, folder, "replicas=4", f"grpcConnectionAgeSeconds={age}", wait=240)


@pytest.fixture(scope="module")
def aged(namespace: Namespace) -> Iterator[None]:
    install(namespace, 8)
    yield
    namespace.helm("uninstall", "llm", "--wait=false")


def spread(namespace: Namespace) -> list[int]:
    """Requests in each ready Pod, the most first."""
    found = []
    for pod in namespace.ready_pods():
        path = f"/api/v1/namespaces/{namespace.name}/pods/{pod['metadata']['name']}:8002/proxy/metrics"
        metrics = kubectl("get", "--raw", path)
        (active,) = re.findall(
            r'^nv_trt_llm_request_metrics\{.*request_type="active".*\} (\S+)$', metrics, re.MULTILINE
        )
        found.append(round(float(active)))
    return sorted(found, reverse=True)


def spreads(namespace: Namespace, image_tag: str, name: str, *options: str, looks: int = 3) -> list[list[int]]:
    grpc_client(namespace, image_tag, name, *ASKING, f"--concurrency={STREAMS}", "--grace=30s", *options)
    time.sleep(25)
    found = []
    for _ in range(looks):
        found.append(spread(namespace))
        time.sleep(5)
    print(f"\n{name}: {found}")
    return found


def stop(namespace: Namespace, name: str) -> None:
    namespace.kubectl("delete", "pod", name, "--grace-period=0", "--force")
    time.sleep(5)


@pytest.mark.parametrize("connections", [1, 4, 64])
def test_the_service_spreads_connections(namespace: Namespace, aged: None, image_tag: str, connections: int):
    name = f"service-{connections}"
    found = spreads(namespace, image_tag, name, "--url=llm:8001", f"--connections={connections}")
    stop(namespace, name)
    if connections == 1:  # but for answers that began before the connection was renewed
        assert all(look[0] >= STREAMS / 4 for look in found)


def test_round_robin_over_the_headless_service_spreads_requests(namespace: Namespace, aged: None, image_tag: str):
    """And a Pod that is added gets its share when the connections are renewed."""
    options = ("--url=llm-headless:8001", "--round-robin", "--connections=1")
    found = spreads(namespace, image_tag, "round-robin", *options)
    assert all(look[0] <= 2 * look[-1] for look in found)
    namespace.kubectl("scale", "deployment/llm", "--replicas=6")
    namespace.rolled_out("llm", 120)
    started = time.monotonic()
    while min(spread(namespace)) < STREAMS / 6 / 2:
        assert time.monotonic() - started < 60, spread(namespace)
        time.sleep(1)
    print(f"two Pods added: half of their share after {time.monotonic() - started:.0f} s, {spread(namespace)}")
    stop(namespace, "round-robin")


def test_without_a_connection_age_added_pods_get_nothing(namespace: Namespace, aged: None, image_tag: str):
    install(namespace, 0)
    namespace.kubectl("scale", "deployment/llm", "--replicas=3")
    namespace.rolled_out("llm", 120)
    time.sleep(5)
    found = spreads(namespace, image_tag, "no-age", "--url=llm:8001", "--connections=4", looks=1)
    namespace.kubectl("scale", "deployment/llm", "--replicas=4")
    namespace.rolled_out("llm", 120)
    time.sleep(30)
    after = spread(namespace)
    print(f"a Pod added, 30 s later: {after}, before {found}")
    stop(namespace, "no-age")
    assert after[-1] == 0
