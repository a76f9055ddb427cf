"""Report and picture of a run that record_autoscaling.py recorded. Every number is computed from its raw data.

Raw data: `steps` [time, client Pods], `replicas` [time, wanted, ready, client Pods that run], `pods` (created, ready),
`requests` (due, first_token, end, tokens, outcome), `sent_by_client` (what each client counted), `prometheus`
(samples). Times are Unix seconds.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

STEADY_SECONDS = 45  # at the end of a step: what its throughput is measured over


def make_report(raw: dict[str, Any]) -> dict[str, Any]:
    began = raw["began"]
    requests = raw["requests"]
    outcomes: dict[str, int] = {}
    for request in requests:
        outcomes[request["outcome"]] = outcomes.get(request["outcome"], 0) + 1
    steps = [_step(raw, number) for number in range(len(raw["steps"]))]
    concurrency = float(raw["signals"].get("concurrency", math.nan))
    most_users = max(number for _, number in raw["steps"]) * raw["users_per_client"]
    needed = math.ceil(most_users / (raw["slots_per_pod"] if math.isnan(concurrency) else concurrency))
    return {
        "command": raw["command"],
        "seconds": round(raw["ended"] - began, 1),
        "signals": raw["signals"],
        "requests": {"all": len(requests), **outcomes},
        "sent_by_clients": sum(raw["sent_by_client"].values()),
        "not_answered": len(requests) - outcomes.get("ok", 0),
        "time_to_first_token_seconds": _percentiles(requests),
        "most_replicas": {"wanted": int(_column(raw, 1).max()), "ready": int(_column(raw, 2).max())},
        "most_needed": needed,
        "overshoot": max(int(_column(raw, 1).max()) - needed, 0),
        "changes_of_replicas": int((np.diff(_column(raw, 1)) != 0).sum()),
        "pod_start_seconds": _spread([p["ready"] - p["created"] for p in raw["pods"].values() if "ready" in p]),
        "reaction_seconds": {
            name: _spread([s["reaction_seconds"] for s in steps if s["reaction_seconds"] is not None and s["up"] is up])
            for name, up in (("up", True), ("down", False))
        },
        "serving_seconds": _spread([s["serving_seconds"] for s in steps if s["serving_seconds"] is not None]),
        "steps": steps,
    }


def _step(raw: dict[str, Any], number: int) -> dict[str, Any]:
    """reaction: from the change of load to a change of the wanted replicas in its direction; serving: from that, if it
    is up, until as many are ready; settled: from the change of load to the step's last change of wanted replicas.
    """
    time, clients = raw["steps"][number]
    before = raw["steps"][number - 1][1] if number else 0
    end = raw["steps"][number + 1][0] if number + 1 < len(raw["steps"]) else raw["ended"]
    times, wanted, ready = _column(raw, 0), _column(raw, 1), _column(raw, 2)
    inside = (times >= time) & (times < end)
    at_first = wanted[times < time][-1] if (times < time).any() else wanted[0]
    sign = np.sign(clients - before)
    moved = np.flatnonzero(inside & ((wanted - at_first) * sign > 0)) if number else np.array([], dtype=int)
    reaction = serving = settled = None
    if len(moved):
        reaction = round(float(times[moved[0]] - time), 1)
        changes = [i for i in np.flatnonzero(np.diff(wanted, prepend=wanted[0])) if inside[i]]
        settled = round(float(times[changes[-1]] - time), 1)
        there = np.flatnonzero(inside & (times >= times[moved[0]]) & (ready >= wanted[moved[0]]))
        if sign > 0 and len(there):
            serving = round(float(times[there[0]] - times[moved[0]]), 1)
    of_step = [request for request in raw["requests"] if time <= request["due"] < end]
    steady = (max(end - STEADY_SECONDS, time), max(end, time + 1))
    return {
        "begins_seconds": round(time - raw["began"], 1),
        "clients": clients,
        "users": clients * raw["users_per_client"],
        "up": bool(sign > 0),
        "wanted_at_end": int(wanted[inside][-1]) if inside.any() else None,
        "ready_at_end": int(ready[inside][-1]) if inside.any() else None,
        "reaction_seconds": reaction,
        "serving_seconds": serving,
        "settled_seconds": settled,
        "tokens_per_second_at_end": round(_tokens(raw["requests"], *steady) / (steady[1] - steady[0]), 1),
        "time_to_first_token_seconds": _percentiles(of_step),
    }


def _column(raw: dict[str, Any], index: int) -> np.ndarray:
    return np.array([row[index] for row in raw["replicas"]], dtype=float)


def _tokens(requests: list[dict[str, Any]], begin: float, end: float) -> float:
    """Of answers, taken to have come evenly between first token and end."""
    total = 0.0
    for request in requests:
        if request["first_token"] is None:
            continue
        first, last = request["first_token"], max(request["end"], request["first_token"] + 1e-3)
        total += request["tokens"] * max(min(last, end) - max(first, begin), 0) / (last - first)
    return total


def _percentiles(requests: list[dict[str, Any]]) -> dict[str, float]:
    values = [r["first_token"] - r["due"] for r in requests if r["first_token"] is not None]
    if not values:
        return {}
    return {f"p{q:g}": round(float(np.quantile(values, q / 100)), 3) for q in (50, 90, 95, 99)} | {
        "max": round(max(values), 3)
    }


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {"number": 0}
    return {
        "number": len(values),
        "median": round(float(np.median(values)), 1),
        "min": round(min(values), 1),
        "max": round(max(values), 1),
    }


def recorded_run(raw: dict[str, Any]) -> dict[str, Any]:
    """For `simulate_autoscaling.py --compare`. Until the load's last step, which has no users."""
    began, end = raw["began"], raw["steps"][-1][0]
    rows = [row for row in raw["replicas"] if row[0] < end]
    delays = _percentiles([r for r in raw["requests"] if r["due"] < end])
    return {
        "time_seconds": [round(row[0] - began, 2) for row in rows],
        "replicas_wanted": [row[1] for row in rows],
        "replicas_ready": [row[2] for row in rows],
        "offered": {"kind": "concurrency", "values": [row[3] * raw["users_per_client"] for row in rows]},
        "delays": {"time_to_first_token": {name: delays[name] for name in ("p50", "p95")}},
    }


def summary(report: dict[str, Any]) -> str:
    lines = [
        f"{report['requests']['all']} requests ({report['sent_by_clients']} that clients say they sent), "
        f"{report['not_answered']} not answered; "
        f"first token, s: {report['time_to_first_token_seconds']}",
        f"replicas: most {report['most_replicas']}, needed {report['most_needed']}, overshoot {report['overshoot']}, "
        f"{report['changes_of_replicas']} changes; Pod start, s: {report['pod_start_seconds']}",
        f"reaction, s: up {report['reaction_seconds']['up']}, down {report['reaction_seconds']['down']}",
        f"from wanted to ready, s: {report['serving_seconds']}",
        "   at s  users  wanted  ready  reaction  serving  settled  tokens/s  first token p50, p95",
    ]
    for step in report["steps"]:
        ttft = step["time_to_first_token_seconds"]
        cells = [step["begins_seconds"], step["users"], step["wanted_at_end"], step["ready_at_end"]]
        cells += [step["reaction_seconds"], step["serving_seconds"], step["settled_seconds"]]
        cells += [step["tokens_per_second_at_end"], ttft.get("p50"), ttft.get("p95")]
        lines.append("  ".join(f"{'-' if cell is None else cell:>7}" for cell in cells))
    return "\n".join(lines)


def write_all(raw: dict[str, Any], output: Path) -> str:
    """OUTPUT.json, OUTPUT.recorded.json and OUTPUT.png; what to print."""
    report = make_report(raw)
    for suffix, content in (("json", report), ("recorded.json", recorded_run(raw))):
        temporary = output.with_name(f".{os.getpid()}.json")
        temporary.write_text(json.dumps(content, indent=1 if suffix == "json" else None) + "\n")
        os.replace(temporary, f"{output}.{suffix}")
    _draw(raw, report, Path(f"{output}.png"))
    return summary(report)


def _draw(raw: dict[str, Any], report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    began = raw["began"]
    minutes = (_column(raw, 0) - began) / 60
    figure, (load, ratio, waiting, replicas, tokens, delay) = plt.subplots(6, 1, figsize=(11, 13), sharex=True)
    signals = ", ".join(f"{name}: {target}" for name, target in raw["signals"].items())
    figure.suptitle(f"{signals}; {report['requests']['all']} requests, {report['not_answered']} not answered")
    load.step(minutes, _column(raw, 3) * raw["users_per_client"], where="post", color="black")
    load.set_ylabel("users")
    for axes, name, label in (
        (ratio, "queue_compute_ratio", "queue to compute"),
        (waiting, "requests_waiting", "requests waiting"),
    ):
        _line(axes, raw, name, label=label)
        axes.set_ylabel(label)
    if "kvCache" in raw["signals"]:
        _line(ratio, raw, "kv_cache_fraction", label="KV cache, fullest Pod", linestyle="--")
        ratio.legend(loc="upper left", fontsize="small")
    replicas.step(minutes, _column(raw, 1), where="post", label="wanted")
    replicas.step(minutes, _column(raw, 2), where="post", label="ready", linestyle="--")
    replicas.set_ylabel("Pods")
    replicas.legend(loc="upper left", fontsize="small")
    edges = np.arange(began, raw["ended"], 5.0)
    counts = [_tokens(raw["requests"], edge, edge + 5) / 5 for edge in edges]
    tokens.plot((edges + 2.5 - began) / 60, counts)
    tokens.set_ylabel("tokens/s")
    middles, p50, p95 = _first_tokens(raw)
    delay.plot(middles, p50, label="p50")
    delay.plot(middles, p95, label="p95")
    delay.set_yscale("log")
    delay.set_ylabel("first token, s")
    delay.set_xlabel("minutes")
    delay.legend(loc="upper left", fontsize="small")
    for axes in (load, ratio, waiting, replicas, tokens, delay):
        axes.grid(alpha=0.3)
    for axes in (load, ratio, waiting, replicas, tokens):
        axes.set_ylim(bottom=0)
    figure.tight_layout()
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(temporary, dpi=90)
    os.replace(temporary, path)
    plt.close(figure)


def _line(axes: Any, raw: dict[str, Any], name: str, **style: Any) -> None:
    samples = np.array(raw["prometheus"][name]["values"], dtype=float).reshape(-1, 2)
    axes.plot((samples[:, 0] - raw["began"]) / 60, samples[:, 1], **style)


def _first_tokens(raw: dict[str, Any]) -> tuple[np.ndarray, list[float], list[float]]:
    """Percentiles of the requests that were due in each 10 s; NaN where there were none."""
    edges = np.arange(raw["began"], raw["ended"] + 10, 10.0)
    groups: list[list[float]] = [[] for _ in edges]
    for request in raw["requests"]:
        if request["first_token"] is not None:
            groups[int((request["due"] - raw["began"]) // 10)].append(request["first_token"] - request["due"])
    columns = [[float(np.quantile(g, q)) if g else math.nan for g in groups] for q in (0.5, 0.95)]
    return (edges + 5 - raw["began"]) / 60, columns[0], columns[1]
