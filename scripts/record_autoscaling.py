"""Raise and lower a load on a cluster, and record what its autoscaler does: raw data, a report, a picture.

    python scripts/record_autoscaling.py --steps 1@2m,4@4m,1@3m --output docs/autoscaling/concurrency
    python scripts/record_autoscaling.py --again docs/autoscaling/concurrency     # report and picture from the raw data

Installs the chart (the synthetic engine unless --values says otherwise) with its clients, and changes the load as the
blog does: by the number of client Pods. Needs KUBECONFIG, kubectl, helm, the chart's images on the nodes, the
Prometheus Operator and KEDA. Everything that the report says is computed from OUTPUT.raw.json.gz by recorded_report.py.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "clients"))

from autoscaling.pod_log import PodLog  # noqa: E402
from autoscaling.recorded_report import write_all  # noqa: E402
from failures import UsageError  # noqa: E402
from schedules import Schedule, parse_schedule  # noqa: E402

RELEASE = "llm"
POLL_SECONDS = 1.0
SENT = re.compile(r"requests\s+([\d,]+) sent")  # of the load client's table
SERVER, CLIENT = (
    f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component={name}" for name in ("server", "client")
)
# Eight sequences of 20 tokens/s in a Pod, and clients of seven users whose answers take 3 to 5 s.
VALUES: dict[str, Any] = {
    "engine": {
        "kind": "synthetic",
        "maxBatchSize": 8,
        "buildArguments": ["--synthetic", "tokens_per_second=20"],
    },
    "resources": {"cpu": "300m", "memory": "512Mi"},
    "builderResources": {"cpu": "400m", "memory": "512Mi"},
    "sharedMemory": "128Mi",
    "autoscaling": {"mode": "keda", "maxReplicas": 4},
    "monitoring": {"enabled": True, "scrapeInterval": "5s", "dashboard": False},
    "client": {"enabled": True, "replicas": 0, "resources": {"cpu": "200m", "memory": "256Mi"}},
}
# What Prometheus knows of the run, one series each. The rest of the picture is in the requests and the Pods.
QUERIES = {
    "queue_compute_ratio": "avg(triton:queue_compute:ratio{S})",
    "requests_waiting": "sum(triton:requests_waiting:current{S})",
    "requests_running": "sum(triton:requests_running:current{S})",
    "kv_cache_fraction": "max(triton:kv_cache:fraction{S})",
    "tokens_per_second": "sum(triton:generated_tokens:rate{S})",
    "client_requests_ok": 'sum(load_client_requests_total{S, outcome="ok"})',
    "client_requests_not_ok": 'sum(load_client_requests_total{S, outcome!="ok"})',
}


class CommandError(Exception):
    """kubectl or helm ended with another code than 0."""


def run(*command: str, input: str | None = None) -> str:
    done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise CommandError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@dataclass
class Recording:
    """What is seen while the load runs; Unix times in seconds."""

    namespace: str
    prometheus: str
    replicas: list[list[float]] = field(default_factory=list)  # time, wanted, ready, clients that run
    steps: list[list[float]] = field(default_factory=list)  # time, clients
    pods: dict[str, dict[str, float]] = field(default_factory=dict)  # created and ready of each server
    _logs: dict[str, PodLog] = field(default_factory=dict)  # of each client, which says its requests

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        return run("kubectl", "--namespace", self.namespace, *arguments, input=input)

    def look(self) -> None:
        found = json.loads(self.kubectl("get", "deployments,pods", "--output", "json"))["items"]
        ready = wanted = clients = 0
        for thing in found:
            name, labels = thing["metadata"]["name"], thing["metadata"].get("labels", {})
            component = labels.get("app.kubernetes.io/component")
            if labels.get("app.kubernetes.io/instance") != RELEASE:
                continue
            if thing["kind"] == "Deployment" and name == RELEASE:
                wanted, ready = thing["spec"].get("replicas", 1), thing["status"].get("readyReplicas", 0)
            elif thing["kind"] == "Pod" and component == "server":
                self._note_pod(name, thing)
            elif thing["kind"] == "Pod" and component == "client" and thing["status"].get("phase") == "Running":
                clients += "deletionTimestamp" not in thing["metadata"]
                if name not in self._logs:
                    self._logs[name] = PodLog(self.namespace, name, "client")
        self.replicas.append([round(time.time(), 2), wanted, ready, clients])

    def _note_pod(self, name: str, pod: dict[str, Any]) -> None:
        times = self.pods.setdefault(name, {"created": unix(pod["metadata"]["creationTimestamp"])})
        for condition in pod["status"].get("conditions", []):
            if condition["type"] == "Ready" and condition["status"] == "True":
                times.setdefault("ready", unix(condition["lastTransitionTime"]))
        if "deletionTimestamp" in pod["metadata"]:
            times.setdefault("deleted", unix(pod["metadata"]["deletionTimestamp"]))

    @property
    def requests(self) -> list[dict[str, Any]]:
        said = [(name, line) for name, log in self._logs.items() for line in log.lines if line.startswith("{")]
        return sorted((json.loads(line) | {"client": name} for name, line in said), key=lambda r: r["due"])

    @property
    def sent_by_client(self) -> dict[str, int]:
        """As each says at its end."""
        said = [(name, SENT.match(line)) for name, log in self._logs.items() for line in log.lines]
        return {name: int(found[1].replace(",", "")) for name, found in said if found}

    def finish(self) -> None:
        for log in self._logs.values():
            log.ended(60)

    def ask_prometheus(self, query: str, begin: float, end: float) -> list[list[float]]:
        selected = query.replace("{S", f'{{namespace="{self.namespace}", app_kubernetes_io_instance="{RELEASE}"')
        path = f"/api/v1/namespaces/{self.prometheus}/proxy/api/v1/query_range"
        step = max(5, math.ceil((end - begin) / 10_000))
        parameters = f"query={quote(selected, safe='')}&start={begin:.0f}&end={end:.0f}&step={step}"
        answer = json.loads(run("kubectl", "get", "--raw", f"{path}?{parameters}"))
        series = answer["data"]["result"]
        return [[seconds, float(value)] for seconds, value in series[0]["values"]] if series else []


def unix(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()


def record(arguments: argparse.Namespace) -> dict[str, Any]:
    schedule: Schedule = arguments.schedule
    recording = Recording(arguments.namespace, arguments.prometheus)
    install(recording, arguments)
    say(f"installed; {schedule.seconds:.0f} s of load begin")
    began = time.time()
    try:
        for step in schedule.steps:
            number = round(step.start)
            recording.kubectl("scale", f"deployment/{RELEASE}-client", f"--replicas={number}")
            recording.steps.append([round(time.time(), 2), number])
            say(f"{time.time() - began:5.0f} s: {number} clients for {step.seconds:.0f} s")
            watch(recording, time.time() + step.seconds)
        recording.kubectl("scale", f"deployment/{RELEASE}-client", "--replicas=0")
        recording.steps.append([round(time.time(), 2), 0])
        watch(recording, time.time() + 30)
        recording.finish()
        ended = time.time()
        return {
            "command": "python scripts/record_autoscaling.py " + " ".join(sys.argv[1:]),
            "began": began,
            "ended": ended,
            "slots_per_pod": arguments.slots,
            "users_per_client": arguments.users,
            "signals": dict(signal.split("=") for signal in arguments.signal),
            "steps": recording.steps,
            "replicas": recording.replicas,
            "pods": recording.pods,
            "sent_by_client": recording.sent_by_client,
            "requests": recording.requests,
            "hpa": recording.kubectl("describe", "hpa", RELEASE).splitlines(),
            "prometheus": {
                name: {"query": query, "values": recording.ask_prometheus(query, began, ended)}
                for name, query in QUERIES.items()
            },
        }
    finally:
        if not arguments.keep:
            run("helm", "--namespace", arguments.namespace, "uninstall", RELEASE, "--wait=false")


def watch(recording: Recording, until: float) -> None:
    while time.time() < until:
        next_look = time.time() + POLL_SECONDS
        recording.look()
        time.sleep(max(min(next_look, until) - time.time(), 0))


def install(recording: Recording, arguments: argparse.Namespace) -> None:
    try:
        run("kubectl", "create", "namespace", arguments.namespace)
        run("kubectl", "label", "namespace", arguments.namespace, "pod-security.kubernetes.io/enforce=privileged")
    except CommandError as error:
        if "AlreadyExists" not in str(error):
            raise
    values = json.loads(json.dumps(VALUES))
    values["engine"]["maxBatchSize"] = arguments.slots
    values["engine"]["node"] = {"path": f"/mnt/node/{arguments.namespace}"}
    signals = {"concurrency": None} | {name: float(value) for name, value in (s.split("=") for s in arguments.signal)}
    values["autoscaling"]["signals"] = {name: int(v) if v and v == int(v) else v for name, v in signals.items()}
    values["client"]["arguments"] = [
        *("--concurrency", str(arguments.users), "--input-tokens", "8", "--output-tokens", arguments.output_tokens),
        *("--end-id", "-1", "--retries", "20", "--connections", "2", "--request-log", "-"),
    ]
    for image in ("image", "builderImage"):
        values[image] = {"tag": arguments.tag}
    values["client"]["image"] = {"tag": arguments.tag}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(values, file)
        file.flush()
        command = ["helm", "--namespace", arguments.namespace, "upgrade", "--install", RELEASE, str(ROOT / "chart")]
        command += ["--values", str(ROOT / "chart/examples/demo-cpu.yaml"), "--values", file.name]
        for path in arguments.values:
            command += ["--values", path]
        run(*command)
    recording.kubectl("rollout", "status", f"deployment/{RELEASE}", "--timeout=300s")
    deadline = time.monotonic() + 300
    while True:
        found = json.loads(recording.kubectl("get", "hpa", "--output", "json"))["items"]
        conditions = found[0]["status"].get("conditions", []) if found else []
        if any(c["type"] == "ScalingActive" and c["status"] == "True" for c in conditions):
            return
        if time.monotonic() > deadline:
            raise CommandError(
                f"the autoscaler has no number after 300 s: kubectl -n {arguments.namespace} describe hpa"
            )
        time.sleep(1)


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--again", metavar="OUTPUT", help="no load: report and picture anew, from OUTPUT.raw.json.gz")
    add("--output", default="out/autoscaling", help="writes OUTPUT.raw.json.gz, .json, .recorded.json and .png")
    add("--steps", default="1@2m,4@4m,1@3m", help="client Pods over time, as N@DURATION,...")
    add(
        "--signal",
        action="append",
        metavar="NAME=TARGET",
        help="concurrency=7 (default), queueComputeRatio=1, kvCache=0.8",
    )
    add("--users", type=int, default=7, help="users of a client Pod, each with one request at a time")
    add("--slots", type=int, default=8, help="engine.maxBatchSize")
    add("--output-tokens", default="uniform:60:100", help="length of answers")
    add("--namespace", default="autoscaling", help="made when it is not there")
    add("--tag", default="dev", help="of the chart's images")
    add("--values", action="append", default=[], metavar="FILE", help="further values of the chart, the last wins")
    add("--prometheus", default="monitoring/services/prometheus-operated:9090", help="NAMESPACE/services/NAME:PORT")
    add("--keep", action="store_true", help="leave the release installed")
    arguments = parser.parse_args(argv)
    arguments.schedule = None if arguments.again else read_schedule(arguments.steps, parser)
    arguments.signal = arguments.signal or ["concurrency=7"]
    for signal in arguments.signal:
        name, _, target = signal.partition("=")
        if name not in ("concurrency", "queueComputeRatio", "kvCache") or not target.replace(".", "", 1).isdigit():
            parser.error(f"--signal {signal}: give concurrency, queueComputeRatio or kvCache, '=', and a number")
    return arguments


def read_schedule(text: str, parser: argparse.ArgumentParser) -> Schedule:
    try:
        schedule = parse_schedule(text, whole=True)
    except UsageError as error:
        parser.error(f"--steps: {error}")
    if math.isinf(schedule.seconds) or any(step.start != step.end for step in schedule.steps):
        parser.error(f"--steps {text}: every step needs a number of clients and a duration, as 4@2m")
    return schedule


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        if arguments.again:
            output = Path(arguments.again)
            with gzip.open(f"{output}.raw.json.gz", "rt") as file:
                raw = json.load(file)
        else:
            output = Path(arguments.output)
            output.parent.mkdir(parents=True, exist_ok=True)
            raw = record(arguments)
            temporary = output.with_name(f".{os.getpid()}.gz")
            with gzip.open(temporary, "wt") as file:
                json.dump(raw, file)
            os.replace(temporary, f"{output}.raw.json.gz")
        print(write_all(raw, output))
    except (UsageError, CommandError, OSError) as error:
        print(f"record_autoscaling: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
