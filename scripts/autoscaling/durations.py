"""How long something takes: `30`, `90s`, `uniform:20:40`, `lognormal:60:20`, `exponential:30`, `choice:0,90`."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from random import Random
from statistics import NormalDist
from typing import Literal, get_args

from failures import UsageError
from schedules import parse_seconds

DurationKind = Literal["fixed", "uniform", "normal", "lognormal", "exponential", "choice"]

_FORMS: dict[str, str] = {
    "fixed": "30s",
    "uniform": "uniform:LOWEST:HIGHEST",
    "normal": "normal:MEAN:DEVIATION",
    "lognormal": "lognormal:MEAN:DEVIATION",
    "exponential": "exponential:MEAN",
    "choice": "choice:0,90",
}
_COUNTS = {"fixed": (1, 1), "uniform": (2, 2), "normal": (2, 2), "lognormal": (2, 2), "exponential": (1, 1)}


@dataclass(frozen=True, kw_only=True)
class Durations:
    """A distribution of seconds, at least 0. Mean and deviation are those of the time itself, not of its logarithm."""

    kind: DurationKind
    seconds: tuple[float, ...]

    def draw(self, random: Random) -> float:
        if self.kind == "choice":
            return random.choice(self.seconds)
        return self.quantile(random.random())

    def quantile(self, share: float) -> float:
        """The time that `share` of the draws do not exceed; 0 <= share < 1."""
        share = min(max(share, 1e-12), 1 - 1e-12)
        match self.kind, self.seconds:
            case "uniform", (lowest, highest):
                return lowest + share * (highest - lowest)
            case "normal", (mean, deviation):
                return max(0.0, NormalDist(mean, deviation).inv_cdf(share)) if deviation else mean
            case "lognormal", (mean, deviation):
                variance_of_log = math.log1p((deviation / mean) ** 2)
                deviation_of_log = math.sqrt(variance_of_log)
                standard = NormalDist().inv_cdf(share)
                return math.exp(math.log(mean) - variance_of_log / 2 + deviation_of_log * standard)
            case "exponential", (mean,):
                return -mean * math.log1p(-share)
            case _:
                ordered = sorted(self.seconds)
                return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def parse_durations(text: str) -> Durations:
    """Raises UsageError."""
    kind, has_numbers, numbers = text.strip().partition(":")
    if not has_numbers:
        kind, numbers = "fixed", kind
    if kind not in get_args(DurationKind):
        matches = difflib.get_close_matches(kind, _FORMS, n=1)
        hint = f"perhaps you meant {_FORMS[matches[0]]}" if matches else f"write {', '.join(_FORMS.values())}"
        raise UsageError(f"{text!r} is no distribution of times; {hint}")
    seconds = [_seconds(part, text) for part in numbers.split("," if kind == "choice" else ":")]
    fewest, most = _COUNTS.get(kind, (1, 1000))
    if not fewest <= len(seconds) <= most:
        raise UsageError(f"{text!r} has {len(seconds)} times; write {_FORMS[kind]}")
    if kind in ("lognormal", "exponential") and seconds[0] == 0:
        raise UsageError(f"{text!r} has the mean 0; it must be above 0, or write 0")
    if kind == "uniform" and seconds[0] > seconds[1]:
        raise UsageError(f"{text!r} begins above its end; write uniform:{seconds[1]:g}:{seconds[0]:g}")
    return Durations(kind=kind, seconds=tuple(seconds))  # type: ignore[arg-type]  # it is one of DurationKind


def _seconds(part: str, text: str) -> float:
    if part.strip().rstrip("s") == "0":
        return 0.0
    try:
        return parse_seconds(part)
    except UsageError as error:
        raise UsageError(f"in {text!r}, {error}") from None
