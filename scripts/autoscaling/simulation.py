"""One run: a load, servers, Prometheus, an autoscaler, and SimPy's clock for all of them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

import numpy as np
import simpy
from autoscaling import prometheus as metrics
from autoscaling.balancing import Balancer, Balancing, Connections, LeastRequests, RoundRobin
from autoscaling.cluster import Cluster, Ledger, PodModel
from autoscaling.hpa import (
    Behavior,
    PodsSample,
    Stabilizer,
    largest,
    milli,
    replicas_for_average_value,
    replicas_for_pods,
)
from autoscaling.offered_load import OfferedLoad
from autoscaling.prometheus import NUM_PHASES, Prometheus, PrometheusSettings, Records, SignalName
from autoscaling.servers import Fleet, Floats, ServerModel

Mode = Literal["keda", "hpa"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """keda: an AverageValue of the sum over the Pods, as the chart's query. hpa: a Pods metric."""

    signal: SignalName
    value: float

    def __str__(self) -> str:
        return f"{self.signal}={self.value:g}"


@dataclass(frozen=True, kw_only=True)
class Autoscaling:
    mode: Mode
    targets: tuple[Target, ...]
    behavior: Behavior
    sync_seconds: float = 15.0

    def __str__(self) -> str:
        return "+".join(map(str, self.targets))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All that a run depends on, its load and seed included."""

    load: OfferedLoad
    server: ServerModel
    pod: PodModel
    autoscaling: Autoscaling
    prometheus: PrometheusSettings
    balancing: Balancing = "round-robin"
    connections: int = 64
    connection_age_seconds: float = float("inf")
    begin_with: int | None = None  # Pods that are ready at the start; None: the fewest
    seed: int = 1

    @property
    def round_seconds(self) -> float:
        """From a change to its decision, at worst."""
        prometheus = self.prometheus
        measured = prometheus.scrape_seconds + prometheus.evaluation_seconds + prometheus.delay_seconds
        return measured + self.autoscaling.sync_seconds


@dataclass(slots=True)
class Timeline:
    """A row every `interval_seconds`."""

    interval_seconds: float
    columns: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **row: float) -> None:
        for name, value in row.items():
            self.columns.setdefault(name, []).append(value)

    def __getitem__(self, name: str) -> Floats:
        return np.array(self.columns[name], dtype=float)


@dataclass(frozen=True, slots=True)
class Scaling:
    seconds: float
    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came of it. The arrays have an element per request, in the order of arrival."""

    setting: Setting
    seconds: float
    timeline: Timeline
    scalings: list[Scaling]
    arrivals: Floats
    queue_seconds: Floats
    first_token_seconds: Floats
    ends: Floats
    pod_seconds: float
    ledger: Ledger


def simulate(setting: Setting) -> Run:
    return _Simulation(setting).run()


class _Simulation:
    def __init__(self, setting: Setting):
        self._setting = setting
        random = Random(setting.seed)
        self._environment = simpy.Environment()
        source = setting.load.source(setting.server)
        self._fleet = Fleet(setting.server, source, _balancer(setting, Random(random.random())))
        has_ratio = any(target.signal == "queueComputeRatio" for target in setting.autoscaling.targets)
        self._prometheus = Prometheus(setting.prometheus, self._fleet, has_ratio=has_ratio)
        self._cluster = Cluster(self._environment, setting.pod, self._fleet, self._prometheus, Random(random.random()))
        self._stabilizer = Stabilizer(setting.autoscaling.behavior)
        self._scalings: list[Scaling] = []
        self._seconds = setting.load.seconds
        self._timeline = Timeline(max(min(setting.prometheus.scrape_seconds, 15.0), self._seconds / 6000))
        # Nobody's clocks are in step: each loop begins somewhere in its first interval.
        self._offsets = [random.random() for _ in range(3)]

    def run(self) -> Run:
        setting, environment = self._setting, self._environment
        self._cluster.begin_with(setting.begin_with or setting.autoscaling.behavior.min_replicas)
        scrape, evaluation, sync = (
            share * interval
            for share, interval in zip(
                self._offsets,
                (
                    setting.prometheus.scrape_seconds,
                    setting.prometheus.evaluation_seconds,
                    setting.autoscaling.sync_seconds,
                ),
                strict=True,
            )
        )
        environment.process(self._scrape(scrape / NUM_PHASES))
        environment.process(self._evaluate(evaluation))
        # The autoscaler is not asked before every server has been seen: a sum over half of them would scale down.
        seen = setting.prometheus.scrape_seconds + setting.prometheus.evaluation_seconds
        environment.process(self._sync(seen + setting.prometheus.delay_seconds + sync))
        environment.process(self._record())
        environment.run(until=self._seconds)
        self._fleet.advance(self._seconds)
        arrivals, queue, first_token, ends = self._fleet.answers()
        return Run(
            setting=setting,
            seconds=self._seconds,
            timeline=self._timeline,
            scalings=self._scalings,
            arrivals=arrivals,
            queue_seconds=queue,
            first_token_seconds=first_token,
            ends=ends,
            pod_seconds=self._cluster.pod_seconds(self._seconds),
            ledger=self._cluster.ledger,
        )

    def _scrape(self, offset: float) -> Generator[simpy.Event, Any, None]:
        """A part of the targets at a time."""
        environment, prometheus = self._environment, self._prometheus
        yield environment.timeout(offset)
        while True:
            for phase in range(NUM_PHASES):
                if phase == 0:
                    prometheus.next_row()
                targets = self._cluster.targets()
                self._fleet.advance(environment.now)
                self._fleet.settle()
                prometheus.scrape(environment.now, targets[targets % NUM_PHASES == phase])
                yield environment.timeout(self._setting.prometheus.scrape_seconds / NUM_PHASES)

    def _evaluate(self, offset: float) -> Generator[simpy.Event, Any, None]:
        yield self._environment.timeout(offset)
        while True:
            self._prometheus.evaluate(self._environment.now)
            yield self._environment.timeout(self._setting.prometheus.evaluation_seconds)

    def _sync(self, offset: float) -> Generator[simpy.Event, Any, None]:
        environment, cluster, autoscaling = self._environment, self._cluster, self._setting.autoscaling
        yield environment.timeout(offset)
        while True:
            records = self._prometheus.query(environment.now)
            current = cluster.num_pods
            proposals = [self._proposal(target, current, records) for target in autoscaling.targets]
            recommendation = largest(current, proposals)
            wanted = self._stabilizer.decide(environment.now, current, recommendation)
            if wanted != current:
                self._scalings.append(Scaling(environment.now, current, wanted))
                cluster.scale_to(wanted)
            yield environment.timeout(autoscaling.sync_seconds)

    def _proposal(self, target: Target, current: int, records: Records | None) -> int | None:
        if records is None:
            return None
        values, goal = records.values[target.signal], milli(target.value)
        behavior, cluster = self._setting.autoscaling.behavior, self._cluster
        if self._setting.autoscaling.mode == "hpa":
            running = cluster.in_state("loading", "ready")
            found = metrics.of(values, running)
            sample = PodsSample(
                total_milli=int((found * 1000).astype(np.int64).sum()),
                num_with_value=len(found),
                num_missing=len(running) - len(found),
                num_pending=current - len(running),
            )
            return replicas_for_pods(current, goal, sample, behavior)
        return replicas_for_average_value(current, goal, _milli(metrics.total(values)), behavior)

    def _record(self) -> Generator[simpy.Event, Any, None]:
        environment, cluster, fleet = self._environment, self._cluster, self._fleet
        while True:
            fleet.advance(environment.now)
            fleet.settle()
            gauges = fleet.gauges(cluster.targets())
            records = self._prometheus.query(environment.now)
            self._timeline.add(
                time_seconds=environment.now,
                replicas_wanted=cluster.num_pods,
                replicas_ready=len(cluster.in_state("ready")),
                replicas_pending=len(cluster.in_state("pending")),
                replicas_starting=len(cluster.in_state("pulling", "loading")),
                replicas_draining=len(cluster.draining),
                requests_waiting=float(gauges.pending.sum() + gauges.waiting.sum()),
                requests_running=float(gauges.running.sum()),
                **{
                    f"signal_{target.signal}": self._seen(target, records)
                    for target in self._setting.autoscaling.targets
                },
            )
            yield environment.timeout(self._timeline.interval_seconds)

    def _seen(self, target: Target, records: Records | None) -> float:
        """The signal as a number per Pod, to draw it against its target. Pods that start are credited."""
        answer = None if records is None else metrics.total(records.values[target.signal])
        return float("nan") if answer is None else answer / self._cluster.num_pods


def _milli(value: float | None) -> int | None:
    return None if value is None else milli(value)


def _balancer(setting: Setting, random: Random) -> Balancer:
    match setting.balancing:
        case "round-robin":
            return RoundRobin()
        case "least-requests":
            return LeastRequests(random)
        case "connection":
            return Connections(setting.connections, setting.connection_age_seconds, random)
