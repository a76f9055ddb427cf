"""What a run comes to, in numbers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from autoscaling.servers import Floats
from autoscaling.simulation import Run


@dataclass(frozen=True, kw_only=True)
class Objective:
    """`share` of the requests have their first token within `seconds` of their arrival."""

    seconds: float
    share: float

    def __str__(self) -> str:
        return f"first token within {self.seconds:g} s for {self.share:.1%} of the requests"


@dataclass(frozen=True, kw_only=True)
class Result:
    """Times in seconds; percentiles are of all requests that arrived."""

    name: str
    requests: int
    cut: int
    first_token_p50: float
    first_token_p95: float
    first_token_p99: float
    queue_p95: float
    within: float  # share of the requests that the objective wants and gets
    holds: bool
    pod_hours: float
    mean_replicas: float
    peak_replicas: int
    overshoot: int  # replicas above the most that the load needed at the target
    utilization: float  # time in slots, of all time that Pods had slots or were on their way to them
    scale_ups: int
    scale_downs: int
    reaction_seconds: float | None  # median, from load above the target's tolerance to a scale-up
    pods_started: int
    start_seconds_p50: float | None  # from a Pod's creation to ready, a wait for a GPU included
    peak_pending: int  # Pods that waited for a GPU

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(run: Run, objective: Objective, name: str) -> Result:
    setting, timeline = run.setting, run.timeline
    wanted = timeline["replicas_wanted"]
    needed = needed_replicas(run)
    within = float((run.first_token_seconds <= objective.seconds).mean())
    starts = run.arrivals + run.queue_seconds
    in_slots = np.clip(run.ends, 0, run.seconds) - np.clip(starts, 0, run.seconds)
    p50, p95, p99 = np.quantile(run.first_token_seconds, (0.5, 0.95, 0.99))
    reactions = reaction_seconds(run)
    return Result(
        name=name,
        requests=len(run.arrivals),
        cut=run.ledger.cut,
        first_token_p50=float(p50),
        first_token_p95=float(p95),
        first_token_p99=float(p99),
        queue_p95=float(np.quantile(run.queue_seconds, 0.95)),
        within=within,
        holds=within >= objective.share and not run.ledger.cut,
        pod_hours=run.pod_seconds / 3600,
        mean_replicas=float(wanted.mean()),
        peak_replicas=int(wanted.max()),
        overshoot=max(0, int(wanted.max() - max(needed.max(), wanted[0]))),
        utilization=float(in_slots.sum() / (run.pod_seconds * setting.server.slots)),
        scale_ups=sum(scaling.after > scaling.before for scaling in run.scalings),
        scale_downs=sum(scaling.after < scaling.before for scaling in run.scalings),
        reaction_seconds=float(np.median(reactions)) if reactions else None,
        pods_started=run.ledger.started,
        start_seconds_p50=float(np.median(run.ledger.start_seconds)) if run.ledger.start_seconds else None,
        peak_pending=int(timeline["replicas_pending"].max()),
    )


def requests_per_pod(run: Run) -> float:
    """What one Pod is to have: the target, where it is a number of requests, else its slots."""
    targets = [target.value for target in run.setting.autoscaling.targets if target.signal == "concurrency"]
    return targets[0] if targets else float(run.setting.server.slots)


def offered_concurrency(run: Run) -> Floats:
    return run.setting.load.concurrency(run.setting.server, run.timeline["time_seconds"])


def needed_replicas(run: Run) -> Floats:
    """Pods for the offered concurrency, at every time of the timeline."""
    behavior = run.setting.autoscaling.behavior
    needed = np.ceil(offered_concurrency(run) / requests_per_pod(run))
    return np.clip(needed, behavior.min_replicas, behavior.max_replicas)


def reaction_seconds(run: Run) -> list[float]:
    """From each time that the offered load has passed the target and its tolerance, to the next scale-up."""
    behavior = run.setting.autoscaling.behavior
    times, wanted = run.timeline["time_seconds"], run.timeline["replicas_wanted"]
    limit = requests_per_pod(run) * wanted * (1 + behavior.scale_up.tolerance)
    is_above = (offered_concurrency(run) > limit) & (wanted < behavior.max_replicas)
    ups = [scaling.seconds for scaling in run.scalings if scaling.after > scaling.before]
    reactions = []
    since = math.nan
    for time, above in zip(times, is_above, strict=True):
        if ups and ups[0] <= time:
            if not math.isnan(since):
                reactions.append(ups[0] - since)
            while ups and ups[0] <= time:
                ups.pop(0)
            since = math.nan
        if not above:
            since = math.nan
        elif math.isnan(since):
            since = time
    return reactions
