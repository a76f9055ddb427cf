"""What a benchmark found out: figures, each with what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number. `at_least` and `at_most` say what is asked of it, when something is."""

    name: str
    value: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def holds(self) -> bool | None:
        """Whether it is as asked; None when nothing is asked."""
        if self.at_least is not None:
            return self.value >= self.at_least
        if self.at_most is not None:
            return self.value <= self.at_most
        return None


@dataclass(kw_only=True)
class Result:
    """One benchmark's figures in the order they are shown; `data` is for the plot and for readers of the JSON."""

    name: str
    title: str
    figures: list[Figure] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, value: float, unit: str = "", **asked: float) -> None:
        self.figures.append(Figure(name=name, value=float(value), unit=unit, **asked))
