"""How long prompts and answers are: `128`, `uniform:16:256`, `normal:128:32`, `lognormal:128:64`, `choice:64,128`."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from failures import UsageError

LONGEST = 2**31 - 1  # of an INT32, which max_tokens is

LengthKind = Literal["fixed", "uniform", "normal", "lognormal", "choice"]

_FORMS: dict[str, str] = {
    "fixed": "128",
    "uniform": "uniform:LOWEST:HIGHEST",
    "normal": "normal:MEAN:DEVIATION or normal:MEAN:DEVIATION:HIGHEST",
    "lognormal": "lognormal:MEAN:DEVIATION or lognormal:MEAN:DEVIATION:HIGHEST",
    "choice": "choice:64,128,256",
}


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """A distribution of whole numbers, at least 1.

    `numbers` are for fixed the length, for uniform the lowest and the highest, for choice the lengths, for normal and
    lognormal the mean and the standard deviation of the length itself (not of its logarithm); `highest` cuts.
    """

    kind: LengthKind
    numbers: tuple[float, ...]
    highest: float = math.inf

    def draw(self, random: Random) -> int:
        return max(1, round(min(self._draw(random), self.highest, LONGEST)))

    def _draw(self, random: Random) -> float:
        match self.kind, self.numbers:
            case "uniform", (lowest, highest):
                return random.randint(int(lowest), int(highest))
            case "normal", (mean, deviation):
                return random.gauss(mean, deviation)
            case "lognormal", (mean, deviation):
                variance_of_log = math.log1p((deviation / mean) ** 2)
                return random.lognormvariate(math.log(mean) - variance_of_log / 2, math.sqrt(variance_of_log))
            case _:
                return random.choice(self.numbers)


def parse_lengths(text: str) -> Lengths:
    """Raises UsageError."""
    kind, has_numbers, numbers = text.strip().partition(":")
    if not has_numbers:
        kind, numbers = "fixed", kind
    if kind not in get_args(LengthKind):
        raise UsageError(f"{text!r} is no distribution of lengths; {_nearest(kind)}")
    separator = "," if kind == "choice" else ":"
    try:
        values = [float(number) for number in numbers.split(separator)]
    except ValueError:
        raise UsageError(f"{text!r} is not a length; write {_FORMS[kind]}") from None
    if not all(math.isfinite(value) for value in values):
        raise UsageError(f"{text!r} has a length that is no number; write {_FORMS[kind]}")
    return _checked(kind, values, text)  # type: ignore[arg-type]  # it is one of LengthKind


def _checked(kind: LengthKind, values: list[float], text: str) -> Lengths:
    has_deviation = kind in ("normal", "lognormal")
    wanted = {"fixed": (1,), "uniform": (2,), "choice": range(1, 1000)}.get(kind, (2, 3))
    if len(values) not in wanted:
        raise UsageError(f"{text!r} has {len(values)} numbers; write {_FORMS[kind]}")
    highest = values.pop() if has_deviation and len(values) == 3 else math.inf
    lengths = [values[0], highest] if has_deviation else values
    if min(lengths) < 1:
        raise UsageError(f"{text!r} has a length below 1; prompts and answers have at least one token")
    if max(values) > LONGEST:
        raise UsageError(f"{text!r} has a length above {LONGEST}, the largest that the service can be asked for")
    if not all(length.is_integer() for length in lengths if not has_deviation):
        raise UsageError(f"{text!r} has a length that is no whole number; write {_FORMS[kind]}")
    if has_deviation and values[1] < 0:
        raise UsageError(f"{text!r} has the standard deviation {values[1]:g}; it must be at least 0")
    if kind == "uniform" and values[0] > values[1]:
        raise UsageError(f"{text!r} begins above its end; write uniform:{values[1]:g}:{values[0]:g}")
    return Lengths(kind=kind, numbers=tuple(values), highest=highest)


def _nearest(kind: str) -> str:
    matches = difflib.get_close_matches(kind, _FORMS, n=1)
    return f"perhaps you meant {_FORMS[matches[0]]}" if matches else f"write {', '.join(_FORMS.values())}"
