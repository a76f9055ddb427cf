"""Pods: from the decision to have one to its last answer. GPUs are what there is of nodes."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from random import Random
from typing import Any, Literal, get_args

import numpy as np
import simpy
from autoscaling.balancing import ReadyPods
from autoscaling.durations import Durations
from autoscaling.prometheus import Prometheus
from autoscaling.servers import Fleet, Numbers

State = Literal["pending", "pulling", "loading", "ready", "draining"]
_STATES: tuple[State, ...] = get_args(State)  # in the order in which a ReplicaSet deletes
_GONE = -1

# A number is used again when no record of the Pod that had it can be asked for any more.
_QUARANTINE_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class PodModel:
    """`image_pull` and `engine_load` follow each other; the metrics port answers when the engine is there."""

    image_pull: Durations
    engine_load: Durations
    drain_seconds: float  # after which a Pod that ends is killed
    gpus_per_pod: int = 1
    gpus: int | None = None  # None: as many as are asked for


@dataclass(slots=True)
class Pod:
    number: int
    created: float
    state: State = "pending"
    ready_since: float = 0.0
    process: simpy.Process | None = None


@dataclass(slots=True)
class Ledger:
    """What Pods cost and lost."""

    started: int = 0
    cut: int = 0  # requests whose Pod was killed before their answer was complete
    pod_seconds: float = 0.0  # from creation to end, of Pods that are gone
    waited_for_gpu: list[float] = field(default_factory=list)
    start_seconds: list[float] = field(default_factory=list)  # from creation to ready


class Cluster:
    """A Deployment's Pods, and the GPUs that they need. `pods` are those that are not being deleted."""

    def __init__(
        self, environment: simpy.Environment, model: PodModel, fleet: Fleet, prometheus: Prometheus, random: Random
    ):
        self.ledger = Ledger()
        self.pods: dict[int, Pod] = {}
        self.draining: dict[int, Pod] = {}
        self._environment = environment
        self._model = model
        self._fleet = fleet
        self._prometheus = prometheus
        self._random = random
        self._states = np.full(1024, _GONE, np.int8)  # by number, since all of them are asked for all the time
        self._ready = ReadyPods()
        fleet.balance(self._ready)
        self._next_number = 0
        self._old_numbers: list[tuple[float, int]] = []
        self._gpus = None
        if model.gpus is not None:
            self._gpus = simpy.Container(environment, capacity=model.gpus, init=model.gpus)

    @property
    def num_pods(self) -> int:
        return len(self.pods)

    def in_state(self, *states: State) -> Numbers:
        """The numbers of the Pods, those that drain included where they are asked for."""
        found = self._states == _STATES.index(states[0])
        for state in states[1:]:
            found |= self._states == _STATES.index(state)
        return np.flatnonzero(found)

    def targets(self) -> Numbers:
        """Whose metrics port answers: it does so until the process ends."""
        return self.in_state("ready", "draining")

    def pod_seconds(self, now: float) -> float:
        return self.ledger.pod_seconds + sum(
            now - pod.created for pod in [*self.pods.values(), *self.draining.values()]
        )

    def begin_with(self, number: int) -> None:
        """So many are ready from the start."""
        for _ in range(number):
            self._create(is_ready=True)

    def scale_to(self, wanted: int) -> None:
        while len(self.pods) < wanted:
            self._create(is_ready=False)
        if len(self.pods) > wanted:
            self._fleet.advance(self._environment.now)
            for pod in sorted(self.pods.values(), key=_deletion_order)[: len(self.pods) - wanted]:
                self._delete(pod)

    def _create(self, *, is_ready: bool) -> None:
        number = self._free_number()
        pod = Pod(number, self._environment.now)
        self.pods[number] = pod
        self._set(pod, "pending")
        self.ledger.started += not is_ready
        pod.process = self._environment.process(self._live(pod, is_ready))
        if is_ready:
            self._serve(pod)

    def _live(self, pod: Pod, is_ready: bool) -> Generator[simpy.Event, Any, None]:
        """A Pod, from its creation to its end. It is interrupted when it is deleted."""
        environment, model = self._environment, self._model
        has_gpus = False
        request = None
        try:
            if self._gpus is not None:
                request = self._gpus.get(model.gpus_per_pod)
                yield request
                has_gpus = True
            if not is_ready:
                self.ledger.waited_for_gpu.append(environment.now - pod.created)
                self._set(pod, "pulling")
                yield environment.timeout(model.image_pull.draw(self._random))
                self._set(pod, "loading")
                yield environment.timeout(model.engine_load.draw(self._random))
                self._fleet.advance(environment.now)
                self._serve(pod)
                self.ledger.start_seconds.append(environment.now - pod.created)
            yield environment.event()  # until it is deleted
        except simpy.Interrupt:
            pass
        if pod.state == "draining":
            yield environment.timeout(self._drain_seconds(pod))
            del self.draining[pod.number]
            self._fleet.advance(environment.now)
            self._prometheus.forget(pod.number)
        elif request is not None and not has_gpus:
            has_gpus = request.triggered  # it may have got them in this very moment
            request.cancel()
        self._states[pod.number] = _GONE
        if has_gpus:
            self._gpus.put(model.gpus_per_pod)
        self.ledger.pod_seconds += environment.now - pod.created
        heappush(self._old_numbers, (environment.now + _QUARANTINE_SECONDS, pod.number))

    def _drain_seconds(self, pod: Pod) -> float:
        """Streams and queue are answered to their end, for as long as the Pod is given."""
        now = self._environment.now
        deadline = now + self._model.drain_seconds
        if self._fleet.last_end(pod.number) > deadline:
            self.ledger.cut += self._fleet.cut(pod.number, deadline)
            return self._model.drain_seconds
        return max(0.0, self._fleet.last_end(pod.number) - now)

    def _serve(self, pod: Pod) -> None:
        self._fleet.open(pod.number)
        self._set(pod, "ready")
        self._ready.add(pod.number)
        pod.ready_since = self._environment.now

    def _delete(self, pod: Pod) -> None:
        del self.pods[pod.number]
        if pod.state == "ready":
            self.draining[pod.number] = pod
            self._set(pod, "draining")
            self._ready.remove(pod.number)
        pod.process.interrupt()

    def _set(self, pod: Pod, state: State) -> None:
        pod.state = state
        if pod.number >= len(self._states):
            self._states = np.concatenate([self._states, np.full(len(self._states), _GONE, np.int8)])
        self._states[pod.number] = _STATES.index(state)

    def _free_number(self) -> int:
        if self._old_numbers and self._old_numbers[0][0] <= self._environment.now:
            return heappop(self._old_numbers)[1]
        self._next_number += 1
        return self._next_number - 1


def _deletion_order(pod: Pod) -> tuple[int, float]:
    """As a ReplicaSet chooses: not scheduled, then not ready, then the newest. (Ages are compared exactly here; a real
    one takes those of one order of magnitude for equal.)"""
    return _STATES.index(pod.state), -(pod.ready_since or pod.created)
