"""How much load, and when: `5`, `5@30s,20@60s` (steps), `5..20@60s` (a ramp), and the Poisson process that follows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from random import Random

from failures import UsageError

_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ms|s|m|h|d|)")
_LEVEL = re.compile(r"\d+(?:\.\d*)?|\.\d+")


@dataclass(frozen=True, kw_only=True)
class Step:
    """From `start` to `end` in a straight line. Both are requests per second, or users; `seconds` may be infinite."""

    start: float
    end: float
    seconds: float = math.inf

    @property
    def slope(self) -> float:
        """Change per second."""
        return (self.end - self.start) / self.seconds

    @property
    def area(self) -> float:
        """The integral: of a rate, the requests to expect."""
        mean = (self.start + self.end) / 2
        return mean * self.seconds if mean else 0.0

    def level(self, seconds: float) -> float:
        return self.start + self.slope * seconds

    def seconds_at(self, area: float) -> float:
        """When the integral from the start of the step has reached `area`, which is at most the step's."""
        root = math.sqrt(max(self.start**2 + 2 * self.slope * area, 0.0))
        return 2 * area / (self.start + root)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps one after the other; `repeats`: and then again, for ever."""

    steps: tuple[Step, ...]
    repeats: bool = False

    @property
    def seconds(self) -> float:
        """When it ends. May be infinite."""
        return math.inf if self.repeats else self._seconds_of_steps

    @property
    def _seconds_of_steps(self) -> float:
        return sum(step.seconds for step in self.steps)

    def level(self, seconds: float) -> float:
        """What is offered at this time after the start; 0 after the end."""
        if self.repeats:
            seconds %= self._seconds_of_steps
        begin = 0.0  # summed as in from_start, so that a step begins in both at the same instant
        for step in self.steps:
            if seconds < begin + step.seconds:
                return step.level(seconds - begin)
            begin += step.seconds
        return 0.0

    def from_start(self) -> Iterator[tuple[float, Step]]:
        """Each step with its beginning in seconds after the start; endless when it repeats."""
        begin = 0.0
        for step in cycle(self.steps) if self.repeats else self.steps:
            yield begin, step
            begin += step.seconds


def poisson_times(schedule: Schedule, random: Random) -> Iterator[float]:
    """Seconds after the start of each request of a Poisson process with the schedule's rate.

    Exact for ramps too: the gaps of a process with rate 1 are laid along the integral of the rate.
    """
    to_next = random.expovariate(1.0)
    for begin, step in schedule.from_start():
        reached = to_next
        while reached <= step.area:
            yield begin + step.seconds_at(reached)
            reached += random.expovariate(1.0)
        to_next = reached - step.area


def parse_seconds(text: str) -> float:
    """`90`, `90s`, `1.5m`, `250ms`, `2h`, `1d`. Raises UsageError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise UsageError(
            f"{text!r} is not a duration above 0; write seconds, or a number with ms, s, m, h or d, as in 90s"
        )
    return float(match[1]) * _UNIT_SECONDS[match[2]]


def parse_schedule(text: str, *, repeats: bool = False, whole: bool = False) -> Schedule:
    """`whole`: levels are whole numbers, but in a ramp every number between them occurs. Raises UsageError."""
    parts = text.split(",")
    steps = tuple(_parse_step(part.strip(), text, whole=whole) for part in parts)
    for part, step in zip(parts[:-1], steps[:-1], strict=True):
        if math.isinf(step.seconds):
            raise UsageError(f"{part!r} in {text!r} never ends, and only the last step may; write {part.strip()}@30s")
    if repeats and math.isinf(steps[-1].seconds):
        raise UsageError(f"{text!r} never ends, so it cannot repeat; write {parts[-1].strip()}@30s")
    if not any(step.area for step in steps):
        raise UsageError(f"{text!r} offers nothing; one step at least must be above 0")
    return Schedule(steps=steps, repeats=repeats)


def _parse_step(part: str, text: str, *, whole: bool) -> Step:
    levels, has_duration, duration = part.partition("@")
    start, is_ramp, end = levels.partition("..")
    if is_ramp and not has_duration:
        raise UsageError(f"the ramp {part!r} needs a duration, as in {part}@60s")
    values = [_parse_level(level, part, text, whole=whole) for level in ([start, end] if is_ramp else [start])]
    try:
        seconds = parse_seconds(duration) if has_duration else math.inf
    except UsageError as error:
        raise UsageError(f"in {text!r}, {error}") from None
    return Step(start=values[0], end=values[-1], seconds=seconds)


def _parse_level(level: str, part: str, text: str, *, whole: bool) -> float:
    if _LEVEL.fullmatch(level.strip()) is None:
        raise UsageError(
            f"{_quoted(part, text)} is not a step; write 5, 5@30s for a step of 30 seconds, or 5..20@60s for a ramp"
        )
    value = float(level)
    if whole and not value.is_integer():
        raise UsageError(f"{_quoted(level, text)} is no whole number, and users are counted; write {math.ceil(value)}")
    return value


def _quoted(part: str, text: str) -> str:
    return repr(text) if part == text else f"{part!r} in {text!r}"
