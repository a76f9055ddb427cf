"""Pods that go away under load: nobody's answer is broken. And a server that is killed, which breaks its own only.

The engine is synthetic, 15 tokens/s, so answers of 300 to 900 tokens take 20 to 60 s. DRAIN_OPERATIONS: how many
scale-downs, rolling updates and `kubectl drain`s (20; `make drain` has 100).
"""

from __future__ import annotations

import os
import time

from cluster_client import Namespace, is_ready, kubectl, selector, until
from loads import REPLICAS, Load, table
from pod_ends import PodEnds

OPERATIONS = int(os.environ.get("DRAIN_OPERATIONS", "20"))
TOKENS = (300, 900)
KILL_TRITONSERVER = """
import os, pathlib
for comm in pathlib.Path("/proc").glob("[0-9]*/comm"):
    if comm.read_text().strip() == "tritonserver":
        os.kill(int(comm.parent.name), 9)
"""


class Operations:
    """What is done to a Deployment that serves; each leaves at least two ready Pods."""

    def __init__(self, namespace: Namespace, service: str, nodes: list[str]):
        self._namespace, self._deployment, self._nodes = namespace, f"deployment/{service}", nodes
        self._service = service
        self.done: dict[str, int] = {"scale-down": 0, "rolling update": 0, "drain": 0}

    @property
    def number(self) -> int:
        return sum(self.done.values())

    def run(self, number: int) -> None:
        round_number = 0
        while True:
            for operation in (self.scale_down, self.scale_down, self.rolling_update, self.scale_down, self.scale_down):
                if self.number == number:
                    return
                operation()
            round_number += 1
            if round_number % 2 == 1 and self.number < number:
                self.drain()

    def scale_down(self) -> None:
        """By one Pod. Several in a row drain side by side."""
        wanted = self._namespace.get(self._deployment)["spec"]["replicas"]
        if wanted <= 2:
            self._scale_up()
            wanted = REPLICAS
        self._namespace.kubectl("scale", self._deployment, f"--replicas={wanted - 1}")
        self.done["scale-down"] += 1
        time.sleep(4)

    def _scale_up(self) -> None:
        self._namespace.kubectl("scale", self._deployment, f"--replicas={REPLICAS}")
        self._namespace.rolled_out(self._service, 180)
        time.sleep(8)  # its share of the load comes to the new ones

    def rolling_update(self) -> None:
        self._namespace.kubectl("rollout", "restart", self._deployment)
        self._namespace.rolled_out(self._service, 300)
        self.done["rolling update"] += 1

    def drain(self) -> None:
        """All nodes but that of the clients."""
        self._scale_up()
        for node in self._nodes[1:]:
            try:
                kubectl(
                    "drain",
                    node,
                    "--ignore-daemonsets",
                    "--delete-emptydir-data",
                    f"--pod-selector={selector(self._service)}",  # not what other tests run there
                    "--timeout=280s",
                    timeout=300,
                )
            finally:
                kubectl("uncordon", node)
            self.done["drain"] += 1


def test_no_answer_is_broken_when_pods_go(namespace: Namespace, service: str, nodes: list[str], image_tag: str):
    load = Load(namespace, image_tag, service, "demo-gpt2", node=nodes[0], tokens=TOKENS)
    operations = Operations(namespace, service, nodes)
    with PodEnds(namespace) as ends:
        load.running()
        time.sleep(20)
        try:
            operations.run(OPERATIONS)
        finally:
            outcomes = load.stop()
            print(f"\n{operations.done}\n{table(outcomes)}")
        until("the last Pods have ended", lambda: len(namespace.pods()) <= REPLICAS, 150)
        codes = ends.exit_codes
        print(
            f"{sum(code is not None for code in codes.values())} Pods ended, codes {sorted({*codes.values()} - {None})}"
        )
    assert sum(outcome.lost for outcome in outcomes) == 0, [outcome.examples for outcome in outcomes]
    assert all(outcome.ok for outcome in outcomes)
    assert {code for code in codes.values() if code is not None} == {0}, codes


def test_a_killed_server_breaks_its_own_streams_with_an_error_and_comes_back(
    namespace: Namespace, service: str, nodes: list[str], image_tag: str
):
    namespace.kubectl("scale", f"deployment/{service}", "--replicas=2")
    namespace.rolled_out(service, 120)
    load = Load(namespace, image_tag, service, "demo-gpt2", node=nodes[0], tokens=TOKENS)
    load.running()
    time.sleep(20)
    victim = namespace.ready_pods()[0]["metadata"]["name"]
    # /proc holds what runs in the container; there is no pkill in the image.
    started = time.monotonic()
    namespace.kubectl("exec", victim, "--container", "server", "--", "python3", "-c", KILL_TRITONSERVER)

    def is_back() -> bool:
        pod = namespace.get("pod", victim)
        return is_ready(pod) and pod["status"]["containerStatuses"][0]["restartCount"] == 1

    until("the Pod is ready again", is_back, 60)
    seconds = time.monotonic() - started
    time.sleep(5)
    outcomes = load.stop()
    print(f"\nready again after {seconds:.1f} s\n{table(outcomes)}")
    http = next(outcome for outcome in outcomes if outcome.name == "http")
    print("examples", [outcome.examples for outcome in outcomes], "silences", http.report["silences"])
    assert sum(outcome.gave_up for outcome in outcomes) == 0
    broken = sum(outcome.broken for outcome in outcomes)
    assert 0 < broken < sum(outcome.sent for outcome in outcomes) / 2, "those of the other Pod did not notice"
    assert max(http.report["silences"], default=0) < 2
