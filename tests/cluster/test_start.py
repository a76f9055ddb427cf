"""How long a Pod with a stored engine takes to be ready, beside the same server outside of Kubernetes.

Only where the cluster's nodes are this machine (TEST_NODE_COMMAND) and `make image-demo` has left its repository. What
Kubernetes adds is the same for every engine: a Pod's making, a container's start, a look once a second whether it is
ready; with an init container, which the kubelet notices the end of once a second, twice that. START_REPOSITORY and
START_VALUES (as of --set) try another engine; see docs/operations.md.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster_client import ROOT, Namespace, until
from local_server import LocalServer

REPOSITORY = Path(os.environ.get("START_REPOSITORY", ROOT / "out/image/demo-gpt2"))
VALUES = os.environ.get("START_VALUES", "").split()
MOST_SECONDS = {"image": 3.0, "node": 6.0}  # that Kubernetes may add; 1.7 to 2.8 and 4.7 were measured
TIMES = 5
UNLIMITED = "resources.cpu=2,builderResources.cpu=2"

pytestmark = [
    pytest.mark.figures,
    pytest.mark.skipif("TEST_NODE_COMMAND" not in os.environ, reason="no TEST_NODE_COMMAND: the nodes are elsewhere"),
    pytest.mark.skipif(not REPOSITORY.is_dir(), reason=f"no {REPOSITORY}: make image-demo"),
]


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds from the start of scripts/serve.py to ready; the median."""
    log: Path = tmp_path_factory.mktemp("outside") / "log"
    found = []
    for _ in range(TIMES):
        started = time.monotonic()
        with LocalServer(REPOSITORY, log):
            found.append(time.monotonic() - started)
    return statistics.median(found)


@pytest.mark.parametrize("source", ["image", "node"])
def test_what_kubernetes_adds_to_a_start(make_namespace: Callable[[str], Namespace], outside: float, source: str):
    namespace = make_namespace("privileged")
    values = [f"engine.node.path=/mnt/node/{namespace.name}"]
    if source == "image":
        values = ["engine.source=image", "model.checkpoint=", "builderImage.repository="]
        values += ["image.repository=triton-trtllm/server-demo"]
    namespace.install("demo", *values, *VALUES, UNLIMITED, "nodeSelector.kubernetes\\.io/hostname=node-0", wait=240)
    found = []
    for _ in range(TIMES):
        namespace.kubectl("scale", "deployment/demo", "--replicas=0")
        namespace.kubectl("delete", "pods", "--all", "--force", "--grace-period=0")
        time.sleep(5)  # containers end after their Pods
        started = time.monotonic()
        namespace.kubectl("scale", "deployment/demo", "--replicas=1")
        until("a ready Pod", namespace.ready_pods, 60, every=0.05)
        found.append(time.monotonic() - started)
    inside = statistics.median(found)
    namespace.helm("uninstall", "demo", "--wait=false")
    print(
        f"\nready, engine from the {source}: {inside:.2f} s in a Pod, {outside:.2f} s outside: {inside / outside:.2f} x"
    )
    print(f"each: {[round(seconds, 2) for seconds in found]}")
    assert inside - outside <= MOST_SECONDS[source]
