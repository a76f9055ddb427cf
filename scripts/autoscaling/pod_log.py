"""What a container of a Pod says, to its last line.

Its log has that from the start. Where a log file is cleared away, as nodes that share a machine do to each other,
following the log ends early; attaching to the container has the rest.
"""

from __future__ import annotations

import subprocess
import threading
import time

WAYS = (("logs", "--follow"), ("attach", "--quiet"))


class PodLog:
    """Follows a container that runs or has run, by kubectl."""

    def __init__(self, namespace: str, pod: str, container: str):
        self._lines: dict[str, None] = {}
        self._followers = [
            subprocess.Popen(
                ["kubectl", "--namespace", namespace, *way, pod, "--container", container],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for way in WAYS
        ]
        self._readers = [threading.Thread(target=self._read, args=(f,), daemon=True) for f in self._followers]
        for reader in self._readers:
            reader.start()

    @property
    def lines(self) -> list[str]:
        """So far: each different line once, since most come both ways."""
        return list(self._lines)

    def ended(self, seconds: float) -> bool:
        """Wait for the end of the container, but not longer; whether it has ended."""
        end = time.monotonic() + seconds
        for reader in self._readers:
            reader.join(max(end - time.monotonic(), 0))
        return not any(reader.is_alive() for reader in self._readers)

    def close(self) -> None:
        for follower in self._followers:
            follower.terminate()
            follower.wait()

    def _read(self, follower: subprocess.Popen[str]) -> None:
        for line in follower.stdout or ():
            self._lines.setdefault(line.rstrip("\n"))
