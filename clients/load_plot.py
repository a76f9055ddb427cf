"""A picture of a run: load and answers, requests in flight, tokens per second, latency, all over time."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib
import numpy as np
from tallies import COLUMNS, ERROR_KINDS, Tally

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def write_plot(tally: Tally, title: str, path: Path) -> None:
    """Of the rows that are kept, the last six hours. The whole file or none."""
    rows = np.array(tally.rows).reshape(-1, len(COLUMNS))
    if len(rows) > 1 and rows[-1][COLUMNS.index("width_seconds")] < 0.5:
        rows = rows[:-1]  # what is left after the last whole second: its rates would tower over the rest
    column = dict(zip(COLUMNS, rows.T, strict=True))
    seconds, width = column["time_seconds"], column["width_seconds"]
    figure, (requests, in_flight, tokens, latency) = plt.subplots(4, 1, figsize=(10, 11), sharex=True)
    figure.suptitle(title)

    requests.set_ylabel("requests/s")
    requests.plot(seconds, column["sent"] / width, label="sent", color="tab:blue")
    requests.plot(seconds, column["ok"] / width, label="answered", color="tab:green")
    errors = sum(column[f"errors_{kind}"] for kind in ERROR_KINDS)
    requests.plot(seconds, errors / width, label="failed", color="tab:red")

    in_flight.set_ylabel("in flight")
    in_flight.plot(seconds, column["in_flight"], label="in flight", color="tab:purple")
    offered_axes = requests if tally.offers_rate else in_flight
    offered_axes.plot(seconds, column["offered"], label="offered", color="black", linestyle=":")

    tokens.set_ylabel("tokens/s")
    tokens.plot(seconds, column["tokens"] / width, label="tokens", color="tab:orange")

    latency.set_ylabel("seconds")
    latency.set_yscale("log")
    for name, style in (("p50", "-"), ("p99", "--")):
        for quantity, color in (("time_to_first_token", "tab:blue"), ("end_to_end", "tab:green")):
            values = column[f"{quantity}_{name}_seconds"]
            if not np.isnan(values).all():
                label = f"{quantity.replace('_', ' ')} {name}"
                latency.plot(seconds, values, label=label, color=color, linestyle=style, marker=".")
    latency.set_xlabel("seconds from the start")
    for axes in (requests, in_flight, tokens, latency):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", fontsize="small")
    for axes in (requests, in_flight, tokens):
        axes.set_ylim(bottom=0)
    figure.tight_layout()
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)
    plt.close(figure)
