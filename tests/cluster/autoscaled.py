"""A release that is scaled, loads that make it grow and shrink, and a record of how many Pods there were when."""

from __future__ import annotations

import threading
import time
from typing import Any

from cluster_client import CommandError, Namespace, is_ready, selector
from loads import SYNTHETIC, Load, Outcome, table

MODEL = "demo-gpt2"
# Four to twelve seconds an answer, and at most the drain.
TOKENS = (60, 180)
TARGET = 8  # requests that one Pod is to have
# Clients that always have a request. 4 of them want one Pod, and 4 + 16 want three.
STEADY = {"streams": 1, "whole": 1}
PEAK = {"streams": 6, "whole": 2}


def values_of(namespace: Namespace, mode: str, *more: str) -> list[str]:
    """Of a release that is scaled quickly. `rules` of one release are for all, see the chart's values."""
    return [
        *SYNTHETIC,
        f"engine.node.path=/mnt/node/{namespace.name}",
        "drainSeconds=30",
        "monitoring.enabled=true",
        "monitoring.scrapeInterval=5s",
        "monitoring.dashboard=false",
        f"autoscaling.mode={mode}",
        f"autoscaling.signals.concurrency={TARGET}",
        "autoscaling.podStartSeconds=10",
        "autoscaling.maxReplicas=6",
        *more,
    ]


def load(namespace: Namespace, image_tag: str, release: str, name: str, **clients: int) -> Load:
    node = sorted(node["metadata"]["name"] for node in namespace.get("nodes"))[0]
    started = Load(namespace, image_tag, release, MODEL, node=node, tokens=TOKENS, name=name, **clients)
    started.running()
    return started


def lost(outcomes: list[Outcome]) -> int:
    print(f"\n{table(outcomes)}")
    if number := sum(outcome.lost for outcome in outcomes):
        print([outcome.examples for outcome in outcomes])
    return number


def condition(namespace: Namespace, release: str, kind: str) -> tuple[str, str]:
    """Status and reason of one of the HorizontalPodAutoscaler's conditions."""
    for found in namespace.get("hpa", release)["status"].get("conditions", []):
        if found["type"] == kind:
            return found["status"], found["reason"]
    return "", ""


class Watch:
    """Looks at a Deployment twice a second: how many Pods are wanted, and how many are ready."""

    def __init__(self, namespace: Namespace, release: str):
        self._namespace, self._release = namespace, release
        self._began = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.seen: list[tuple[float, int, int]] = []  # second, wanted, ready: only when one of them has changed

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()
        print(f"\n{self._release}: " + ", ".join(f"{at:.0f} s {wanted}/{ready}" for at, wanted, ready in self.seen))

    def _run(self) -> None:
        while not self._over.wait(0.5):
            try:
                deployment = self._namespace.get("deployment", self._release)
            except CommandError:  # an API server that is busy
                continue
            now = (deployment["spec"].get("replicas", 1), deployment["status"].get("readyReplicas", 0))
            if not self.seen or self.seen[-1][1:] != now:
                self.seen.append((self.seconds, *now))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def wanted(self) -> int:
        return self.seen[-1][1] if self.seen else 0

    @property
    def ready(self) -> int:
        return self.seen[-1][2] if self.seen else 0

    def settled(self, number: int) -> bool:
        return self.wanted == self.ready == number

    def since(self, second: float) -> set[int]:
        """Numbers of Pods that were wanted from then on."""
        before = [wanted for at, wanted, _ in self.seen if at <= second]
        return {*before[-1:], *(wanted for at, wanted, _ in self.seen if at > second)}


def pods_that_run(namespace: Namespace, release: str) -> list[str]:
    return [pod["metadata"]["name"] for pod in namespace.pods(selector(release)) if is_ready(pod)]


# There is no pkill in the image; /proc holds what runs in the container.
_SIGNAL = """
import os, pathlib, sys
for comm in pathlib.Path("/proc").glob("[0-9]*/comm"):
    if comm.read_text().strip() == "tritonserver":
        os.kill(int(comm.parent.name), int(sys.argv[1]))
"""


def signal_server(namespace: Namespace, pod: str, number: int) -> None:
    command = ["python3", "-c", _SIGNAL, str(int(number))]
    namespace.kubectl("exec", pod, "--container", "server", "--", *command)
