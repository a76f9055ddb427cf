"""A picture of one run or several: load, replicas, the signal, the queue, time to first token, all over time."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib
import numpy as np
from autoscaling.recorded_run import RecordedRun
from autoscaling.results import needed_replicas, offered_concurrency
from autoscaling.servers import Floats
from autoscaling.simulation import Run

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_NUM_WINDOWS = 200  # for percentiles over time


def write_plot(runs: dict[str, Run], title: str, path: Path, recorded: RecordedRun | None = None) -> None:
    """The whole file or none."""
    figure, (load, replicas, signal, waiting, delay) = plt.subplots(5, 1, figsize=(12, 12), sharex=True)
    figure.suptitle(title)
    first = next(iter(runs.values()))
    unit, divisor = ("hours", 3600) if first.seconds > 3 * 3600 else ("minutes", 60)
    load.set_ylabel("requests in flight\nif none waited")
    load.plot(first.timeline["time_seconds"] / divisor, offered_concurrency(first), color="black", label="offered")
    for number, (name, run) in enumerate(runs.items()):
        color, timeline = f"C{number}", run.timeline
        hours = timeline["time_seconds"] / divisor
        replicas.step(hours, timeline["replicas_wanted"], where="post", color=color, label=f"{name}: wanted")
        replicas.plot(hours, timeline["replicas_ready"], color=color, linestyle=":", label=f"{name}: ready")
        for target in run.setting.autoscaling.targets:
            relative = timeline[f"signal_{target.signal}"] / target.value
            signal.plot(hours, relative, color=color, label=f"{name}: {target.signal} / {target.value:g}")
        waiting.plot(hours, timeline["requests_waiting"], color=color, label=name)
        middles, p95 = percentile_over_time(run.arrivals, run.first_token_seconds, run.seconds, 0.95)
        delay.plot(middles / divisor, p95, color=color, label=f"{name}: p95")
    replicas.plot(hours, needed_replicas(run), color="black", alpha=0.4, label=f"needed at {name}")
    if recorded is not None:
        replicas.step(
            recorded.times / divisor, recorded.wanted, where="post", color="tab:red", label="recorded: wanted"
        )
    signal.set_yscale("symlog", linthresh=2)  # a ratio can be 50 times its target
    signal.axhline(1, color="black", linestyle=":")
    replicas.set_ylabel("Pods")
    signal.set_ylabel("signal per target")
    waiting.set_ylabel("requests waiting")
    delay.set_ylabel("time to first token, s")
    delay.set_yscale("log")
    delay.set_xlabel(f"{unit} from the start")
    for axes in (load, replicas, signal, waiting, delay):
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="x-small")  # beside what it would cover
    for axes in (load, replicas, signal, waiting):
        axes.set_ylim(bottom=0)
    figure.tight_layout()
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(temporary, dpi=100)
    os.replace(temporary, path)
    plt.close(figure)


def percentile_over_time(arrivals: Floats, values: Floats, seconds: float, share: float) -> tuple[Floats, Floats]:
    """Of the requests that arrived in each part of the time; NaN where none did."""
    edges = np.linspace(0, seconds, _NUM_WINDOWS + 1)
    order = np.argsort(arrivals, kind="stable")
    bounds = np.searchsorted(arrivals[order], edges)
    ordered = values[order]
    parts = [ordered[begin:end] for begin, end in zip(bounds, bounds[1:], strict=False)]
    quantiles = np.array([np.quantile(part, share) if len(part) else np.nan for part in parts])
    return (edges[:-1] + edges[1:]) / 2, quantiles
