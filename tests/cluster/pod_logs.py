"""What a container of each server Pod says, followed from its start."""

from __future__ import annotations

import threading
from typing import Any, Self

from autoscaling.pod_log import PodLog
from cluster_client import Namespace


class PodLogs:
    """Follows while it is entered."""

    def __init__(self, namespace: Namespace, container: str):
        self._namespace, self._container = namespace, container
        self._followed: dict[str, PodLog] = {}
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()
        for log in self._followed.values():
            log.close()

    def of(self, pod: str, seconds: float = 30) -> str:
        """What the container has said, once it has ended."""
        log = self._followed[pod]
        assert log.ended(seconds), f"{pod} still talks after {seconds:g} s: {log.lines}"
        return "\n".join(log.lines)

    def _run(self) -> None:
        while not self._left.wait(0.5):
            for pod in self._namespace.pods():
                name = pod["metadata"]["name"]
                if name not in self._followed and self._has_started(pod):
                    self._followed[name] = PodLog(self._namespace.name, name, self._container)

    def _has_started(self, pod: dict[str, Any]) -> bool:
        statuses = pod["status"].get("initContainerStatuses", []) + pod["status"].get("containerStatuses", [])
        return any(status["name"] == self._container and "waiting" not in status["state"] for status in statuses)
