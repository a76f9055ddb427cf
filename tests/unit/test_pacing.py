"""Streams are answered at once while there are few, together as there are more, and no faster than they are decoded."""

from __future__ import annotations

from pathlib import Path

import pacing
import pytest
from pacing import MAX_SECONDS, Pacer, affordable_responses_per_second


@pytest.mark.parametrize(
    ("num_streams", "seconds"), [(0, 0.0), (1, 0.0), (2, 0.01), (11, 0.1), (21, MAX_SECONDS), (5000, MAX_SECONDS)]
)
def test_the_time_between_responses_grows_with_the_streams_to_what_a_reader_bears(num_streams: int, seconds: float):
    pacer = Pacer(responses_per_second=100)
    pacer.num_streams = num_streams
    assert pacer.seconds_between == pytest.approx(seconds)


def send(pacer: Pacer, number: int, now: float) -> int:
    """As many as are asked for, or as may go."""
    for sent in range(number):
        if not pacer.may_send(now):
            return sent
        pacer.next_number(now)
    return number


def test_only_so_many_responses_are_on_their_way():
    pacer = Pacer(100)
    assert send(pacer, 1000, now=10.0) == pacing._MAX_UNDECODED


def test_those_that_are_decoded_make_room():
    pacer = Pacer(100)
    send(pacer, 1000, now=10.0)
    pacer.done(10, now=10.1)
    assert send(pacer, 1000, now=10.1) == 10


def test_a_report_covers_all_before_it():
    pacer = Pacer(100)
    assert send(pacer, 5, now=10.0) == 5
    pacer.done(3, now=10.0)
    assert [pacer.is_done(number) for number in range(6)] == [True, True, True, True, False, False]


@pytest.mark.parametrize("number", [0, 2, 6, 10**9], ids=["none", "an old one", "the next", "nonsense"])
def test_a_report_that_says_nothing_new_changes_nothing(number: int):
    pacer = Pacer(100)
    send(pacer, 5, now=10.0)
    pacer.done(3, now=10.0)
    pacer.done(number, now=10.0)
    assert not pacer.is_done(4)
    assert pacer.is_done(3)


def test_without_any_report_responses_count_as_lost_after_a_while():
    pacer = Pacer(100)
    send(pacer, 1000, now=10.0)
    assert not pacer.may_send(10.9)
    assert pacer.may_send(11.1)


def test_reports_that_come_keep_the_limit():
    pacer = Pacer(100)
    send(pacer, 1000, now=10.0)
    for tenth in range(1, 51):  # one response decoded in 0.1 s: a machine that hardly moves
        pacer.done(tenth, now=10.0 + tenth / 10)
        assert send(pacer, 1000, now=10.0 + tenth / 10) == 1


def test_a_quiet_time_before_is_no_loss():
    pacer = Pacer(100)
    send(pacer, 1, now=10.0)
    pacer.done(1, now=10.0)
    assert send(pacer, 1000, now=100.0) == pacing._MAX_UNDECODED
    assert not pacer.may_send(100.5)


def test_an_engine_on_the_cpu_gets_most_of_it():
    assert affordable_responses_per_second(computes_on_cpu=True) < affordable_responses_per_second(False) / 10


@pytest.mark.parametrize(
    ("cpu_max", "cores"), [("150000 100000", 1.5), ("50000 100000", 0.5), ("max 100000", 8), ("900000 100000", 8)]
)
def test_a_container_has_the_cores_of_its_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_max: str, cores: float
):
    file = tmp_path / "cpu.max"
    file.write_text(cpu_max + "\n")
    monkeypatch.setattr(pacing, "Path", lambda name: file)
    monkeypatch.setattr(pacing.os, "sched_getaffinity", lambda pid: set(range(8)))
    assert pacing._num_cores() == cores


def test_without_a_quota_a_container_has_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pacing, "Path", lambda name: tmp_path / "none")
    monkeypatch.setattr(pacing.os, "sched_getaffinity", lambda pid: {0, 3})
    assert pacing._num_cores() == 2
