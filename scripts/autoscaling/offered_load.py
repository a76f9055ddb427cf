"""The load: a trace, a rate that follows a schedule (open loop), or users who wait for their answers (closed loop)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from autoscaling.servers import Fleet, Floats, Numbers, ServerModel, Source
from failures import UsageError
from lengths import Lengths
from schedules import Schedule, Step
from traces import read_trace

Pattern = Literal["step", "ramp", "burst", "sawtooth", "day"]

CHARACTERS_PER_TOKEN = 4  # of a prompt that a trace has as text: there is no tokenizer here

_BATCH = 4096  # drawn at once


class OfferedLoad(Protocol):
    seconds: float
    description: str

    def source(self, server: ServerModel) -> Source: ...

    def concurrency(self, server: ServerModel, times: Floats) -> Floats:
        """Requests that there would be at these times if none had to wait."""
        ...

    def sample(self) -> tuple[Numbers, Numbers]:
        """Tokens in and out of its requests, or of as many as tell their distribution."""
        ...


@dataclass(frozen=True, kw_only=True)
class OpenLoad:
    """Requests that come at their times, whatever became of those before. The arrays have one element per request."""

    description: str
    seconds: float
    times: Floats
    input_tokens: Numbers
    output_tokens: Numbers

    def source(self, server: ServerModel) -> Source:
        _check_fits(server, int(server.blocks(self.input_tokens, self.output_tokens).max(initial=0)))
        return _OpenSource(self, server)

    def concurrency(self, server: ServerModel, times: Floats) -> Floats:
        ends = np.sort(self.times + server.service(self.input_tokens, self.output_tokens))
        return (np.searchsorted(self.times, times, "right") - np.searchsorted(ends, times, "right")).astype(float)

    def sample(self) -> tuple[Numbers, Numbers]:
        return self.input_tokens, self.output_tokens


@dataclass(frozen=True, kw_only=True)
class ClosedLoad:
    """As many users as the schedule says, each of whom asks again when the answer is there."""

    description: str
    seconds: float
    users: Schedule
    input_lengths: Lengths
    output_lengths: Lengths
    think_seconds: float
    seed: int

    def source(self, server: ServerModel) -> Source:
        return _ClosedSource(self, server)

    def concurrency(self, server: ServerModel, times: Floats) -> Floats:
        service = float(server.service(*self.sample()).mean())
        users = np.array([math.floor(self.users.level(float(time)) + 1e-9) for time in times], dtype=float)
        return users * service / (service + self.think_seconds)

    def sample(self) -> tuple[Numbers, Numbers]:
        return self._sample

    @cached_property
    def _sample(self) -> tuple[Numbers, Numbers]:
        generator = np.random.default_rng(self.seed)
        return draw_lengths(self.input_lengths, 10_000, generator), draw_lengths(self.output_lengths, 10_000, generator)


class _OpenSource:
    def __init__(self, load: OpenLoad, server: ServerModel):
        self._times = load.times
        self._prefills = server.prefill(load.input_tokens)
        self._services = server.service(load.input_tokens, load.output_tokens)
        self._blocks = server.blocks(load.input_tokens, load.output_tokens)
        self._next = 0

    def ask_until(self, seconds: float, fleet: Fleet) -> None:
        end = int(np.searchsorted(self._times, seconds, "right"))
        if end == self._next:
            return
        part = slice(self._next, end)
        self._next = end
        serve = fleet.serve
        columns = (self._times, self._prefills, self._services, self._blocks)
        for request in zip(*(column[part].tolist() for column in columns), strict=True):
            serve(*request)


class _ClosedSource:
    def __init__(self, load: ClosedLoad, server: ServerModel):
        self._load = load
        self._server = server
        self._generator = np.random.default_rng(load.seed)
        self._questions: list[tuple[float, float, int]] = []
        # Who asks next. A user who is here already when called again does not come twice.
        self._turns = [(time, user) for time, user in _joins(load.users, load.seconds)]
        self._next_join = 0
        self._asking: list[tuple[float, int]] = []
        self._present: set[int] = set()

    def ask_until(self, seconds: float, fleet: Fleet) -> None:
        asking, users = self._asking, self._load.users
        while True:
            join = self._turns[self._next_join] if self._next_join < len(self._turns) else (math.inf, -1)
            if min(join[0], asking[0][0] if asking else math.inf) > seconds:
                return
            if not asking or join <= asking[0]:
                self._next_join += 1
                if join[1] not in self._present:
                    self._present.add(join[1])
                    heappush(asking, join)
                continue
            time, user = heappop(asking)
            if user >= math.floor(users.level(time) + 1e-9):
                self._present.discard(user)
                continue
            if not self._questions:
                self._questions = self._draw()
            end = fleet.serve(time, *self._questions.pop())
            heappush(asking, (end + self._load.think_seconds, user))

    def _draw(self) -> list[tuple[float, float, int]]:
        tokens = [
            draw_lengths(lengths, _BATCH, self._generator)
            for lengths in (self._load.input_lengths, self._load.output_lengths)
        ]
        blocks = self._server.blocks(*tokens)
        _check_fits(self._server, int(blocks.max()))
        columns = (self._server.prefill(tokens[0]), self._server.service(*tokens), blocks)
        return list(zip(*(column.tolist() for column in columns), strict=True))


def _joins(users: Schedule, seconds: float) -> list[tuple[float, int]]:
    """When each user is called: at a step's begin, or when a ramp has reached the next whole number."""
    joins: list[tuple[float, int]] = []
    present = 0
    for begin, step in users.from_start():
        if begin >= seconds:
            break
        at_start, at_end = math.floor(step.start + 1e-9), math.floor(step.end + 1e-9)
        joins += [(begin, user) for user in range(present, at_start)]
        for user in range(at_start, at_end):
            joins.append((begin + (user + 1 - step.start) / step.slope, user))
        present = at_end
    return sorted(joins)


def _check_fits(server: ServerModel, blocks: int) -> None:
    if blocks > server.kv_blocks:
        raise UsageError(
            f"--kv-tokens {server.kv_tokens} has {server.kv_blocks:g} blocks, and the longest request needs {blocks}; "
            "an engine refuses it, so give more or shorten the requests"
        )


def from_trace(path: Path, output_tokens: int, seconds: float | None) -> OpenLoad:
    """The load client's format. Raises UsageError."""
    requests = read_trace(path)
    times = np.array([request.seconds for request in requests])
    last = float(times[-1])
    return OpenLoad(
        description=f"trace {path.name}",
        seconds=seconds or last + 1e-9,
        times=times,
        input_tokens=np.array(
            [
                request.input_tokens or max(1, math.ceil(len(request.prompt or "") / CHARACTERS_PER_TOKEN))
                for request in requests
            ]
        ),
        output_tokens=np.array([request.output_tokens or output_tokens for request in requests]),
    )


def from_rate(
    rate: Schedule, seconds: float, input_lengths: Lengths, output_lengths: Lengths, seed: int, description: str
) -> OpenLoad:
    """A Poisson process."""
    generator = np.random.default_rng(seed)
    times = poisson_times(rate, seconds, generator)
    if not len(times):
        raise UsageError(f"{description} brings no request within {seconds:g} s; give a higher rate or more time")
    return OpenLoad(
        description=description,
        seconds=seconds,
        times=times,
        input_tokens=draw_lengths(input_lengths, len(times), generator),
        output_tokens=draw_lengths(output_lengths, len(times), generator),
    )


def poisson_times(rate: Schedule, seconds: float, generator: np.random.Generator) -> Floats:
    """Of a process with this rate. Within a step they are independent, given their number."""
    parts = []
    for begin, step in rate.from_start():
        if begin >= seconds:
            break
        if math.isinf(step.seconds) or begin + step.seconds > seconds:
            length = seconds - begin
            step = Step(
                start=step.start, end=step.end if math.isinf(step.seconds) else step.level(length), seconds=length
            )
        areas = np.sort(generator.random(generator.poisson(step.area))) * step.area
        root = np.sqrt(np.maximum(step.start**2 + 2 * step.slope * areas, 0))
        parts.append(begin + 2 * areas / (step.start + root))
    return np.concatenate(parts) if parts else np.empty(0)


def draw_lengths(lengths: Lengths, number: int, generator: np.random.Generator) -> Numbers:
    """As `Lengths.draw`, so many at once."""
    match lengths.kind, lengths.numbers:
        case "uniform", (lowest, highest):
            drawn = generator.integers(int(lowest), int(highest), number, endpoint=True)
        case "normal", (mean, deviation):
            drawn = generator.normal(mean, deviation, number)
        case "lognormal", (mean, deviation):
            variance_of_log = math.log1p((deviation / mean) ** 2)
            drawn = generator.lognormal(math.log(mean) - variance_of_log / 2, math.sqrt(variance_of_log), number)
        case _:
            drawn = generator.choice(np.array(lengths.numbers), number)
    return np.maximum(1, np.rint(np.minimum(drawn, lengths.highest))).astype(np.int64)


def pattern_schedule(pattern: Pattern, low: float, high: float, seconds: float) -> Schedule:
    """Rates between `low` and `high` over a time; each begins and ends low."""
    match pattern:
        case "step":
            parts = [(low, low, 1), (high, high, 2), (low, low, 1)]
        case "ramp":
            parts = [(low, high, 2), (high, high, 1), (high, low, 1)]
        case "burst":  # six of them, each a twelfth of the time between two
            parts = [part for _ in range(6) for part in ((low, low, 11), (high, high, 1))]
        case "sawtooth":
            parts = [part for _ in range(6) for part in ((low, high, 9), (high, low, 1))]
        case "day":  # a wave with its trough at the start, in pieces of an hour of the day
            wave = [low + (high - low) * (1 - math.cos(2 * math.pi * hour / 24)) / 2 for hour in range(25)]
            parts = [(start, end, 1) for start, end in zip(wave, wave[1:], strict=False)]
    whole = sum(part for _, _, part in parts)
    return Schedule(steps=tuple(Step(start=a, end=b, seconds=seconds * part / whole) for a, b, part in parts))
