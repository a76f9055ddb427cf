"""What a container of each server Pod says, followed from its start.

Where nodes share a machine, as on the test cluster, one node's kubelet clears away the logs of another's Pods, and
following them ends there: the beginning is sure, the end is not.
"""

from __future__ import annotations

import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any, Self

from cluster_client import Namespace


class PodLogs:
    """Follows while it is entered."""

    def __init__(self, namespace: Namespace, container: str):
        self._namespace, self._container = namespace, container
        self._followed: dict[str, subprocess.Popen[bytes]] = {}
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()
        for follower in self._followed.values():
            follower.terminate()
            follower.wait()

    def of(self, pod: str, seconds: float = 30) -> str:
        """What the container said, once it has ended."""
        self._followed[pod].wait(seconds)
        return self._path(pod).read_text()

    def _path(self, pod: str) -> Path:
        return self._folder / pod

    def _run(self) -> None:
        while not self._left.wait(0.5):
            for pod in self._namespace.pods():
                name = pod["metadata"]["name"]
                if name not in self._followed and self._has_started(pod):
                    command = ["logs", "--follow", name, "--container", self._container]
                    with self._path(name).open("wb") as log:
                        self._followed[name] = subprocess.Popen(
                            ["kubectl", "--namespace", self._namespace.name, *command], stdout=log
                        )

    def _has_started(self, pod: dict[str, Any]) -> bool:
        statuses = pod["status"].get("initContainerStatuses", []) + pod["status"].get("containerStatuses", [])
        return any(status["name"] == self._container and "waiting" not in status["state"] for status in statuses)
