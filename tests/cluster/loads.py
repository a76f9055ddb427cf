"""Clients in Pods of the cluster, which ask the chart's Service until they are stopped, and what became of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster_client import CommandError, Namespace, pod_of, until

# Values of a release whose engine makes up 15 tokens/s for each of 64 sequences; many Pods of it fit on two cores.
SYNTHETIC = (
    "engine.kind=synthetic",
    "engine.maxBatchSize=64",
    "engine.buildArguments={--synthetic,tokens_per_second=15}",
    "drainSeconds=90",
    "resources.cpu=200m,resources.memory=512Mi,sharedMemory=128Mi",
    "builderResources.cpu=200m,builderResources.memory=512Mi",
)

REPLICAS = 4  # of the fixture `service`

HTTP_LOAD = Path(__file__).with_name("http_load.py")
# Runs a client, hands SIGTERM on, and stays with the report that the client has left. A log would do, but for clusters
# whose nodes share a machine: one node's kubelet may clear away logs of another's Pods.
_KEEPER = (
    '"$@" >/dev/null & trap "kill -TERM $!" TERM; wait $!; wait $!; '
    "mv /tmp/report.json /tmp/result.json; trap - TERM; exec sleep 3600"
)
_GRPC_LOAD = ("python", "/opt/triton-trtllm/clients/load.py", "--json=/tmp/report.json")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Requests by what became of them. `broken` ones had begun; `gave_up` ones ran out of retries."""

    name: str
    sent: int
    ok: int
    broken: int
    gave_up: int
    retries: int
    examples: dict[str, str]
    report: dict[str, Any]

    @property
    def lost(self) -> int:
        return self.broken + self.gave_up


def grpc_client(
    namespace: Namespace, image_tag: str, name: str, *options: str, node: str | None = None, cpu: str = "1"
) -> None:
    """Start a Pod with the load client. At SIGTERM it finishes, and its report is its log."""
    pod = pod_of(name, f"triton-trtllm/client:{image_tag}", ["sh", "-c", _KEEPER, "-", *_GRPC_LOAD, *options], cpu=cpu)
    if node:
        pod["spec"]["nodeSelector"] = {"kubernetes.io/hostname": node}
    namespace.apply(pod)


class Load:
    """Started when made. gRPC and HTTP, streams and whole answers, each of `tokens` (from, to) tokens."""

    def __init__(
        self,
        namespace: Namespace,
        image_tag: str,
        release: str,
        model: str,
        *,
        node: str,
        tokens: tuple[int, int],
        streams: int = 12,
        whole: int = 4,
        grpc_options: tuple[str, ...] = (),
        name: str = "",
    ):
        self._namespace, self._image = namespace, f"triton-trtllm/client:{image_tag}"
        self._prefix = f"{name}-" if name else ""  # for several at a time
        self._node, self._names = node, []
        least, most = tokens
        grpc = [f"--url={release}:8001", f"--model={model}", "--retries=20", "--end-id=-1", "--input-tokens=8"]
        grpc += [f"--output-tokens=uniform:{least}:{most}", "--grace=150s", "--wait=60s", *grpc_options]
        self._start("grpc-streams", [*_GRPC_LOAD, *grpc, f"--concurrency={streams}", "--connections=6"])
        self._start("grpc-whole", [*_GRPC_LOAD, *grpc, f"--concurrency={whole}", "--connections=2", "--no-stream"])
        http = [f"http://{release}:8000", model, str(streams), str(whole), str(least), str(most)]
        self._start("http", ["python", "-c", HTTP_LOAD.read_text(), *http])

    def _start(self, name: str, command: list[str]) -> None:
        name = self._prefix + name
        pod = pod_of(name, self._image, ["sh", "-c", _KEEPER, "-", *command], cpu="1")
        pod["spec"]["nodeSelector"] = {"kubernetes.io/hostname": self._node}
        pod["spec"]["terminationGracePeriodSeconds"] = 1
        self._namespace.apply(pod)
        self._names.append(name)

    def running(self) -> None:
        for name in self._names:
            until(f"Pod {name} runs", lambda name=name: self._phase(name) == "Running", 60)

    def _phase(self, name: str) -> str:
        return self._namespace.get("pod", name)["status"].get("phase", "")

    def _report(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads(self._namespace.kubectl("exec", name, "--", "cat", "/tmp/result.json"))
        except CommandError:  # not yet
            return None

    def stop(self, seconds: float = 200) -> list[Outcome]:
        """No more requests; when the last is over, what became of all."""
        for name in self._names:
            self._namespace.kubectl("exec", name, "--", "sh", "-c", "kill -TERM 1")
        outcomes = []
        for name in self._names:
            report = until(f"the report of {name}", lambda name=name: self._report(name), seconds, every=2)
            outcomes.append(_outcome(name, report))
        for name in self._names:
            self._namespace.kubectl("delete", "pod", name)
        return outcomes


def _outcome(name: str, report: dict[str, Any]) -> Outcome:
    if "requests" not in report:
        counts = {key: report[key] for key in ("sent", "ok", "broken", "gave_up", "retries")}
        return Outcome(name=name, **counts, examples=report["examples"], report=report)
    requests, errors = report["requests"], report["errors"]
    gave_up = 0 if report["streams"] else requests["failed"]
    return Outcome(
        name=name,
        sent=requests["sent"],
        ok=requests["ok"],
        broken=requests["failed"] - gave_up + requests["cut_off"],
        gave_up=gave_up,
        retries=requests["retries"],
        examples=report["error_examples"] | {"kinds": str(errors)},
        report=report,
    )


def table(outcomes: list[Outcome]) -> str:
    lines = [f"{'client':14}{'sent':>7}{'ok':>7}{'broken':>8}{'gave up':>9}{'retries':>9}"]
    lines += [
        f"{outcome.name:14}{outcome.sent:7}{outcome.ok:7}{outcome.broken:8}{outcome.gave_up:9}{outcome.retries:9}"
        for outcome in outcomes
    ]
    return "\n".join(lines)
