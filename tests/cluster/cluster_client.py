"""kubectl and helm for tests: a namespace of one's own, releases in it, and what becomes of their Pods."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "chart"
T = TypeVar("T")
SERVER = "app.kubernetes.io/component=server"


def selector(release: str) -> str:
    """Of a release's server Pods, as its autoscaler selects them."""
    return f"app.kubernetes.io/instance={release},app.kubernetes.io/name=triton-trtllm,{SERVER}"


class CommandError(Exception):
    """A command ended with another code than 0: what it was and what it said."""


def run(*command: str, input: str | None = None, timeout: float = 300) -> str:
    done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise CommandError(f"{' '.join(command)}: {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def kubectl(*arguments: str, input: str | None = None, timeout: float = 300) -> str:
    return run("kubectl", *arguments, input=input, timeout=timeout)


def until(what: str, look: Callable[[], T | None], seconds: float, every: float = 0.5) -> T:
    """What `look` gives as soon as it is something."""
    end = time.monotonic() + seconds
    while True:
        if found := look():
            return found
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(every)


class Namespace:
    """A namespace with releases of the chart."""

    def __init__(self, name: str, image_tag: str):
        self.name, self._image_tag = name, image_tag

    def kubectl(self, *arguments: str, input: str | None = None, timeout: float = 300) -> str:
        return kubectl("--namespace", self.name, *arguments, input=input, timeout=timeout)

    def get(self, kind: str, *arguments: str) -> Any:
        found = json.loads(self.kubectl("get", kind, *arguments, "--output", "json"))
        return found["items"] if found["kind"] == "List" else found

    def apply(self, *objects: dict[str, Any]) -> None:
        self.kubectl(
            "apply", "--filename", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        )

    def helm(self, *arguments: str, timeout: float = 300) -> str:
        return run("helm", "--namespace", self.name, *arguments, timeout=timeout)

    def install(self, release: str, *values: str, example: str = "demo-cpu", wait: float = 0) -> None:
        """Install or upgrade. `values` are as of --set. With `wait` all Pods are ready afterwards."""
        command = ["upgrade", "--install", release, str(CHART), "--values", str(CHART / f"examples/{example}.yaml")]
        for image in ("image", "builderImage", "client.image"):
            command += ["--set", f"{image}.tag={self._image_tag}"]
        for value in values:
            command += ["--set", value]
        self.helm(*command, "--timeout", "180s")
        if wait:
            self.rolled_out(release, wait)

    def rolled_out(self, release: str, seconds: float) -> None:
        self.kubectl("rollout", "status", f"deployment/{release}", f"--timeout={seconds:g}s", timeout=seconds + 10)

    def pods(self, selector: str = SERVER) -> list[dict[str, Any]]:
        return self.get("pods", "--selector", selector)

    def ready_pods(self) -> list[dict[str, Any]]:
        return [pod for pod in self.pods() if is_ready(pod)]

    def run_to_end(self, pod: dict[str, Any], seconds: float) -> None:
        """Run a Pod. Fails when the Pod does."""
        name = pod["metadata"]["name"]
        self.apply(pod)
        self.ended(name, seconds)
        if self.get("pod", name)["status"]["phase"] != "Succeeded":
            raise AssertionError(self.kubectl("logs", name))

    def ended(self, name: str, seconds: float) -> None:
        def has_ended() -> bool:
            return self.get("pod", name)["status"].get("phase") in ("Succeeded", "Failed")

        until(f"the end of Pod {name}", has_ended, seconds)


def is_ready(pod: dict[str, Any]) -> bool:
    conditions = {found["type"]: found["status"] for found in pod["status"].get("conditions", [])}
    return conditions.get("Ready") == "True" and "deletionTimestamp" not in pod["metadata"]


def messages(pod: dict[str, Any]) -> list[str]:
    """What the Pod's status says of containers that have ended."""
    found = []
    for status in [
        *pod["status"].get("initContainerStatuses", []),
        *pod["status"].get("containerStatuses", []),
    ]:
        for state in (status["state"], status["lastState"]):
            if "terminated" in state and state["terminated"].get("message"):
                found.append(state["terminated"]["message"])
    return found


def pod_of(name: str, image: str, command: Sequence[str], *, cpu: str = "500m", **spec: Any) -> dict[str, Any]:
    """A Pod that runs once, as Pod Security "restricted" wants it. `spec` is added to the container's."""
    limits = {"cpu": cpu, "memory": "256Mi"}
    container = {
        "name": "main",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": list(command),
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": limits},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        **spec,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"test": name}},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
        },
    }
