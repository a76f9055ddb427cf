"""The servers of the autoscaling simulator against queueing theory's laws, and their counters against sums."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from autoscaling.balancing import Connections, LeastRequests, ReadyPods, RoundRobin
from autoscaling.durations import parse_durations
from autoscaling.offered_load import ClosedLoad, OpenLoad, draw_lengths, pattern_schedule, poisson_times
from autoscaling.recommendation import erlang_c, late_share
from autoscaling.servers import Fleet, ServerModel
from failures import UsageError
from lengths import parse_lengths
from schedules import parse_schedule

TOKENS_PER_SECOND = 1000  # so that whole tokens are a fine clock


def open_load(times: np.ndarray, service: np.ndarray, input_tokens: int = 1) -> OpenLoad:
    return OpenLoad(
        description="",
        seconds=float(times[-1]) + 1,
        times=times,
        input_tokens=np.full(len(times), input_tokens),
        output_tokens=np.rint(service * TOKENS_PER_SECOND).astype(int) + 1,
    )


def poisson_load(rate: float, service: np.ndarray) -> OpenLoad:
    generator = np.random.default_rng(7)
    return open_load(np.cumsum(generator.exponential(1 / rate, len(service))), service)


def server(slots: int, **options: float) -> ServerModel:
    return ServerModel(slots=slots, tokens_per_second=TOKENS_PER_SECOND, prefill_seconds=0, **options)


def fleet_of(load: OpenLoad | ClosedLoad, model: ServerModel, pods: int = 1, balancer: object = None) -> Fleet:
    fleet = Fleet(model, load.source(model), balancer or RoundRobin())
    for pod in range(pods):
        fleet.open(pod)
    fleet.balance(ReadyPods(range(pods)))
    return fleet


def answers(load: OpenLoad | ClosedLoad, model: ServerModel, **options: object) -> tuple[np.ndarray, ...]:
    fleet = fleet_of(load, model, **options)
    fleet.advance(load.seconds)
    return fleet.answers()


@pytest.mark.parametrize(("slots", "utilization"), [(1, 0.5), (1, 0.8), (4, 0.8), (16, 0.9)])
def test_exponential_answers_wait_as_in_m_m_c(slots: int, utilization: float):
    """Mean wait: C(c, a) / (c mu - lambda). Within 6 %: 200,000 requests that depend on each other."""
    service = np.random.default_rng(1).exponential(1.0, 200_000)
    _, waited, _, _ = answers(poisson_load(slots * utilization, service), server(slots))
    load = slots * utilization
    assert waited.mean() == pytest.approx(erlang_c(slots, load) / (slots - load), rel=0.06)
    assert (waited > 1e-9).mean() == pytest.approx(erlang_c(slots, load), rel=0.03)
    assert (waited > 0.5).mean() == pytest.approx(late_share(slots, load, 1.0, 0.5), rel=0.06)


def test_answers_of_one_length_wait_half_as_long():
    """Pollaczek and Khinchine: M/D/1 waits half of M/M/1, rho / 2 (1 - rho) services."""
    _, waited, _, _ = answers(poisson_load(0.8, np.ones(200_000)), server(1))
    assert waited.mean() == pytest.approx(0.8 / (2 * 0.2), rel=0.04)


def test_erlang_c_has_its_known_values():
    assert erlang_c(1, 0.7) == pytest.approx(0.7)  # M/M/1: rho
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(10, 10) == 1.0


def test_littles_law_holds_for_who_waits_and_who_runs():
    """L = lambda W, exactly, from an empty server to an empty server."""
    load = poisson_load(6, np.random.default_rng(2).exponential(1.0, 20_000))
    fleet = fleet_of(load, server(8))
    fleet.advance(load.seconds + 100)
    fleet.settle()
    arrivals, waited, _, ends = fleet.answers()
    gauges = fleet.gauges(np.array([0]))
    assert gauges.queue_seconds[0] + gauges.waiting_seconds[0] == pytest.approx(waited.sum())
    assert gauges.compute_seconds[0] == pytest.approx((ends - arrivals - waited).sum())
    assert (gauges.pending[0], gauges.waiting[0], gauges.running[0]) == (0, 0, 0)


def test_gauges_are_counts_of_those_who_are_there():
    load = poisson_load(8, np.random.default_rng(3).exponential(1.0, 5_000))
    model = server(8)
    fleet = fleet_of(load, model)
    for now in range(10, 500, 7):
        fleet.advance(now)
        fleet.settle()
        arrivals, waited, _, ends = fleet.answers()
        starts = arrivals + waited
        gauges = fleet.gauges(np.array([0]))
        running, waiting = int(((starts <= now) & (now < ends)).sum()), int((now < starts).sum())
        assert gauges.running[0] == running
        assert gauges.waiting[0] == min(waiting, model.margin)  # the engine holds so many ready for the next slot
        assert gauges.pending[0] == max(0, waiting - model.margin)


def test_never_more_run_than_there_are_slots_and_first_come_is_first_served():
    load = poisson_load(50, np.random.default_rng(4).exponential(1.0, 5_000))
    arrivals, waited, _, ends = answers(load, server(8))
    starts = arrivals + waited
    assert (np.diff(starts) >= 0).all()
    just_after = starts + 1e-6  # a start at an end is equal to it but for the last digits
    running = np.searchsorted(starts, just_after) - np.searchsorted(np.sort(ends), just_after)
    assert running.max() == 8


def test_a_full_kv_cache_keeps_requests_waiting_beside_free_slots():
    """Each takes 4 blocks of 10, so two run at a time."""
    load = open_load(np.arange(1, 7) / 1000, np.full(6, 1.0), input_tokens=97)
    load = OpenLoad(**{**vars(load), "output_tokens": np.full(6, 31)})
    model = ServerModel(slots=8, tokens_per_second=30, prefill_seconds=0, kv_tokens=320)
    arrivals, waited, _, _ = answers(load, model)
    assert (arrivals + waited).round(3).tolist() == [0.001, 0.002, 1.001, 1.002, 2.001, 2.002]


def test_a_request_that_no_kv_cache_can_hold_is_refused():
    load = open_load(np.array([1.0]), np.array([1.0]), input_tokens=64)
    with pytest.raises(UsageError, match="--kv-tokens 64 has 2 blocks, and the longest request needs 34"):
        load.source(server(1, kv_tokens=64))


def test_the_first_token_comes_a_prefill_after_the_slot():
    load = open_load(np.array([1.0]), np.array([0.5]), input_tokens=300)
    model = ServerModel(slots=1, tokens_per_second=1000, prefill_seconds=0.2, prefill_tokens_per_second=1000)
    _, _, first_token, ends = answers(load, model)
    assert first_token[0] == pytest.approx(0.5)
    assert ends[0] == pytest.approx(2.0)


@pytest.mark.parametrize("users", [4, 8, 16])
def test_users_who_do_not_think_are_always_in_the_server(users: int):
    """A closed loop: throughput is min(users, slots) / service."""
    lengths = parse_lengths(str(TOKENS_PER_SECOND + 1))  # a second
    load = ClosedLoad(
        description="",
        seconds=100,
        users=parse_schedule(f"{users}@100s", whole=True),
        input_lengths=lengths,
        output_lengths=lengths,
        think_seconds=0,
        seed=1,
    )
    arrivals, waited, _, _ = answers(load, server(8))
    started = (arrivals + waited < 99.5).sum()
    assert started == 100 * min(users, 8)
    assert load.concurrency(server(8), np.array([50.0]))[0] == pytest.approx(users)


def test_users_come_again_at_every_step_however_many_there_were():
    """Sums of seconds like these are a little more or less than what is left of the whole."""
    lengths = parse_lengths(str(TOKENS_PER_SECOND + 1))  # a second
    steps, seconds = 400, 2.01
    load = ClosedLoad(
        description="",
        seconds=steps * seconds,
        users=parse_schedule(",".join([f"1@{seconds}s,3@{seconds}s"] * (steps // 2)), whole=True),
        input_lengths=lengths,
        output_lengths=lengths,
        think_seconds=0,
        seed=1,
    )
    arrivals = answers(load, server(8))[0]
    rises = np.arange(1, steps, 2) * seconds
    assert all((np.abs(arrivals - rise) < 1e-3).sum() >= 2 for rise in rises)


def test_by_request_pods_share_evenly_and_by_connection_they_do_not():
    """One queue less: choosing the emptier of two waits less than taking turns, and that less than connections."""
    load = poisson_load(4 * 8 * 0.85, np.random.default_rng(5).exponential(1.0, 50_000))
    mean_wait = {
        name: answers(load, server(8), pods=4, balancer=balancer)[1].mean()
        for name, balancer in (
            ("least", LeastRequests(Random(1))),
            ("turns", RoundRobin()),
            ("connections", Connections(16, math.inf, Random(1))),
        )
    }
    assert mean_wait["least"] < mean_wait["turns"] < mean_wait["connections"]


def test_connections_that_are_renewed_reach_new_pods():
    for age, share in ((math.inf, 0.0), (10.0, 0.5)):
        balancer = Connections(200, age, Random(1))
        ready = ReadyPods([0])
        balancer.use(ready)
        for number in range(4000):
            balancer.pick(number / 1000)
        ready.add(1)
        picked = [balancer.pick(100 + number / 1000) for number in range(4000)]
        assert np.mean(picked) == pytest.approx(share, abs=0.1)


def test_pods_that_leave_get_nothing_more():
    ready, balancer = ReadyPods(range(5)), RoundRobin()
    balancer.use(ready)
    for number in (1, 4, 0):
        ready.remove(number)
        assert number not in ready
    assert {balancer.pick(0.0) for _ in range(10)} == {2, 3}


def test_a_poisson_process_follows_its_ramp():
    times = poisson_times(parse_schedule("0..100@100s"), 100, np.random.default_rng(1))
    assert len(times) == pytest.approx(5000, rel=0.05)
    assert (times < 50).sum() == pytest.approx(1250, rel=0.08)


def test_a_poisson_process_ends_with_the_time_that_is_simulated():
    assert poisson_times(parse_schedule("0..100@100s"), 10, np.random.default_rng(1)).max() < 10


@pytest.mark.parametrize("pattern", ["step", "ramp", "burst", "sawtooth", "day"])
def test_a_pattern_stays_between_low_and_high_and_lasts_as_long_as_asked(pattern: str):
    schedule = pattern_schedule(pattern, 2, 10, 3600)
    assert schedule.seconds == pytest.approx(3600)
    assert min(step.start for step in schedule.steps) == 2
    assert max(max(step.start, step.end) for step in schedule.steps) == pytest.approx(10)


def test_lengths_have_the_mean_and_deviation_that_are_asked_for():
    drawn = draw_lengths(parse_lengths("lognormal:256:128"), 200_000, np.random.default_rng(1))
    assert drawn.mean() == pytest.approx(256, rel=0.01)
    assert drawn.std() == pytest.approx(128, rel=0.02)


@pytest.mark.parametrize(
    ("text", "mean", "p95"),
    [
        ("30", 30, 30),
        ("uniform:20:40", 30, 39),
        ("normal:60:10", 60, 76.449),
        ("exponential:30", 30, 89.872),
        ("lognormal:60:20", 60, 97.0836),
        ("choice:0,0,0,90", 22.5, 90),
    ],
)
def test_pod_starts_follow_their_distribution(text: str, mean: float, p95: float):
    durations, random = parse_durations(text), Random(1)
    assert np.mean([durations.draw(random) for _ in range(40_000)]) == pytest.approx(mean, rel=0.02)
    assert durations.quantile(0.95) == pytest.approx(p95, rel=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unifrom:1:2", "perhaps you meant uniform:LOWEST:HIGHEST"),
        ("uniform:40:20", "write uniform:20:40"),
        ("normal:60", "has 1 times; write normal:MEAN:DEVIATION"),
        ("lognormal:0:1", "has the mean 0"),
        ("soon", "is not a duration above 0"),
        ("-5", "is not a duration above 0"),
        ("pareto:1:2", "is no distribution of times; write 30s, uniform"),
    ],
)
def test_what_is_no_distribution_of_times_is_refused(text: str, message: str):
    with pytest.raises(UsageError, match=message):
        parse_durations(text)
