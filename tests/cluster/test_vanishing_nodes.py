"""A node that is lost or cut off under load. After all other tests: its Pods start anew, Prometheus included."""

from __future__ import annotations

import os
import time

import pytest
from cluster_client import Namespace, run, until
from loads import REPLICAS, Load, table

TOKENS = (300, 900)  # at 15 a second, 20 to 60 s

pytestmark = pytest.mark.figures


@pytest.mark.skipif("TEST_NODE_COMMAND" not in os.environ, reason="no TEST_NODE_COMMAND, so no node can vanish")
@pytest.mark.parametrize("verb", ["lose", "cut"])
def test_a_node_vanishes(namespace: Namespace, service: str, nodes: list[str], image_tag: str, verb: str):
    namespace.kubectl("scale", f"deployment/{service}", f"--replicas={REPLICAS}")
    namespace.kubectl("rollout", "restart", f"deployment/{service}")  # spreads them anew
    namespace.rolled_out(service, 120)
    until("the old Pods have ended", lambda: len(namespace.pods()) == REPLICAS, 60)
    by_node = [pod["spec"]["nodeName"] for pod in namespace.ready_pods()]
    assert by_node.count(nodes[0]) == by_node.count(nodes[1]) == REPLICAS // 2, "half of them are on each node"
    keepalive = ("--grpc-option=grpc.keepalive_time_ms=5000", "--grpc-option=grpc.keepalive_timeout_ms=5000")
    load = Load(namespace, image_tag, service, "demo-gpt2", node=nodes[0], tokens=TOKENS, grpc_options=keepalive)
    load.running()
    time.sleep(15)
    started = time.monotonic()
    try:
        run(*os.environ["TEST_NODE_COMMAND"].split(), nodes[1], verb)
        until("half of the Pods are known to be gone", lambda: len(namespace.ready_pods()) == REPLICAS // 2, 120)
        noticed = time.monotonic() - started
        until("all Pods are ready, elsewhere", lambda: len(namespace.ready_pods()) == REPLICAS, 200)
        whole = time.monotonic() - started
    finally:
        run(*os.environ["TEST_NODE_COMMAND"].split(), nodes[1], "join")
    outcomes = load.stop()
    print(f"\n{verb}: noticed after {noticed:.0f} s, whole after {whole:.0f} s\n{table(outcomes)}")
    print([outcome.examples for outcome in outcomes])
    assert whole < 150
