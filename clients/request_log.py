"""A JSON line for each request, as it ends: what a report and a picture of several clients are recomputed from."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path


class RequestLog:
    """`due`, `first_token` and `end` are Unix times in seconds, so that logs of several clients can be laid together.

    first_token is null for whole answers, and where none came. `outcome` is ok, cancelled, cut_off, or a kind of error.
    """

    def __init__(self, path: Path):
        """`-` is the standard output. Raises OSError."""
        self._file = sys.stdout if path == Path("-") else path.open("w", buffering=1)
        self._unix_seconds = time.time() - time.monotonic()

    def write(self, *, due: float, first_token: float | None, end: float, tokens: int, outcome: str) -> None:
        """Times are time.monotonic()."""
        if self._file is None:
            return
        line = {
            "due": self._unix(due),
            "first_token": None if first_token is None else self._unix(first_token),
            "end": self._unix(end),
            "tokens": tokens,
            "outcome": outcome,
        }
        try:
            print(json.dumps(line), file=self._file, flush=True)
        except OSError as error:  # a full disk does not end a load that runs for days
            print(f"--request-log ends here, it cannot be written: {error.strerror}", file=sys.stderr, flush=True)
            self.close()

    def _unix(self, monotonic: float) -> float:
        return round(monotonic + self._unix_seconds, 4)

    def close(self) -> None:
        if self._file not in (None, sys.stdout):
            with suppress(OSError):
                self._file.close()
        self._file = None
