"""How each server Pod of a namespace ended: a watch, since Pods that have ended well are gone at once."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Self

from cluster_client import SERVER, Namespace


class PodEnds:
    """Watches while it is entered. `exit_codes`: Pod -> the server's; None while it runs."""

    def __init__(self, namespace: Namespace):
        self._namespace = namespace

    def __enter__(self) -> Self:
        self._log = Path(tempfile.mkdtemp()) / "pods.json"
        command = ["kubectl", "--namespace", self._namespace.name, "get", "pods", "--watch", "--selector", SERVER]
        with self._log.open("w") as log:
            self._watch = subprocess.Popen([*command, "--output", "json"], stdout=log)
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.terminate()
        self._watch.wait()

    @property
    def exit_codes(self) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        for pod in self._seen():
            name = pod["metadata"]["name"]
            found.setdefault(name, None)
            for status in pod["status"].get("containerStatuses", []):
                if "terminated" in status["state"]:
                    found[name] = status["state"]["terminated"]["exitCode"]
        return found

    def _seen(self) -> list[dict[str, Any]]:
        text, found, position = self._log.read_text(), [], 0
        decoder = json.JSONDecoder()
        while (position := text.find("{", position)) >= 0:
            try:
                pod, position = decoder.raw_decode(text, position)
            except ValueError:  # the last one is being written
                break
            found.append(pod)
        return found
