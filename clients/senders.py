"""Who asks, and when: arrivals that wait for nobody (open loop), users who wait for their answers (closed loop).

Every duration starts at the *intended* time: in an open loop when the schedule or the trace says that the request is
due, however late this program or an earlier answer is; in a closed loop when its user is ready. That is what keeps
percentiles free of coordinated omission: a server that stalls cannot hold back the requests that would show it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from failures import RETRIED_KINDS, RequestFailure
from questions import Question
from request_log import RequestLog
from schedules import Schedule
from tallies import Tally

USERS_POLL_SECONDS = 0.1
LAST_STRETCH_SECONDS = 0.002
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 5.0
LONGEST_USER_PAUSE_SECONDS = 1.0


class Service(Protocol):
    def answer(self, question: Question, timeout_seconds: float | None) -> AsyncGenerator[tuple[int, bool]]:
        """(tokens, is the last) of each response. Raises RequestFailure. Closing it cancels."""
        ...


@dataclass(frozen=True, kw_only=True)
class Patience:
    """What a client does about a service that is slow or says no."""

    timeout_seconds: float | None = None
    retries: int = 0


class Asker:
    """Asks one question after the other, or many at a time, and tallies what becomes of them."""

    def __init__(
        self,
        service: Service,
        tally: Tally,
        patience: Patience,
        random: Random,
        *,
        streams: bool,
        log: RequestLog | None = None,
    ):
        self._service = service
        self._log = log
        self._tally = tally
        self._patience = patience
        self._random = random
        self._streams = streams

    async def ask(self, question: Question, intended: float) -> bool:
        """Whether it was answered, or cancelled on purpose. `intended` is a time.monotonic()."""
        sent = time.monotonic()
        self._tally.request_sent(sent - intended)
        answer = _Answer(intended)
        outcome = "cut_off"
        try:
            await self._ask_with_retries(question, answer, sent)
            outcome = "ok" if answer.finished is not None else "cancelled"
            return True
        except RequestFailure as failure:
            outcome = failure.kind
            self._tally.request_failed(failure.kind, failure.message)
            return False
        except asyncio.CancelledError:
            self._tally.cut_off += 1
            raise
        finally:
            self._tally.request_over()
            if self._log is not None:
                self._log.write(
                    due=intended, first_token=answer.first, end=time.monotonic(), tokens=answer.tokens, outcome=outcome
                )

    def cannot_send(self, intended: float, message: str) -> None:
        """A request that was due, and is given up before it is sent."""
        self._tally.request_failed("not_sent", message)
        if self._log is not None:
            self._log.write(due=intended, first_token=None, end=time.monotonic(), tokens=0, outcome="not_sent")

    async def _ask_with_retries(self, question: Question, answer: _Answer, sent: float) -> None:
        retries = 0
        while True:  # only answers of which nothing has come are asked for again, so `answer` is as it was
            try:
                await self._ask_once(question, answer, sent)
                return
            except RequestFailure as failure:
                may_retry = failure.kind in RETRIED_KINDS and not answer.has_begun and retries < self._patience.retries
                pause = backoff_seconds(retries, LONGEST_PAUSE_SECONDS, self._random)
                if not may_retry or self._seconds_left(sent) <= pause:
                    raise
            retries += 1
            self._tally.retries += 1
            await asyncio.sleep(pause)

    def _seconds_left(self, sent: float) -> float:
        """Of --timeout, which all tries share."""
        limit = self._patience.timeout_seconds
        return float("inf") if limit is None else max(limit - (time.monotonic() - sent), 0.001)

    async def _ask_once(self, question: Question, answer: _Answer, sent: float) -> None:
        timeout = None if self._patience.timeout_seconds is None else self._seconds_left(sent)
        async with aclosing(self._service.answer(question, timeout)) as responses:
            async for tokens, is_last in responses:
                now = time.monotonic()
                self._tally.response_arrived(tokens)
                answer.tokens += tokens
                if tokens and self._streams:
                    self._note_tokens(answer, tokens, now)
                if is_last:
                    answer.finished = now
                elif question.cancel_after_tokens is not None and answer.tokens >= question.cancel_after_tokens:
                    self._tally.cancelled += 1
                    return
        if answer.finished is None:
            raise RequestFailure("incomplete", f"the answer ended after {answer.tokens} tokens without a finish_reason")
        self._tally.answer_complete(answer.finished - answer.intended)

    def _note_tokens(self, answer: _Answer, tokens: int, now: float) -> None:
        if answer.first is None or answer.latest is None:
            answer.first = now
            self._tally.time_to_first_token.record(now - answer.intended)
        else:
            self._tally.gap(now - answer.latest, tokens)
        answer.latest = now


@dataclass(slots=True)
class _Answer:
    """One answer so far. Times are time.monotonic(); `latest` is that of the latest response with tokens."""

    intended: float
    first: float | None = None
    latest: float | None = None
    finished: float | None = None
    tokens: int = 0

    @property
    def has_begun(self) -> bool:
        return self.latest is not None


def backoff_seconds(tries: int, longest_seconds: float, random: Random) -> float:
    """Exponential with jitter, so that clients refused together do not come back together."""
    return random.uniform(0.5, 1.0) * min(FIRST_PAUSE_SECONDS * 2 ** min(tries, 20), longest_seconds)


class Tasks:
    """Requests in the air."""

    def __init__(self, on_defect: Callable[[], None]) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._on_defect = on_defect
        self.defect: BaseException | None = None

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        """A request that fails is tallied, so whatever is raised here is a defect of ours; it must not pass unseen."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and self.defect is None:
            self.defect = error
            self._on_defect()

    async def wait(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self.wait()


async def send_open(
    arrivals: Iterator[tuple[float, Question]], asker: Asker, tasks: Tasks, tally: Tally, max_in_flight: int
) -> int:
    """Each question at its time in seconds after the tally's start, whatever became of those before. Their number."""
    number = 0
    for seconds, question in arrivals:
        number += 1
        intended = tally.started + seconds
        await sleep_until(intended)
        if tally.in_flight >= max_in_flight:
            asker.cannot_send(intended, f"{max_in_flight} requests were in flight already (--max-in-flight)")
        else:
            tasks.start(asker.ask(question, intended))
    return number


async def sleep_until(when: float) -> None:
    """To a tenth of a millisecond. asyncio by itself wakes up to one late, since it hands epoll whole milliseconds."""
    await asyncio.sleep(max(when - LAST_STRETCH_SECONDS - time.monotonic(), 0.0))
    left_seconds = when - time.monotonic()
    if left_seconds > 0:
        await asyncio.to_thread(time.sleep, left_seconds)


class Crowd:
    """The users of a closed loop."""

    def __init__(self, questions: Iterator[Question], asker: Asker, random: Random):
        self.wanted = 0
        self.present = 0
        self.has_asked_all = False
        self._questions = questions
        self._asker = asker
        self._random = random

    async def user(self) -> None:
        """Asks until there are more users than are wanted, or no more questions."""
        failures = 0
        while self.present <= self.wanted:
            question = next(self._questions, None)
            if question is None:
                self.has_asked_all = True
                break
            if await self._asker.ask(question, time.monotonic()):
                failures = 0
            else:  # else a server that refuses at once would be asked thousands of times a second
                await asyncio.sleep(backoff_seconds(failures, LONGEST_USER_PAUSE_SECONDS, self._random))
                failures += 1
        self.present -= 1


async def send_closed(schedule: Schedule, end_seconds: float, crowd: Crowd, tasks: Tasks, tally: Tally) -> None:
    """As many users as the schedule says, each of whom asks again when it has its answer, until `end_seconds`."""
    end_seconds = min(schedule.seconds, end_seconds)
    try:
        while (seconds := time.monotonic() - tally.started) < end_seconds and not crowd.has_asked_all:
            crowd.wanted = int(schedule.level(seconds))
            while crowd.present < crowd.wanted:
                crowd.present += 1
                tasks.start(crowd.user())
            await asyncio.sleep(min(USERS_POLL_SECONDS, end_seconds - seconds))
    finally:
        crowd.wanted = 0
