"""Which Pod a request goes to: by request (round robin, least requests) or by connection."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from heapq import heappop, heappush
from random import Random
from typing import Literal, Protocol

Balancing = Literal["round-robin", "least-requests", "connection"]


class ReadyPods:
    """The Pods that take requests, by number; each change costs the same, however many there are."""

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self.numbers: list[int] = []
        self._places: dict[int, int] = {}
        for number in numbers:
            self.add(number)

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def add(self, number: int) -> None:
        self._places[number] = len(self.numbers)
        self.numbers.append(number)

    def remove(self, number: int) -> None:
        """The last one takes its place."""
        place, last = self._places.pop(number), self.numbers.pop()
        if last != number:
            self.numbers[place] = last
            self._places[last] = place


class Balancer(Protocol):
    def use(self, ready: ReadyPods) -> None:
        """Pick of these, as they are at each pick; never none."""
        ...

    def pick(self, seconds: float) -> int:
        """The Pod of a request that comes now."""
        ...

    def took(self, pod: int, end_seconds: float) -> None:
        """The Pod has it until then."""
        ...


class RoundRobin:
    """Each request to the next Pod: a proxy, or a client with `--round-robin`."""

    def __init__(self) -> None:
        self._ready: list[int] = []
        self._next = 0

    def use(self, ready: ReadyPods) -> None:
        self._ready = ready.numbers

    def pick(self, seconds: float) -> int:
        self._next += 1
        if self._next >= len(self._ready):
            self._next = 0
        return self._ready[self._next]

    def took(self, pod: int, end_seconds: float) -> None:
        pass


class LeastRequests:
    """The emptier of two Pods that are drawn, as Envoy's LEAST_REQUEST does by default."""

    def __init__(self, random: Random) -> None:
        self._ready: list[int] = []
        self._random = random.random
        self._ends: defaultdict[int, list[float]] = defaultdict(list)

    def use(self, ready: ReadyPods) -> None:
        self._ready = ready.numbers

    def pick(self, seconds: float) -> int:
        ready, number = self._ready, len(self._ready)
        first = ready[int(self._random() * number)]
        second = ready[int(self._random() * number)]
        if first == second:
            return first
        return first if self._in_flight(first, seconds) <= self._in_flight(second, seconds) else second

    def took(self, pod: int, end_seconds: float) -> None:
        heappush(self._ends[pod], end_seconds)

    def _in_flight(self, pod: int, seconds: float) -> int:
        ends = self._ends[pod]
        while ends and ends[0] <= seconds:
            heappop(ends)
        return len(ends)


class Connections:
    """A Service balances connections: all requests of one go to the Pod that it was opened to, until it is `age` old or
    its Pod takes no more. Requests come on any of them alike."""

    def __init__(self, number: int, age_seconds: float, random: Random) -> None:
        self._random = random.random
        self._age_seconds = age_seconds
        self._pods = [-1] * number
        self._until = [-math.inf] * number
        self._ready = ReadyPods()

    def use(self, ready: ReadyPods) -> None:
        self._ready = ready

    def pick(self, seconds: float) -> int:
        connection = int(self._random() * len(self._pods))
        if seconds >= self._until[connection] or self._pods[connection] not in self._ready:
            numbers = self._ready.numbers
            self._pods[connection] = numbers[int(self._random() * len(numbers))]
            self._until[connection] = seconds + self._age_seconds
        return self._pods[connection]

    def took(self, pod: int, end_seconds: float) -> None:
        pass
