"""The servers of a fleet: slots, a queue, a KV cache; and what each of them would answer at /metrics.

First come, first served, and nobody is preempted, so what becomes of a request is known when it arrives: later ones
never change it (the recursion of Kiefer and Wolfowitz for a queue with several servers). So a request costs some
microseconds and no event of the simulation; the state at a given time is counted afterwards, in arrays over all Pods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol

import numpy as np
from autoscaling.balancing import Balancer, ReadyPods
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]

TOKENS_PER_BLOCK = 32  # of the KV cache, as the synthetic engine's

_ENTER, _START, _END = 0, 1, 2  # a request's ways: into the engine, into a slot, out
_KINDS = 3


@dataclass(frozen=True, kw_only=True)
class ServerModel:
    """What one Pod can do. `tokens_per_second` is each sequence's own rate, at the batch that will be served."""

    slots: int
    tokens_per_second: float
    prefill_seconds: float
    prefill_tokens_per_second: float = math.inf
    kv_tokens: int | None = None

    @property
    def margin(self) -> int:
        """Requests that the engine holds ready for the next free slot (dispatcher.py)."""
        return max(1, self.slots // 8)

    @property
    def kv_blocks(self) -> float:
        return math.inf if self.kv_tokens is None else self.kv_tokens // TOKENS_PER_BLOCK

    def prefill(self, input_tokens: NDArray) -> Floats:
        """Seconds from the slot to the first token."""
        return self.prefill_seconds + input_tokens / self.prefill_tokens_per_second

    def service(self, input_tokens: NDArray, output_tokens: NDArray) -> Floats:
        """Seconds in a slot: the first token comes with the prefill's end."""
        return self.prefill(input_tokens) + (output_tokens - 1) / self.tokens_per_second

    def blocks(self, input_tokens: NDArray, output_tokens: NDArray) -> Numbers:
        """Of the KV cache, for prompt and whole answer, reserved from the start."""
        return -(-(input_tokens + output_tokens) // TOKENS_PER_BLOCK)


class Source(Protocol):
    """Where requests come from."""

    def ask_until(self, seconds: float, fleet: Fleet) -> None:
        """Calls `fleet.serve` for each request that arrives until then, in the order of time."""
        ...


class _Server:
    """One Pod's queue. `running` and `places` hold ends that lie ahead, and some that are over."""

    __slots__ = ("blocks_max", "blocks_used", "last_end", "last_start", "num_places", "places", "running", "slots")

    def __init__(self, model: ServerModel):
        self.slots = model.slots
        self.num_places = model.slots + model.margin
        self.blocks_max = model.kv_blocks
        self.blocks_used = 0
        self.running: list[tuple[float, int]] = []
        self.places: list[float] = []
        self.last_start = self.last_end = 0.0

    def admit(self, arrival: float, service: float, blocks: int) -> tuple[float, float, float]:
        """When the request leaves Triton's queue, gets its slot, and ends. Most of a run's time is spent here, hence
        comparisons in place of max()."""
        entered = arrival
        if len(self.places) >= self.num_places and (freed := heappop(self.places)) > arrival:
            entered = freed
        start = entered if entered > self.last_start else self.last_start
        running, used = self.running, self.blocks_used
        while running and running[0][0] <= start:
            used -= heappop(running)[1]
        while len(running) >= self.slots or used + blocks > self.blocks_max:
            end, freed_blocks = heappop(running)
            start = end if end > start else start
            used -= freed_blocks
        end = start + service
        heappush(running, (end, blocks))
        heappush(self.places, end)
        self.blocks_used = used + blocks
        self.last_start = start
        if end > self.last_end:
            self.last_end = end
        return entered, start, end


@dataclass(frozen=True, kw_only=True, slots=True)
class Gauges:
    """Of some Pods at one time, an element each: what /metrics has, gauges first, then counters."""

    pending: Floats  # in Triton's queue: nv_inference_pending_request_count
    waiting: Floats  # in the engine without a slot: nv_trt_llm_request_metrics{request_type="waiting"}
    running: Floats  # {request_type="scheduled"}
    kv_fraction: Floats
    queue_seconds: Floats  # nv_inference_queue_duration_us / 1e6: moves when a request leaves Triton's queue
    waiting_seconds: Floats  # triton_trtllm_waiting_seconds_total
    compute_seconds: Floats  # triton_trtllm_compute_seconds_total


class Fleet:
    """All servers that take requests or still answer some. Pods are numbers, which may be used again."""

    def __init__(self, model: ServerModel, source: Source, balancer: Balancer):
        self.model = model
        self._source = source
        self._balancer = balancer
        self._pick, self._took = balancer.pick, balancer.took
        self._servers: list[_Server | None] = []
        self._now = 0.0
        # Columns of requests that were served since the last settling.
        self._new: tuple[list, ...] = ([], [], [], [], [], [], [])
        self._done: list[tuple[Floats, Floats, Floats, Floats]] = []
        # What lies ahead: at which time, of which Pod and kind, and what it adds.
        self._times = np.empty(0)
        self._codes = np.empty(0, np.int64)
        self._amounts = np.empty(0)
        # What has happened, by Pod and kind: how often, the sum of its times, the sum of its amounts.
        self._counts = np.zeros(0)
        self._sums = np.zeros(0)
        self._totals = np.zeros(0)
        self._arrivals = np.zeros(0)

    def open(self, pod: int) -> None:
        """A server with this number, empty."""
        while pod >= len(self._servers):
            self._servers.append(None)
        if missing := max(0, 2 * len(self._servers) - len(self._arrivals)) if pod >= len(self._arrivals) else 0:
            self._arrivals = np.concatenate([self._arrivals, np.zeros(missing)])
            zeros = np.zeros(missing * _KINDS)
            self._counts, self._sums, self._totals = (
                np.concatenate([column, zeros]) for column in (self._counts, self._sums, self._totals)
            )
        codes = slice(pod * _KINDS, (pod + 1) * _KINDS)
        self._arrivals[pod] = 0
        self._counts[codes] = self._sums[codes] = self._totals[codes] = 0
        self._servers[pod] = _Server(self.model)

    def balance(self, ready: ReadyPods) -> None:
        """These take requests. Before they change, `advance` must have asked for all that came until then."""
        self._balancer.use(ready)

    def advance(self, now: float) -> None:
        """All that arrives until now has its Pod afterwards."""
        self._source.ask_until(now, self)
        self._now = now

    def serve(self, arrival: float, prefill: float, service: float, blocks: int) -> float:
        """One request; the time at which it ends."""
        pod = self._pick(arrival)
        entered, start, end = self._servers[pod].admit(arrival, service, blocks)
        self._took(pod, end)
        pods, arrivals, entries, starts, ends, prefills, taken = self._new
        pods.append(pod)
        arrivals.append(arrival)
        entries.append(entered)
        starts.append(start)
        ends.append(end)
        prefills.append(prefill)
        taken.append(blocks)
        return end

    def last_end(self, pod: int) -> float:
        """When the server is empty, if nobody new comes."""
        return self._servers[pod].last_end

    def cut(self, pod: int, deadline: float) -> int:
        """A server that takes no more is killed then; the number of requests that do not get their whole answer."""
        self.settle()
        lost = (self._codes // _KINDS == pod) & (self._times > deadline)
        number = int((lost & (self._codes % _KINDS == _END)).sum())
        self._times, self._codes, self._amounts = self._times[~lost], self._codes[~lost], self._amounts[~lost]
        return number

    def settle(self) -> None:
        """Counts what has happened until now."""
        self._take_new()
        due = self._times <= self._now
        if not due.any():
            return
        codes, times = self._codes[due], self._times[due]
        size = len(self._counts)
        self._counts += np.bincount(codes, minlength=size)
        self._sums += np.bincount(codes, times, minlength=size)
        self._totals += np.bincount(codes, self._amounts[due], minlength=size)
        ahead = ~due
        self._times, self._codes, self._amounts = self._times[ahead], self._codes[ahead], self._amounts[ahead]

    def gauges(self, pods: Numbers) -> Gauges:
        """As of the last `settle`."""
        counts = self._counts.reshape(-1, _KINDS)[pods]
        totals = self._totals.reshape(-1, _KINDS)[pods]
        # The time since each of them happened, summed up: the integral of how many of them there were.
        since = counts * self._now - self._sums.reshape(-1, _KINDS)[pods]
        in_use = totals[:, _START] + totals[:, _END]
        return Gauges(
            pending=self._arrivals[pods] - counts[:, _ENTER],
            waiting=counts[:, _ENTER] - counts[:, _START],
            running=counts[:, _START] - counts[:, _END],
            kv_fraction=in_use / self.model.kv_blocks,
            queue_seconds=totals[:, _ENTER],
            waiting_seconds=since[:, _ENTER] - since[:, _START],
            compute_seconds=since[:, _START] - since[:, _END],
        )

    def answers(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Of every request so far: arrival, seconds to its slot, seconds to its first token, end."""
        self._take_new()
        if not self._done:
            return (np.empty(0),) * 4
        columns = tuple(np.concatenate(column) for column in zip(*self._done, strict=True))
        self._done = [columns]
        return columns

    def _take_new(self) -> None:
        if not self._new[0]:
            return
        pods, arrivals, entries, starts, ends, prefills, blocks = (np.array(column) for column in self._new)
        for column in self._new:
            column.clear()
        self._done.append((arrivals, starts - arrivals, starts - arrivals + prefills, ends))
        self._arrivals += np.bincount(pods, minlength=len(self._arrivals))
        codes = pods * _KINDS
        self._times = np.concatenate([self._times, entries, starts, ends])
        self._codes = np.concatenate([self._codes, codes + _ENTER, codes + _START, codes + _END])
        self._amounts = np.concatenate([self._amounts, entries - arrivals, blocks, -blocks])
