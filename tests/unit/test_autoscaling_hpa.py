"""The HPA's algorithm: facts of the Kubernetes documentation, and decisions computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from autoscaling.hpa import (
    DEFAULT_SCALE_DOWN,
    DEFAULT_SCALE_UP,
    Behavior,
    PodsSample,
    Policy,
    ScalingRules,
    Stabilizer,
    largest,
    milli,
    replicas_for_average_value,
    replicas_for_pods,
)

BEHAVIOR = Behavior(min_replicas=1, max_replicas=1000)


def pods(current: int, target: float, values: list[float], missing: int = 0, pending: int = 0) -> int | None:
    sample = PodsSample(
        total_milli=sum(map(milli, values)), num_with_value=len(values), num_missing=missing, num_pending=pending
    )
    return replicas_for_pods(current, milli(target), sample, BEHAVIOR)


def behavior(
    up: ScalingRules = DEFAULT_SCALE_UP, down: ScalingRules = DEFAULT_SCALE_DOWN, most: int = 1000
) -> Behavior:
    return Behavior(min_replicas=1, max_replicas=most, scale_up=up, scale_down=down)


def rules(*policies: tuple[str, int, int], window: float = 0, selection: str = "Max") -> ScalingRules:
    return ScalingRules(
        stabilization_seconds=window,
        policies=tuple(Policy(kind=kind, value=value, period_seconds=seconds) for kind, value, seconds in policies),
        selection=selection,
    )


def decisions(spec: Behavior, current: int, wanted: list[tuple[float, int | None]]) -> list[int]:
    """One after the other, each from the replicas that the one before left."""
    stabilizer, found = Stabilizer(spec), []
    for seconds, recommendation in wanted:
        current = stabilizer.decide(seconds, current, recommendation)
        found.append(current)
    return found


@pytest.mark.parametrize(
    ("current", "target", "values", "replicas"),
    [
        (1, 100, [200], 2),  # the documentation's example: twice the value, twice the Pods
        (2, 100, [50, 50], 1),  # and half of it
        (3, 10, [11, 11, 11], 3),  # a ratio of 1.1 is within the tolerance of 0.1
        (3, 10, [11.1, 11.1, 11.1], 4),
        (10, 10, [9] * 10, 10),
        (10, 10, [8.9] * 10, 9),
        (3, 10, [12, 12, 12], 4),  # 3.6, rounded up
    ],
)
def test_replicas_are_the_ratio_rounded_up(current: int, target: float, values: list[float], replicas: int):
    assert pods(current, target, values) == replicas


@pytest.mark.parametrize(
    ("current", "target", "values", "missing", "pending", "replicas"),
    [
        (2, 10, [30], 1, 0, 3),  # up: the missing one has 0, so (30 + 0) / 10
        (3, 10, [30], 0, 2, 3),  # and so have pending ones: three are there for it already
        (5, 10, [60], 0, 4, 6),
        (2, 10, [2], 1, 0, 2),  # down: the missing one is at the target, (2 + 10) / 10 is rounded up
        (4, 10, [1, 1], 2, 0, 3),  # (1 + 1 + 10 + 10) / 10 = 2.2
        (4, 10, [1, 1], 0, 2, 1),  # pending Pods do not hold back a scale-down
        (4, 10, [12], 3, 0, 4),  # 1.2 alone, 0.3 with the missing ones: the direction turns, so nothing happens
    ],
)
def test_missing_and_pending_pods_hold_a_change_back(
    current: int, target: float, values: list[float], missing: int, pending: int, replicas: int
):
    assert pods(current, target, values, missing, pending) == replicas


def test_a_pods_metric_without_any_value_cannot_be_read():
    assert pods(3, 10, [], missing=3) is None


def test_thousandths_are_cut():
    assert pods(1, 1, [1.1009]) == 1  # 1.100 is within the tolerance


@pytest.mark.parametrize(
    ("current", "total", "replicas"),
    [(1, 40, 4), (4, 40, 4), (4, 44, 4), (4, 44.1, 5), (4, 36, 4), (4, 35.9, 4), (4, 29, 3)],
)
def test_an_average_value_divides_the_total_whatever_the_number_of_pods(current: int, total: float, replicas: int):
    assert replicas_for_average_value(current, milli(10), milli(total), BEHAVIOR) == replicas


def test_of_several_metrics_the_largest_wins():
    assert largest(2, [3, 5, 1]) == 5


def test_a_metric_that_cannot_be_read_forbids_to_scale_down_and_allows_to_scale_up():
    assert largest(4, [2, None]) is None
    assert largest(4, [6, None]) == 6
    assert largest(4, [None, None]) is None


def test_by_default_four_pods_or_twice_as_many_are_added_in_15_seconds():
    assert decisions(behavior(), 1, [(0, 100), (15, 100), (30, 100), (45, 100)]) == [5, 10, 20, 40]


def test_a_percent_policy_is_rounded_up():
    """The documentation's walk: 10 % of 10, 11, 12 Pods and so on, never less than one."""
    spec = behavior(up=rules(("Percent", 10, 60)))
    assert decisions(spec, 1, [(0, 100), (60, 100), (120, 100)]) == [2, 3, 4]


def test_what_was_added_in_the_period_counts():
    spec = behavior(up=rules(("Pods", 4, 60)))
    assert decisions(spec, 1, [(0, 3), (15, 100), (30, 100), (60, 100)]) == [3, 5, 5, 7]


def test_down_by_four_pods_or_ten_percent_whichever_is_more():
    """The documentation's example: from 80 Pods, 8 a minute; 10 % of 72 is 8 when rounded up; below 40, 4 a minute."""
    spec = behavior(down=rules(("Pods", 4, 60), ("Percent", 10, 60)))
    first, second = decisions(spec, 80, [(0, 10), (60, 10)])
    assert (first, second) == (72, 64)
    assert decisions(spec, 30, [(0, 10), (60, 10)]) == [26, 22]


def test_select_policy_min_takes_the_least_change():
    spec = behavior(
        up=rules(("Pods", 4, 60), ("Percent", 100, 60), selection="Min"),
        down=rules(("Pods", 4, 60), ("Percent", 10, 60), selection="Min"),
    )
    assert decisions(spec, 10, [(0, 100)]) == [14]
    assert decisions(spec, 20, [(0, 1)]) == [18]


def test_select_policy_disabled_turns_a_direction_off():
    spec = behavior(down=rules(("Pods", 4, 60), selection="Disabled"))
    assert decisions(spec, 10, [(0, 1), (600, 1), (615, 12)]) == [10, 10, 12]


def test_scaling_down_waits_for_the_window_and_takes_its_largest_recommendation():
    wanted = [(0, 5), *((15 * step, 3 if step == 4 else 2) for step in range(1, 30))]
    found = dict(zip([seconds for seconds, _ in wanted], decisions(behavior(), 5, wanted), strict=True))
    assert found[285] == 5  # the first, 300 s ago at the latest, wanted 5
    assert found[300] == 3
    assert found[345] == 3
    assert found[360] == 2


def test_scaling_up_takes_the_smallest_recommendation_of_its_window():
    spec = behavior(up=replace(DEFAULT_SCALE_UP, stabilization_seconds=60))
    assert decisions(spec, 2, [(0, 6), (15, 4), (30, 6), (45, 6), (60, 6), (75, 6)]) == [2, 2, 2, 2, 4, 6]


def test_a_new_autoscaler_does_not_scale_down_before_its_window_is_over():
    assert decisions(behavior(), 7, [(0, 1), (285, 1), (300, 1)]) == [7, 7, 1]


def test_replicas_stay_within_their_bounds():
    assert decisions(behavior(most=3), 1, [(0, 100)]) == [3]
    assert decisions(behavior(most=3), 9, [(0, None)]) == [3]
    assert decisions(Behavior(min_replicas=2, max_replicas=3), 1, [(0, None)]) == [2]


def test_without_any_metric_nothing_changes():
    assert decisions(behavior(), 4, [(0, None), (900, None)]) == [4, 4]


def test_a_sum_over_a_target_is_reached_in_one_step_and_not_exceeded():
    """Pods that start are credited, whichever of the two forms is used."""
    assert pods(5, 10, [48], missing=2, pending=2) == 5
    assert replicas_for_average_value(5, milli(10), milli(48), BEHAVIOR) == 5
