"""What is printed: a table with a row per setting, and the recommendation."""

from __future__ import annotations

from autoscaling.recommendation import Recommendation, behavior_as_api
from autoscaling.results import Objective, Result
from autoscaling.simulation import Setting

_HEADINGS = (
    ("setting", "first token, s", "", "", "in time", "Pod", "Pods", "", "over-", "reac-", "scale", "in use", "cut"),
    ("", "p50", "p95", "p99", "", "hours", "mean", "peak", "shoot", "tion, s", "up/down", "", ""),
)


def describe(setting: Setting, objective: Objective) -> str:
    server, pod, behavior = setting.server, setting.pod, setting.autoscaling.behavior
    gpus = "any number of GPUs" if pod.gpus is None else f"{pod.gpus} GPUs, {pod.gpus_per_pod} a Pod"
    kv = "" if server.kv_tokens is None else f", KV cache {server.kv_tokens} tokens"
    return "\n".join(
        (
            f"load       {setting.load.description}, {_time(setting.load.seconds)}",
            f"server     {server.slots} slots, {server.tokens_per_second:g} tokens/s each, prefill "
            f"{server.prefill_seconds:g} s{kv}",
            f"Pods       {behavior.min_replicas} to {behavior.max_replicas}, {gpus}; requests by {setting.balancing}",
            f"loop       {setting.autoscaling.mode}; scrape {setting.prometheus.scrape_seconds:g} s, rules "
            f"{setting.prometheus.evaluation_seconds:g} s, sync {setting.autoscaling.sync_seconds:g} s; "
            f"seed {setting.seed}",
            f"objective  {objective}",
        )
    )


def table(results: list[Result]) -> str:
    rows = [*_HEADINGS, *(_row(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    pending = [result for result in results if result.peak_pending]
    lines += [f"{result.name}: {result.peak_pending} Pods waited for a GPU" for result in pending]
    return "\n".join(lines)


def recommendation_text(recommendation: Recommendation, verified: Result, objective: Objective) -> str:
    autoscaling = recommendation.autoscaling
    behavior = autoscaling.behavior
    api = behavior_as_api(behavior)
    lines = ["recommendation", *(f"  - {step}" for step in recommendation.steps), ""]
    lines += [f"  {target.signal}: {target.value:g}" for target in autoscaling.targets]
    lines += [f"  minReplicas: {behavior.min_replicas}", f"  maxReplicas: {behavior.max_replicas}", "  behavior:"]
    for direction, rules in api.items():
        lines.append(f"    {direction}:")
        for name, value in rules.items():
            if name != "policies":
                lines.append(f"      {name}: {value}")
        policies = ", ".join(
            f"{{type: {policy['type']}, value: {policy['value']}, periodSeconds: {policy['periodSeconds']}}}"
            for policy in rules["policies"]
        )
        lines.append(f"      policies: [{policies}]")
    verdict = "holds" if verified.holds else "does not hold"
    lines += [
        "",
        f"  simulated: {verified.within:.2%} in time, {verified.pod_hours:.1f} Pod hours: the objective {verdict}",
    ]
    return "\n".join(lines)


def _row(result: Result) -> tuple[str, ...]:
    return (
        result.name,
        f"{result.first_token_p50:.2f}",
        f"{result.first_token_p95:.2f}",
        f"{result.first_token_p99:.2f}",
        f"{result.within:.2%}",
        f"{result.pod_hours:.1f}",
        f"{result.mean_replicas:.1f}",
        f"{result.peak_replicas}",
        f"{result.overshoot}",
        "-" if result.reaction_seconds is None else f"{result.reaction_seconds:.0f}",
        f"{result.scale_ups}/{result.scale_downs}",
        f"{result.utilization:.0%}",
        f"{result.cut}",
    )


def _time(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.4g} {unit}"
    return f"{seconds:.4g} s"
