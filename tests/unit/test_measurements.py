"""What is counted, and when: time as it passes, tokens as they come, requests as they end."""

from __future__ import annotations

import measurements as module
import pytest
from measurements import INTER_TOKEN_BUCKETS, Measurements

SECOND_NS = 1_000_000_000


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_compute_time_grows_while_a_request_runs(clock: Clock):
    counted = Measurements(max_batch_size=4)
    counted.now_in_flight(2, in_engine=2)
    clock.now += 3.0
    assert counted.take().compute_seconds == pytest.approx(6.0)
    clock.now += 1.0
    counted.now_in_flight(0, in_engine=0)
    clock.now += 100.0
    assert counted.take().compute_seconds == pytest.approx(2.0)


def test_sequences_beyond_the_slots_wait_wherever_they_are(clock: Clock):
    counted = Measurements(max_batch_size=4)
    counted.now_in_flight(7, in_engine=5)
    clock.now += 2.0
    taken = counted.take()
    assert (taken.compute_seconds, taken.waiting_seconds) == pytest.approx((8.0, 6.0))


def test_what_was_taken_is_not_taken_again(clock: Clock):
    counted = Measurements(4)
    counted.arrived(7)
    counted.tokens(3, None)
    counted.ended("stop", 1.5, [(7, 3)])
    first, second = counted.take(), counted.take()
    assert (first.prompt_tokens, first.generated_tokens, first.ended) == (7, 3, {"stop": 1})
    assert (first.request_seconds, first.input_lengths, first.output_lengths) == ([1.5], [7], [3])
    assert second == module.Taken()


@pytest.mark.parametrize(
    ("tokens", "seconds", "bucket"),
    [(1, 0.001, 0), (1, 0.0011, 1), (10, 0.1, 3), (1, 2.5, len(INTER_TOKEN_BUCKETS) - 1), (1, 9, -1)],
)
def test_tokens_that_come_together_share_the_time_since_the_last(tokens: int, seconds: float, bucket: int):
    counted = Measurements(4)
    counted.tokens(tokens, int(seconds * SECOND_NS))
    taken = counted.take()
    assert taken.inter_token_counts[bucket] == tokens == sum(taken.inter_token_counts)
    assert taken.inter_token_seconds == pytest.approx(seconds)


def test_the_first_token_has_none_before_it():
    counted = Measurements(4)
    counted.tokens(1, None)
    taken = counted.take()
    assert taken.generated_tokens == 1
    assert sum(taken.inter_token_counts) == 0


def test_refusals_are_counted_by_reason():
    counted = Measurements(4)
    counted.refused("queue_full")
    counted.refused("queue_full")
    counted.refused("queue_timeout")
    counted.invalid()
    taken = counted.take()
    assert taken.refusals == {"queue_full": 2, "queue_timeout": 1}
    assert taken.ended == {"invalid": 1}
