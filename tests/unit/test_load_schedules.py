"""Schedules of the load client, and the Poisson process that follows them."""

from __future__ import annotations

import itertools
import math
from random import Random

import pytest
from failures import UsageError
from schedules import Schedule, Step, parse_schedule, parse_seconds, poisson_times


def times(text: str, seed: int = 1, **options: bool) -> list[float]:
    return list(poisson_times(parse_schedule(text, **options), Random(seed)))


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("250ms", 0.25), ("2h", 7200), ("1d", 86400)]
)
def test_a_duration_has_a_unit_or_is_in_seconds(text: str, seconds: float):
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "0", "-1s", "1 hour", "s", "1e3", "nan", "inf"])
def test_what_is_no_duration_is_refused(text: str):
    with pytest.raises(UsageError, match=f"'{text}' is not a duration above 0"):
        parse_seconds(text)


def test_a_number_is_a_load_without_end():
    assert parse_schedule("5") == Schedule(steps=(Step(start=5, end=5, seconds=math.inf),))


def test_steps_and_ramps_follow_each_other():
    schedule = parse_schedule("5@30s, 5..25@10s ,1@1m")
    assert schedule.seconds == 100
    assert [schedule.level(at) for at in (0, 29.9, 30, 35, 39.999, 40, 99, 100, 1000)] == pytest.approx(
        [5, 5, 5, 15, 25, 1, 1, 0, 0], abs=0.01
    )


def test_a_repeated_schedule_begins_again():
    schedule = parse_schedule("5@30s,20@10s", repeats=True)
    assert schedule.seconds == math.inf
    assert [schedule.level(at) for at in (0, 35, 40, 75, 400)] == [5, 20, 5, 20, 5]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "'' is not a step"),
        ("x", "'x' is not a step; write 5, 5@30s for a step of 30 seconds, or 5..20@60s for a ramp"),
        ("5@30s,,5", "'' in '5@30s,,5' is not a step"),
        ("-5", "'-5' is not a step"),
        ("nan", "'nan' is not a step"),
        ("5..20", "the ramp '5..20' needs a duration, as in 5..20@60s"),
        ("5..@60s", "'5..@60s' is not a step"),
        ("5@", "in '5@', '' is not a duration above 0"),
        ("5@soon", "in '5@soon', 'soon' is not a duration above 0"),
        ("5,20@60s", "'5' in '5,20@60s' never ends, and only the last step may; write 5@30s"),
        ("0", "'0' offers nothing; one step at least must be above 0"),
        ("0..0@5s,0", "offers nothing"),
    ],
)
def test_what_is_no_schedule_is_refused(text: str, sentence: str):
    with pytest.raises(UsageError) as refusal:
        parse_schedule(text)
    assert sentence in str(refusal.value)


def test_a_schedule_without_end_cannot_repeat():
    with pytest.raises(UsageError, match="'5@30s,20' never ends, so it cannot repeat; write 20@30s"):
        parse_schedule("5@30s,20", repeats=True)


def test_users_are_whole_numbers_but_a_ramp_passes_all_between():
    with pytest.raises(UsageError, match=r"'1.5' is no whole number, and users are counted; write 2"):
        parse_schedule("1.5", whole=True)
    assert parse_schedule("1..4@3s", whole=True).level(1.5) == 2.5


def test_the_same_seed_gives_the_same_arrivals():
    assert times("5@100s") == times("5@100s")
    assert times("5@100s") != times("5@100s", seed=2)


def test_gaps_of_a_constant_rate_are_exponential():
    gaps = [later - earlier for earlier, later in itertools.pairwise(times("5@4000s"))]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(1 / 5, rel=0.02)
    assert deviation == pytest.approx(mean, rel=0.03)
    # An exponential gap is longer than its mean with probability 1/e.
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, abs=0.01)


def test_a_ramp_has_as_many_arrivals_as_its_integral_says():
    found = times("0..20@1000s")
    assert len(found) == pytest.approx(10_000, rel=0.03)
    assert sum(at < 500 for at in found) == pytest.approx(2_500, rel=0.06)  # a quarter in the first half
    down = times("20..0@1000s")
    assert len(down) == pytest.approx(10_000, rel=0.03)
    assert sum(at < 500 for at in down) == pytest.approx(7_500, rel=0.03)


def test_steps_have_their_own_rates_and_none_in_a_pause():
    found = times("2@1000s,0@1000s,8@1000s")
    counts = [sum(begin <= at < begin + 1000 for at in found) for begin in (0, 1000, 2000)]
    assert counts[0] == pytest.approx(2000, rel=0.07)
    assert counts[1] == 0
    assert counts[2] == pytest.approx(8000, rel=0.03)
    assert found == sorted(found)


def test_a_load_without_end_goes_on_and_a_repeated_one_too():
    endless = poisson_times(parse_schedule("1@1s,1000"), Random(1))
    assert next(itertools.islice(endless, 100_000, None)) == pytest.approx(101, rel=0.02)
    repeated = list(itertools.islice(poisson_times(parse_schedule("10@1s,0@9s", repeats=True), Random(1)), 1000))
    assert all(at % 10 < 1 for at in repeated)
    assert repeated[-1] == pytest.approx(1000, rel=0.1)
