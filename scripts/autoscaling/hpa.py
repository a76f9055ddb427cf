"""The algorithm of the HorizontalPodAutoscaler (autoscaling/v2): from what metrics say to a number of replicas.

After the documentation (kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale) and, where that is
silent, the controller's sources (pkg/controller/podautoscaler: replica_calculator.go, horizontal.go). Metrics are in
thousandths, whole numbers, as they are in the controller: an adapter cuts what is below. Nothing here knows of SimPy or
of a clock; times are seconds of whoever calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

PolicyKind = Literal["Pods", "Percent"]
PolicySelection = Literal["Max", "Min", "Disabled"]

_LIMITLESS = 2**31 - 1  # replicas are an int32


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """At most `value` Pods, or percent of the Pods, in any `period_seconds`."""

    kind: PolicyKind
    value: int
    period_seconds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingRules:
    """One direction of `spec.behavior`."""

    stabilization_seconds: float
    policies: tuple[Policy, ...]
    selection: PolicySelection = "Max"
    tolerance: float = 0.1


DEFAULT_SCALE_UP = ScalingRules(
    stabilization_seconds=0,
    policies=(
        Policy(kind="Percent", value=100, period_seconds=15),
        Policy(kind="Pods", value=4, period_seconds=15),
    ),
)
DEFAULT_SCALE_DOWN = ScalingRules(
    stabilization_seconds=300, policies=(Policy(kind="Percent", value=100, period_seconds=15),)
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Behavior:
    min_replicas: int
    max_replicas: int
    scale_up: ScalingRules = DEFAULT_SCALE_UP
    scale_down: ScalingRules = DEFAULT_SCALE_DOWN

    def is_tolerable(self, ratio: float) -> bool:
        return 1.0 - self.scale_down.tolerance <= ratio <= 1.0 + self.scale_up.tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class PodsSample:
    """What the metrics API has for the Pods of a workload; Pods that are being deleted are in none of the numbers."""

    total_milli: int  # of those that have a value
    num_with_value: int
    num_missing: int  # run, and have none: an engine that loads, or one not scraped yet
    num_pending: int  # wait for a node, or for their image


def milli(value: float) -> int:
    """As prometheus-adapter and KEDA write a quantity."""
    return int(value * 1000)


def replicas_for_pods(current: int, target_milli: int, sample: PodsSample, behavior: Behavior) -> int | None:
    """A metric of type Pods. None where no Pod has a value: the metric cannot be read."""
    if not sample.num_with_value:
        return None
    total, number = sample.total_milli, sample.num_with_value
    ratio = (total // number) / target_milli  # the controller divides whole numbers
    counts_pending = bool(sample.num_pending) and ratio > 1.0
    if not counts_pending and not sample.num_missing:
        return current if behavior.is_tolerable(ratio) else math.ceil(ratio * number)
    if sample.num_missing and ratio != 1.0:
        # Missing Pods hold the change back: at the target when it goes down, at nothing when it goes up.
        number += sample.num_missing
        total += sample.num_missing * target_milli if ratio < 1.0 else 0
    if counts_pending:
        number += sample.num_pending
    corrected = (total // number) / target_milli
    if behavior.is_tolerable(corrected) or (ratio < 1.0 < corrected) or (corrected < 1.0 < ratio):
        return current
    replicas = math.ceil(corrected * number)
    turns_round = (corrected < 1.0 and replicas > current) or (corrected > 1.0 and replicas < current)
    return current if turns_round else replicas


def replicas_for_average_value(
    current: int, target_milli: int, total_milli: int | None, behavior: Behavior
) -> int | None:
    """A metric of type External (or Object) with an AverageValue: the total is for all Pods together."""
    if total_milli is None:
        return None
    if behavior.is_tolerable(total_milli / (target_milli * current)):
        return current
    return min(math.ceil(total_milli / target_milli), _LIMITLESS)


def largest(current: int, proposals: Sequence[int | None]) -> int | None:
    """Of several metrics the largest wins. One that cannot be read forbids to scale down. None: leave all as it is."""
    readable = [proposal for proposal in proposals if proposal is not None]
    if not readable:
        return None
    replicas = max(readable)
    return None if len(readable) < len(proposals) and replicas < current else replicas


@dataclass(slots=True)
class _Change:
    seconds: float
    replicas: int


@dataclass(slots=True)
class Stabilizer:
    """What an HPA remembers: recommendations of the windows, and changes of the policies' periods."""

    behavior: Behavior
    _recommendations: list[_Change] = field(default_factory=list)
    _added: list[_Change] = field(default_factory=list)
    _removed: list[_Change] = field(default_factory=list)

    def decide(self, now: float, current: int, recommendation: int | None) -> int:
        """The replicas to ask for. `recommendation` is `largest`'s."""
        behavior = self.behavior
        if not self._recommendations:
            self._recommendations.append(_Change(now, current))  # so that a new HPA does not scale down at once
        if current > behavior.max_replicas:
            return self._changed(now, current, behavior.max_replicas)
        if current < behavior.min_replicas:
            return self._changed(now, current, behavior.min_replicas)
        if recommendation is None:
            return current
        wanted = self._stabilized(now, current, recommendation)
        if wanted > current:
            wanted = min(wanted, behavior.max_replicas, max(current, self._upper_limit(now, current)))
        elif wanted < current:
            wanted = max(wanted, behavior.min_replicas, min(current, self._lower_limit(now, current)))
        return self._changed(now, current, wanted)

    def _stabilized(self, now: float, current: int, recommendation: int) -> int:
        """Up to the least, down to the most that was recommended in the window of its direction."""
        up_after = now - self.behavior.scale_up.stabilization_seconds
        down_after = now - self.behavior.scale_down.stabilization_seconds
        oldest = min(up_after, down_after)
        self._recommendations = [change for change in self._recommendations if change.seconds >= oldest]
        least = min([c.replicas for c in self._recommendations if c.seconds > up_after] + [recommendation])
        most = max([c.replicas for c in self._recommendations if c.seconds > down_after] + [recommendation])
        self._recommendations.append(_Change(now, recommendation))
        return min(max(current, least), most)

    def _upper_limit(self, now: float, current: int) -> int:
        rules = self.behavior.scale_up
        if rules.selection == "Disabled":
            return current
        limits = []
        for policy in rules.policies:
            at_start = self._replicas_before(now, current, policy)
            if policy.kind == "Pods":
                limits.append(at_start + policy.value)
            else:  # rounded up, else one Pod would never become two
                limits.append(math.ceil(at_start * (1 + policy.value / 100)))
        return min(limits) if rules.selection == "Min" else max(limits)

    def _lower_limit(self, now: float, current: int) -> int:
        rules = self.behavior.scale_down
        if rules.selection == "Disabled":
            return current
        limits = []
        for policy in rules.policies:
            at_start = self._replicas_before(now, current, policy)
            if policy.kind == "Pods":
                limits.append(at_start - policy.value)
            else:
                limits.append(int(at_start * (1 - policy.value / 100)))
        return max(limits) if rules.selection == "Min" else min(limits)  # Min is the least change

    def _replicas_before(self, now: float, current: int, policy: Policy) -> int:
        """How many there were when the policy's period began."""
        since = now - policy.period_seconds
        added = sum(change.replicas for change in self._added if change.seconds > since)
        removed = sum(change.replicas for change in self._removed if change.seconds > since)
        return current - added + removed

    def _changed(self, now: float, current: int, wanted: int) -> int:
        for changes, rules in ((self._added, self.behavior.scale_up), (self._removed, self.behavior.scale_down)):
            longest = max((policy.period_seconds for policy in rules.policies), default=0)
            changes[:] = [change for change in changes if change.seconds >= now - longest]
        if wanted > current:
            self._added.append(_Change(now, wanted - current))
        elif wanted < current:
            self._removed.append(_Change(now, current - wanted))
        return wanted
