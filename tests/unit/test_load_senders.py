"""When the load client sends, and what it measures: with a service of our own instead of a server."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from random import Random
from typing import Any

import pytest
from failures import ErrorKind, RequestFailure
from questions import Question
from request_log import RequestLog
from schedules import parse_schedule
from senders import Asker, Crowd, Patience, Tasks, backoff_seconds, send_closed, send_open
from tallies import Tally

QUESTION = Question("Hello", 4)


class ScriptedService:
    """Answers as `script` says, given the number of the call: the tokens of each response, and failures to raise.

    A float is a pause in seconds; the last response of a script that ends without a failure is the final one.
    """

    def __init__(self, script: Callable[[int], list[int | float | RequestFailure | None]]):
        self._script = script
        self.calls = 0
        self.closed_early = 0

    async def answer(self, question: Question, timeout_seconds: float | None) -> AsyncGenerator[tuple[int, bool]]:
        script = self._script(self.calls)
        self.calls += 1
        is_over = False
        try:
            for number, item in enumerate(script):
                if isinstance(item, RequestFailure):
                    is_over = True
                    raise item
                if isinstance(item, float):
                    await asyncio.sleep(item)
                elif item is not None:
                    is_over = number == len(script) - 1
                    yield item, is_over
            is_over = True
        finally:
            self.closed_early += not is_over


class StallingService:
    """One answer at a time, at once; but from `stall_begins` to `stall_ends`, in seconds after the start, none."""

    def __init__(self, stall_begins: float, stall_ends: float):
        self._stall = (stall_begins, stall_ends)
        self._started = time.monotonic()
        self._turn = asyncio.Lock()

    async def answer(self, question: Question, timeout_seconds: float | None) -> AsyncGenerator[tuple[int, bool]]:
        async with self._turn:
            elapsed = time.monotonic() - self._started
            if self._stall[0] <= elapsed < self._stall[1]:
                await asyncio.sleep(self._stall[1] - elapsed)
        yield 1, True


def ask_once(script: list, question: Question = QUESTION, **patience: Any) -> tuple[Tally, ScriptedService]:
    return ask_scripted(lambda call: script, question, **patience)


def ask_scripted(script: Callable, question: Question = QUESTION, **patience: Any) -> tuple[Tally, ScriptedService]:
    tally, service = Tally(), ScriptedService(script)
    asker = Asker(service, tally, Patience(**patience), Random(1), streams=True)
    asyncio.run(asker.ask(question, time.monotonic()))
    return tally, service


def failure(kind: ErrorKind) -> RequestFailure:
    return RequestFailure(kind, f"a message of {kind}")


# ---- one request -----------------------------------------------------------------------------------------------------


def test_an_answer_is_measured_response_by_response():
    tally, _ = ask_once([0.02, 1, 0.03, 2, 0.2, 1])
    assert (tally.sent, tally.ok, tally.in_flight) == (1, 1, 0)
    assert (tally.responses, tally.tokens) == (3, 4)
    assert tally.time_to_first_token.min_seconds >= 0.02
    assert tally.response_gap.count == 2
    assert tally.response_gap.sum_seconds >= 0.23
    # The same time, shared among the tokens that it brought: two of 15 ms, one of 200 ms.
    assert tally.inter_token.count == 3
    assert tally.inter_token.sum_seconds == pytest.approx(tally.response_gap.sum_seconds)
    assert tally.inter_token.min_seconds == pytest.approx(tally.response_gap.min_seconds / 2)
    assert tally.end_to_end.min_seconds >= 0.25


def test_a_response_without_tokens_is_no_first_token_and_no_gap():
    tally, _ = ask_once([0, 0.02, 1, 0])
    assert tally.responses == 3
    assert tally.time_to_first_token.min_seconds >= 0.02
    assert tally.response_gap.count == 0
    assert tally.ok == 1


def test_an_answer_that_ends_without_a_finish_reason_is_incomplete():
    tally, _ = ask_once([1, 1, None])
    assert tally.errors["incomplete"] == 1
    assert tally.examples["incomplete"] == "the answer ended after 2 tokens without a finish_reason"
    assert (tally.ok, tally.end_to_end.count, tally.time_to_first_token.count) == (0, 0, 1)


def test_a_failure_is_counted_by_kind_with_its_first_message():
    tally, _ = ask_once([1, failure("failed")])
    assert tally.errors["failed"] == 1
    assert tally.failed == 1
    assert tally.examples == {"failed": "a message of failed"}


def test_a_stream_is_cancelled_once_it_has_so_many_tokens():
    tally, service = ask_once([1, 1, 1, 1, 1], Question("Hello", 5, cancel_after_tokens=3))
    assert (tally.cancelled, tally.ok, tally.failed, tally.tokens) == (1, 0, 0, 3)
    assert service.closed_early == 1


def test_a_stream_that_ends_with_the_tokens_to_cancel_after_is_complete():
    tally, _ = ask_once([1, 4], Question("Hello", 5, cancel_after_tokens=3))
    assert (tally.cancelled, tally.ok) == (0, 1)


# ---- retries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["refused", "unavailable"])
def test_a_refused_request_is_asked_again(kind: ErrorKind):
    tally, service = ask_scripted(lambda call: [failure(kind)] if call < 2 else [1], retries=2)
    assert (tally.sent, tally.ok, tally.failed, tally.retries, service.calls) == (1, 1, 0, 2, 3)
    assert tally.time_to_first_token.min_seconds >= 0.15  # its pauses are in its latency: 0.1 s and 0.2 s, jittered


def test_retries_come_to_an_end():
    tally, service = ask_once([failure("refused")], retries=2)
    assert (tally.sent, tally.ok, tally.errors["refused"], tally.retries, service.calls) == (1, 0, 1, 2, 3)


@pytest.mark.parametrize("kind", ["bad_request", "timeout", "failed"])
def test_other_failures_are_not_asked_again(kind: ErrorKind):
    tally, _ = ask_once([failure(kind)], retries=2)
    assert (tally.errors[kind], tally.retries) == (1, 0)


def test_nothing_is_asked_again_after_its_first_token():
    tally, _ = ask_once([1, failure("unavailable")], retries=2)
    assert (tally.errors["unavailable"], tally.retries) == (1, 0)


def test_nothing_is_asked_again_after_its_timeout():
    tally, _ = ask_once([failure("refused")], retries=9, timeout_seconds=0.3)
    assert tally.errors["refused"] == 1
    assert tally.retries < 3


def test_pauses_double_up_to_a_limit():
    random = Random(1)
    for tries, longest in ((0, 0.1), (1, 0.2), (3, 0.8), (9, 5.0), (10_000, 5.0)):
        pauses = [backoff_seconds(tries, 5.0, random) for _ in range(100)]
        assert longest / 2 <= min(pauses) < max(pauses) <= longest


# ---- open loop -------------------------------------------------------------------------------------------------------


def run(work: Callable[[Tally, Tasks], Coroutine[Any, Any, None]]) -> Tally:
    """A tally after `work` and after every request that it started."""

    async def whole() -> Tally:
        def on_defect() -> None:
            raise AssertionError("a request raised what it must not")

        tally, tasks = Tally(), Tasks(on_defect)
        tally.begin()
        await work(tally, tasks)
        await tasks.wait()
        assert tasks.defect is None
        return tally

    return asyncio.run(whole())


def open_load(make_service: Callable[[], Any], times: list[float], limit: int = 1000) -> Tally:
    async def work(tally: Tally, tasks: Tasks) -> None:
        asker = Asker(make_service(), tally, Patience(), Random(1), streams=True)
        await send_open(iter([(at, QUESTION) for at in times]), asker, tasks, tally, limit)

    return run(work)


def test_a_stalled_service_holds_up_no_request_of_an_open_loop():
    """200 requests a second; 0.4 s of silence must show in some 80 latencies, not in one."""
    times = [number / 200 for number in range(160)]
    tally = open_load(lambda: StallingService(0.2, 0.6), times)
    assert tally.ok == 160
    waited = [0.6 - at for at in times if 0.2 <= at < 0.6]
    # A request that was due in the silence waited for its rest, whatever else this machine does.
    assert tally.time_to_first_token.sum_seconds >= sum(waited) * 0.95
    assert tally.time_to_first_token.percentile(90) > 0.25


def test_a_closed_loop_shows_the_same_stall_once():
    """However long it is; so a closed loop says little about clients who do not wait for each other."""

    async def work(tally: Tally, tasks: Tasks) -> None:
        asker = Asker(StallingService(0.2, 1.2), tally, Patience(), Random(1), streams=True)
        questions = itertools.islice(itertools.repeat(QUESTION), 100_000)
        await send_closed(parse_schedule("1"), 1.4, Crowd(questions, asker, Random(1)), tasks, tally)

    tally = run(work)
    slow = tally.time_to_first_token.count - tally.time_to_first_token.counts_up_to([0.5])[0]
    assert slow == 1


def test_latency_counts_from_when_a_request_was_due_though_the_client_was_late():
    """The client itself is held up for 0.3 s."""

    async def work(tally: Tally, tasks: Tasks) -> None:
        service = ScriptedService(lambda call: [1])
        asker = Asker(service, tally, Patience(), Random(1), streams=True)
        asyncio.get_running_loop().call_later(0.05, time.sleep, 0.3)
        await send_open(iter([(at / 100, QUESTION) for at in range(30)]), asker, tasks, tally, 1000)

    tally = run(work)
    assert tally.lateness.max_seconds > 0.25
    assert tally.end_to_end.sum_seconds >= tally.lateness.sum_seconds > 24 * 0.3 / 2 * 0.9  # those due in the meantime
    assert tally.end_to_end.max_seconds > 0.25


def test_requests_beyond_the_limit_in_flight_are_not_sent_and_counted():
    tally = open_load(lambda: ScriptedService(lambda call: [0.3, 1]), [0.0] * 10, limit=4)
    assert (tally.sent, tally.ok, tally.not_sent, tally.failed) == (4, 4, 6, 0)
    assert tally.error_ratio == 0.6


def test_what_is_cut_off_is_counted_apart():
    async def work(tally: Tally, tasks: Tasks) -> None:
        service = ScriptedService(lambda call: [1, 60.0, 1])
        asker = Asker(service, tally, Patience(), Random(1), streams=True)
        await send_open(iter([(0.0, QUESTION)] * 3), asker, tasks, tally, 1000)
        while tally.responses < 3:
            await asyncio.sleep(0.01)
        await tasks.cancel()
        assert service.closed_early == 3

    tally = run(work)
    assert (tally.sent, tally.ok, tally.cut_off, tally.failed, tally.in_flight) == (3, 0, 3, 0, 0)


# ---- closed loop -----------------------------------------------------------------------------------------------------


def closed_load(schedule: str, end_seconds: float, script: list, requests: int = 100_000) -> tuple[Tally, list[int]]:
    """The tally, and how many requests were in flight whenever one was sent."""
    seen: list[int] = []

    async def work(tally: Tally, tasks: Tasks) -> None:
        def each_call(call: int) -> list:
            seen.append(tally.in_flight)
            return script

        asker = Asker(ScriptedService(each_call), tally, Patience(), Random(1), streams=True)
        crowd = Crowd(itertools.islice(itertools.repeat(QUESTION), requests), asker, Random(1))
        await send_closed(parse_schedule(schedule, whole=True), end_seconds, crowd, tasks, tally)

    return run(work), seen


def test_as_many_requests_are_in_flight_as_there_are_users():
    tally, seen = closed_load("5", 0.5, [0.02, 1])
    assert max(seen) == 5
    assert tally.ok == tally.sent > 5


def test_users_come_and_go_as_the_schedule_says():
    _, seen = closed_load("2@0.5s,6@0.5s,1@1s", 9.9, [0.02, 1])
    assert max(seen) == 6
    assert max(seen[:5]) == 2
    assert seen[-1] == 1


def test_no_more_requests_are_sent_than_asked():
    tally, _ = closed_load("5", 60.0, [1], requests=23)
    assert (tally.sent, tally.ok) == (23, 23)


def test_a_user_who_was_refused_pauses():
    tally, _ = closed_load("2", 0.6, [failure("unavailable")])
    assert 2 <= tally.errors["unavailable"] < 20  # hundreds of thousands without a pause


def test_a_defect_of_ours_is_kept_and_ends_the_load():
    async def whole() -> tuple[Tasks, asyncio.Event]:
        told = asyncio.Event()
        tasks = Tasks(on_defect=told.set)

        async def defect() -> None:
            raise ZeroDivisionError

        tasks.start(defect())
        await tasks.wait()
        await asyncio.sleep(0)
        return tasks, told

    tasks, told = asyncio.run(whole())
    assert isinstance(tasks.defect, ZeroDivisionError)
    assert told.is_set()


# ---- a line per request


def logged(tmp_path: Path, script: Callable, **patience: Any) -> list[dict[str, Any]]:
    path = tmp_path / "requests.jsonl"
    log = RequestLog(path)
    asker = Asker(ScriptedService(script), Tally(), Patience(**patience), Random(1), streams=True, log=log)
    asyncio.run(asker.ask(QUESTION, time.monotonic() - 2))
    log.close()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_request_log_has_when_and_how_each_ended(tmp_path: Path):
    before = time.time()
    (line,) = logged(tmp_path, lambda call: [0.05, 1, 0.05, 3])
    assert (line["tokens"], line["outcome"]) == (4, "ok")
    assert line["due"] == pytest.approx(before - 2, abs=0.5)
    assert line["due"] + 2.04 <= line["first_token"] <= line["end"] - 0.04


def test_the_request_log_has_one_line_for_a_request_that_was_sent_twice(tmp_path: Path):
    (line,) = logged(tmp_path, lambda call: [1, 1] if call else [failure("refused")], retries=1)
    assert (line["tokens"], line["outcome"]) == (2, "ok")
    (line,) = logged(tmp_path, lambda call: [1, failure("unavailable")], retries=1)
    assert (line["tokens"], line["outcome"]) == (1, "unavailable")
    (line,) = logged(tmp_path, lambda call: [failure("refused")])
    assert (line["first_token"], line["outcome"]) == (None, "refused")


def test_a_full_disk_ends_the_request_log_and_not_the_load(capsys: pytest.CaptureFixture[str]):
    log = RequestLog(Path("/dev/full"))
    for _ in range(2):
        log.write(due=0.0, first_token=None, end=1.0, tokens=0, outcome="ok")
    assert capsys.readouterr().err == "--request-log ends here, it cannot be written: No space left on device\n"
