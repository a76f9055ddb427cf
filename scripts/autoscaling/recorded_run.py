"""A run that was recorded on a real cluster, and how far a simulated one is off.

    {"time_seconds": [0, 5, 10],             from the start, rising
     "replicas_wanted": [1, 1, 2],           at these times; each holds until the next
     "offered": {"kind": "concurrency", "values": [4, 4, 16]},    or "rate", in requests/s; or {"trace": "FILE"}
     "delays": {"time_to_first_token": {"p50": 0.21, "p95": 2.4}, "queue": {"p95": 2.2}}}      seconds

`replicas_ready`, which is compared too, `offered` and `delays` may be left out. Without a load on the command line,
`offered` is the load; its trace is looked for beside the file. docs/autoscaling-simulator.md has an example.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from autoscaling.servers import Floats
from autoscaling.simulation import Run
from failures import UsageError
from schedules import Schedule, Step

REPLICA_TOLERANCE = 1  # Pods
DELAY_TOLERANCE = 0.2  # of the recorded delay

_KEYS = ("time_seconds", "replicas_wanted", "replicas_ready", "offered", "delays")
_DELAYS = ("time_to_first_token", "queue")


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    times: Floats
    wanted: Floats
    ready: Floats | None
    delays: dict[tuple[str, float], float]  # (which, share) -> seconds
    trace: Path | None = None
    kind: str | None = None  # of `schedule`
    schedule: Schedule | None = None

    @property
    def seconds(self) -> float:
        return float(self.times[-1])


@dataclass(frozen=True, kw_only=True)
class Difference:
    """`holds` is None where there is no tolerance for it."""

    what: str
    recorded: float
    simulated: float
    unit: str
    holds: bool | None
    note: str = ""


def read_recorded_run(path: Path) -> RecordedRun:
    """Raises UsageError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} is no JSON: {error}") from None
    try:
        return _recorded_run(content, path)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None


def compare(recorded: RecordedRun, run: Run) -> list[Difference]:
    """Replicas at every time, and delays over all requests.

    Clocks of two runs are never in step, so a curve may be a round of the loop early or late: what counts is the
    distance to the nearest value that was recorded within that time.
    """
    differences = []
    curves = [("replicas wanted", "replicas_wanted", recorded.wanted)]
    if recorded.ready is not None:
        curves.append(("replicas ready", "replicas_ready", recorded.ready))
    for what, column, curve in curves:
        own_times = run.timeline["time_seconds"]
        times = np.union1d(recorded.times, own_times[own_times <= recorded.seconds])
        times = times[times <= run.seconds]
        there = _held_until_next(recorded.times, curve, times)
        simulated = _held_until_next(own_times, run.timeline[column], times)
        far = _distances(times, simulated, there, run.setting.round_seconds)
        worst = int(far.argmax())
        differences.append(
            Difference(
                what=what,
                recorded=float(there[worst]),
                simulated=float(simulated[worst]),
                unit="Pods",
                holds=bool(far.max() <= REPLICA_TOLERANCE),
                note=f"furthest apart, at {times[worst]:g} s; mean distance {far.mean():.2f}, "
                f"{(far <= REPLICA_TOLERANCE).mean():.1%} of the times within {REPLICA_TOLERANCE}",
            )
        )
    changes, simulated_changes = (
        _changes(recorded.times, recorded.wanted),
        [
            (scaling.seconds, scaling.after - scaling.before)
            for scaling in run.scalings
            if scaling.seconds <= recorded.seconds
        ],
    )
    for name, sign in (("first scale-up", 1), ("last scale-down", -1)):
        pair = [[seconds for seconds, change in which if change * sign > 0] for which in (changes, simulated_changes)]
        if all(pair):
            there, here = (times[0] if sign > 0 else times[-1] for times in pair)
            differences.append(Difference(what=name, recorded=there, simulated=here, unit="s", holds=None))
    columns = {"time_to_first_token": run.first_token_seconds, "queue": run.queue_seconds}
    for (which, share), seconds in recorded.delays.items():
        here = float(np.quantile(columns[which], share))
        differences.append(
            Difference(
                what=f"{which.replace('_', ' ')} p{share * 100:g}",
                recorded=seconds,
                simulated=here,
                unit="s",
                holds=abs(here - seconds) <= DELAY_TOLERANCE * seconds,
            )
        )
    return differences


def comparison_text(differences: list[Difference]) -> str:
    lines = [f"{'compared':24}  {'recorded':>10}  {'simulated':>10}  off"]
    for difference in differences:
        distance = difference.simulated - difference.recorded
        relative = f" ({distance / difference.recorded:+.0%})" if difference.unit == "s" and difference.recorded else ""
        verdict = {True: "", False: "  NOT within tolerance", None: ""}[difference.holds]
        note = f"; {difference.note}" if difference.note else ""
        lines.append(
            f"{difference.what:24}  {difference.recorded:10.4g}  {difference.simulated:10.4g}  "
            f"{distance:+.3g} {difference.unit}{relative}{note}{verdict}"
        )
    lines.append(
        f"tolerances: {REPLICA_TOLERANCE} Pod at any time, give or take a round of the loop; "
        f"{DELAY_TOLERANCE:.0%} of a delay"
    )
    return "\n".join(lines)


def _recorded_run(content: Any, path: Path) -> RecordedRun:
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object; see docs/autoscaling-simulator.md")
    for key in content:
        if key not in _KEYS:
            matches = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"perhaps you meant {matches[0]!r}" if matches else f"the keys are {', '.join(_KEYS)}"
            raise ValueError(f"{key!r} is no key of a recorded run; {hint}")
    times = _numbers(content, "time_seconds", None)
    if len(times) < 2 or (np.diff(times) <= 0).any() or times[0] < 0:
        raise ValueError("time_seconds must have at least two times, rising from 0 or later")
    offered = content.get("offered", {})
    trace = kind = schedule = None
    if "trace" in offered:
        trace = path.parent / str(offered["trace"])
    elif offered:
        kind = offered.get("kind")
        if kind not in ("rate", "concurrency"):
            raise ValueError(f"offered.kind is {kind!r}; it must be 'rate' or 'concurrency'")
        values = _numbers(offered, "values", len(times))
        ends = [*times[1:], math.nan]
        schedule = Schedule(
            steps=tuple(
                Step(start=float(value), end=float(value), seconds=float(end - begin))
                for begin, end, value in zip([0.0, *times[1:]], ends, values, strict=True)
                if not math.isnan(end)
            )
        )
    return RecordedRun(
        times=times,
        wanted=_numbers(content, "replicas_wanted", len(times)),
        ready=_numbers(content, "replicas_ready", len(times)) if "replicas_ready" in content else None,
        delays=dict(_delays(content.get("delays", {}))),
        trace=trace,
        kind=kind,
        schedule=schedule,
    )


def _numbers(content: dict[str, Any], key: str, number: int | None) -> Floats:
    values = content.get(key)
    is_list = isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf for value in values
    )
    if not is_list:
        raise ValueError(f"{key} must be a list of numbers, none below 0")
    if number is not None and len(values) != number:
        raise ValueError(f"{key} has {len(values)} values for {number} times; it needs one for each")
    return np.array(values, dtype=float)


def _delays(content: Any) -> list[tuple[tuple[str, float], float]]:
    found = []
    for which, quantiles in content.items():
        if which not in _DELAYS:
            raise ValueError(f"delays has {which!r}; it can have {' and '.join(_DELAYS)}")
        for name, seconds in quantiles.items():
            try:
                share = float(name.removeprefix("p")) / 100
            except ValueError:
                share = math.nan
            if not (name.startswith("p") and 0 < share < 1):
                raise ValueError(f"delays.{which} has {name!r}; percentiles are named p50, p95, p99.9")
            found.append(((which, share), float(seconds)))
    return found


def _distances(times: Floats, simulated: Floats, recorded: Floats, slack: float) -> Floats:
    begins, ends = np.searchsorted(times, times - slack), np.searchsorted(times, times + slack, "right")
    return np.array(
        [np.abs(recorded[begin:end] - value).min() for begin, end, value in zip(begins, ends, simulated, strict=True)]
    )


def _held_until_next(times: Floats, values: Floats, at: Floats) -> Floats:
    return values[np.clip(np.searchsorted(times, at, "right") - 1, 0, len(values) - 1)]


def _changes(times: Floats, values: Floats) -> list[tuple[float, float]]:
    return [
        (float(times[i]), float(values[i] - values[i - 1])) for i in range(1, len(times)) if values[i] != values[i - 1]
    ]
