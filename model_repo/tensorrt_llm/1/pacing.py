"""How often a stream is answered: at once while the server is quiet, its tokens together as load grows.

Every response of an ensemble costs 1 to 1.5 ms of CPU time in all, whatever it holds, and half of that when many come
at once. So responses are rationed twice: by the number of streams, and by how many responses `postprocessing` has not
decoded yet. The first keeps the usual cost down; the second finds out what the machine affords when that is less,
without being told.
"""

from __future__ import annotations

import os
from pathlib import Path

# Of each core. An engine that computes on the CPU too shall lose no more than 3 % of it to streams, and a response
# costs it 0.7 ms; beside others half of the cores may go into responses, with the client on the same machine
# (docs/benchmarks.md).
_RESPONSES_PER_CORE_BESIDE_CPU_ENGINE = 16.0
_RESPONSES_PER_CORE = 800.0
_MOST_RESPONSES = 3200.0  # what one process of `postprocessing` can decode, with something to spare

# Between two responses of a stream, unless the machine cannot even do that.
MAX_SECONDS = 0.2
MAX_SECONDS_BESIDE_CPU_ENGINE = 0.5

# Responses on their way to `postprocessing`. It decodes 64 in some 15 ms and reports every 5 ms (feedback_channel.py),
# so it never runs dry; and a backlog delays no text by more than that.
_MAX_UNDECODED = 64
# Without any report for so long, what is missing will not come: the responses were dropped on their way.
_LOST_SECONDS = 1.0


class Pacer:
    """Owned by the dispatcher's thread. Times are monotonic seconds."""

    def __init__(self, responses_per_second: float, max_seconds: float = MAX_SECONDS):
        self._seconds_per_response = 1.0 / responses_per_second
        self._max_seconds = max_seconds
        self.num_streams = 0
        self._last_number = 0
        self._last_done = 0
        self._last_change = 0.0  # of either, when they were equal, or of `_last_done`

    @property
    def seconds_between(self) -> float:
        """Between two responses of one stream. 0 for a stream that is alone."""
        return min(self._max_seconds, max(0, self.num_streams - 1) * self._seconds_per_response)

    def next_number(self, now: float) -> int:
        """For a response that goes to `postprocessing` now."""
        if self._last_number == self._last_done:
            self._last_change = now
        self._last_number += 1
        return self._last_number

    def done(self, number: int, now: float) -> None:
        """`postprocessing` has decoded the response of this number, and all before it."""
        if self._last_done < number <= self._last_number:
            self._last_done, self._last_change = number, now

    def is_done(self, number: int) -> bool:
        return number <= self._last_done

    def may_send(self, now: float) -> bool:
        if now - self._last_change > _LOST_SECONDS:
            self._last_done, self._last_change = self._last_number, now
        return self._last_number - self._last_done < _MAX_UNDECODED


def affordable_responses_per_second(computes_on_cpu: bool) -> float:
    """For an engine on this machine."""
    per_core = _RESPONSES_PER_CORE_BESIDE_CPU_ENGINE if computes_on_cpu else _RESPONSES_PER_CORE
    return min(_MOST_RESPONSES, per_core * _num_cores())


def _num_cores() -> float:
    """Those of this process, or what its container may use of them."""
    cores = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, int(quota) / int(period))
    except (OSError, ValueError):  # another cgroup version, or "max"
        return cores
