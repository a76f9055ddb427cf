"""Target, windows and policies from the load's own curve and the times of the loop, with the arithmetic.

Nothing is simulated here. The curve is the offered concurrency: requests that there would be if none had to wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from statistics import median
from typing import Any

import numpy as np
from autoscaling.hpa import Behavior, Policy, ScalingRules
from autoscaling.results import Objective, Result
from autoscaling.servers import Floats
from autoscaling.simulation import Autoscaling, Setting, Target
from failures import UsageError

_LONGEST_WINDOW, _LONGEST_PERIOD = 3600, 1800  # what the API allows
_KV_TARGET = 0.9
_WORTH = 0.95  # Pod time for which a smaller target is taken: what lies within it is noise of the load
_DRAWS = 10_000  # of Pod starts, for their percentiles


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    autoscaling: Autoscaling
    steps: tuple[str, ...]  # the arithmetic, a line each

    def as_json(self) -> dict[str, Any]:
        behavior = self.autoscaling.behavior
        return {
            "targets": {target.signal: target.value for target in self.autoscaling.targets},
            "minReplicas": behavior.min_replicas,
            "maxReplicas": behavior.max_replicas,
            "behavior": behavior_as_api(behavior),
            "arithmetic": list(self.steps),
        }


def recommend(setting: Setting, objective: Objective, only_target: float | None = None) -> Recommendation:
    """With `only_target`, the rest for a target that is given. Raises UsageError where no setting can reach the
    objective."""
    server, given = setting.server, setting.autoscaling.behavior
    inputs, outputs = setting.load.sample()
    service = float(server.service(inputs, outputs).mean())
    prefill = float(np.quantile(server.prefill(inputs), objective.share))
    steps: list[str] = []

    slots = server.slots
    if server.kv_tokens is not None:
        blocks = float(server.blocks(inputs, outputs).mean())
        slots = max(1, min(server.slots, int(server.kv_blocks / blocks)))
        steps.append(
            f"slots that can be used: min({server.slots} slots, {server.kv_blocks:g} KV blocks / {blocks:.1f} a "
            f"request) = {slots}"
        )

    patience = objective.seconds - prefill
    if patience <= 0:
        raise UsageError(
            f"--first-token-within {objective.seconds:g} is not above the prefill of {prefill:.2f} s, which no number "
            "of Pods shortens; give more time or a faster prefill"
        )
    by_waiting = [
        target for target in _targets(slots) if late_share(slots, target, service, patience) <= 1 - objective.share
    ]
    if not by_waiting:
        raise UsageError(
            f"one slot's queue is too long for {objective} at any target; give --slots or --first-token-within more"
        )
    steps.append(
        f"a Pod with {slots} slots, answers of {service:.2f} s and {patience:.2f} s of patience: of {by_waiting[0]:g} "
        f"requests at a time, {late_share(slots, by_waiting[0], service, patience):.2%} wait longer (Erlang C); of one "
        f"more, {late_share(slots, by_waiting[0] + 1, service, patience):.2%}"
    )
    if by_waiting[0] < slots / 2:
        steps.append("that is less than half of the slots, and Erlang C is careful: --search tries more by simulation")

    control = setting.round_seconds
    starts = _pod_starts(setting)
    start_p50, start_p95 = median(starts), float(np.quantile(starts, 0.95))
    reaction = control + start_p95
    steps.append(
        f"reaction: scrape {setting.prometheus.scrape_seconds:g} + rules {setting.prometheus.evaluation_seconds:g} "
        f"+ delay {setting.prometheus.delay_seconds:g} + sync {setting.autoscaling.sync_seconds:g} + Pod start "
        f"{start_p95:.0f} (p95) = {reaction:.0f} s at worst"
    )

    down_window = _rounded_up(min(max(reaction, 2 * service), _LONGEST_WINDOW), 30)
    steps.append(
        f"scale-down window: a Pod that is kept costs what a start costs after one start, so it is kept that long; at "
        f"least two answers: max({reaction:.0f}, 2 x {service:.1f}) = {down_window} s"
    )

    interval = max(1.0, setting.load.seconds / 20_000)
    curve = setting.load.concurrency(server, np.arange(0, setting.load.seconds, interval))
    targets_tried = by_waiting if only_target is None else [only_target]
    target, fewest = _cheapest(
        curve, interval, targets_tried, slots, reaction, down_window, given.max_replicas, objective
    )
    held = _held(curve, interval, target, reaction, down_window)
    needed = np.maximum(np.ceil(curve / target), 1)
    most = int(max(needed.max(), fewest))
    late = _late(curve, np.clip(held, fewest, max(most, fewest)), slots)
    origin = "" if only_target is None else ", found by simulation,"
    steps.append(
        f"headroom: with target {target:g}{origin} and at least {fewest} Pods, {late:.2%} of the requests come while "
        f"there are more than the slots of the Pods that were asked for {reaction:.0f} s ago; the cheapest of all "
        f"pairs below {1 - objective.share:.1%}, else the nearest"
    )
    limit = _pod_limit(setting)
    if most > limit:
        steps.append(f"the load needs {most} Pods at its peak, and {limit} are all there are: some requests will wait")
    most = min(most, limit)
    fewest = min(fewest, most)

    period = min(_rounded_up(start_p50 or 15, 15), _LONGEST_PERIOD)
    ahead = max(1, round(period / interval))
    asked = np.clip(needed, fewest, most)
    rise = max(1, int((asked[ahead:] - asked[:-ahead]).max(initial=0)))
    steps.append(f"scale-up: in one Pod start ({period} s, p50) the load comes to need at most {rise} Pods more")
    percent = int(100 * (1 - target / slots))
    steps.append(
        f"scale-down: {percent} % fewer Pods have {target:g} / (1 - {percent / 100:g}) = "
        f"{target / (1 - percent / 100):.1f} requests each, which is within {slots} slots; per "
        f"{_rounded_up(control, 15)} s, when metrics have seen it"
    )

    tolerance = given.scale_up.tolerance
    if target * (1 + tolerance) > slots:
        steps.append(
            f"tolerance: {tolerance:g} lets {target * (1 + tolerance):.1f} requests per Pod pass without a scale-up, "
            f"more than {slots} slots; behavior.scaleUp.tolerance {max(0.0, slots / target - 1):.2f} would not"
        )
    behavior = replace(
        given,
        min_replicas=fewest,
        max_replicas=most,
        scale_up=ScalingRules(
            stabilization_seconds=0,  # the sum over a target credits Pods that start, so it does not overshoot
            policies=(Policy(kind="Pods", value=rise, period_seconds=period),),
            tolerance=tolerance,
        ),
        scale_down=ScalingRules(
            stabilization_seconds=down_window,
            policies=(
                *([Policy(kind="Percent", value=percent, period_seconds=_rounded_up(control, 15))] if percent else []),
                Policy(kind="Pods", value=1, period_seconds=_rounded_up(control, 15)),
            ),
            tolerance=given.scale_down.tolerance,
        ),
    )
    chosen = [Target(signal="concurrency", value=target)]
    if server.kv_tokens is not None:
        chosen.append(Target(signal="kvCache", value=_KV_TARGET))
        steps.append(f"kvCache={_KV_TARGET:g} beside it, for requests that are longer than these were")
    return Recommendation(
        autoscaling=replace(setting.autoscaling, targets=tuple(chosen), behavior=behavior), steps=tuple(steps)
    )


def search(
    setting: Setting, objective: Objective, try_out: Callable[[Autoscaling], Result]
) -> tuple[Recommendation, list[Result]]:
    """From the arithmetic's target up while the objective holds when simulated, else down until it does.

    Erlang C knows nothing of the balancing, so it is too careful with few slots and requests that take turns.
    """
    recommendation = recommend(setting, objective)
    result = try_out(recommendation.autoscaling)
    results, best = [result], recommendation
    step = max(1, setting.server.slots // 16) * (1 if result.holds else -1)
    target = recommendation.autoscaling.targets[0].value + step
    while 1 <= target <= setting.server.slots:
        recommendation = recommend(setting, objective, target)
        results.append(try_out(recommendation.autoscaling))
        if results[-1].holds:
            best = recommendation
        if results[-1].holds != result.holds:
            break
        target += step
    return best, results


def erlang_c(servers: int, load: float) -> float:
    """The share that waits in M/M/c, with an offered load in erlangs."""
    if load >= servers:
        return 1.0
    blocking = 1.0
    for number in range(1, servers + 1):  # Erlang B, by its recursion
        blocking = load * blocking / (number + load * blocking)
    return blocking / (1 - load / servers * (1 - blocking))


def late_share(servers: int, load: float, service_seconds: float, patience_seconds: float) -> float:
    """The share that waits longer than its patience in M/M/c."""
    if load >= servers:
        return 1.0
    return erlang_c(servers, load) * math.exp(-(servers - load) * patience_seconds / service_seconds)


def behavior_as_api(behavior: Behavior) -> dict[str, Any]:
    """`spec.behavior` of autoscaling/v2. The tolerance, a younger field, only where it is not the cluster's own."""
    described = {}
    for name, rules in (("scaleUp", behavior.scale_up), ("scaleDown", behavior.scale_down)):
        described[name] = {
            "stabilizationWindowSeconds": int(rules.stabilization_seconds),
            "selectPolicy": rules.selection,
            "policies": [
                {"type": policy.kind, "value": policy.value, "periodSeconds": policy.period_seconds}
                for policy in rules.policies
            ],
        }
        if rules.tolerance != 0.1:
            described[name]["tolerance"] = f"{rules.tolerance:g}"
    return described


def _targets(slots: int) -> list[float]:
    """From the largest on. Below one request per Pod only in tenths."""
    return [float(number) for number in range(slots, 0, -1)] + [tenth / 10 for tenth in range(9, 0, -1)]


def _pod_starts(setting: Setting) -> list[float]:
    random = Random(setting.seed)
    pod = setting.pod
    return [pod.image_pull.draw(random) + pod.engine_load.draw(random) for _ in range(_DRAWS)]


def _pod_limit(setting: Setting) -> int:
    most = setting.autoscaling.behavior.max_replicas
    return most if setting.pod.gpus is None else min(most, setting.pod.gpus // setting.pod.gpus_per_pod)


def _cheapest(
    curve: Floats,
    interval: float,
    targets: list[float],
    slots: int,
    reaction: float,
    down_window: float,
    max_replicas: int,
    objective: Objective,
) -> tuple[float, int]:
    """Target and fewest replicas with the least Pod time among those that hold; where none does, that come nearest."""
    best: tuple[float, float, int] | None = None
    nearest: tuple[float, float, int] | None = None
    for target in targets:
        held = _held(curve, interval, target, reaction, down_window)
        low, high = 1, min(max_replicas, max(1, math.ceil(curve.max() / slots)))
        while low < high:  # more Pods are never later, so the fewest can be bisected
            middle = (low + high) // 2
            if _late(curve, np.clip(held, middle, max_replicas), slots) <= 1 - objective.share:
                high = middle
            else:
                low = middle + 1
        pods = np.clip(held, low, max_replicas)
        late, cost = _late(curve, pods, slots), float(pods.mean())
        if late <= 1 - objective.share and (best is None or cost < best[0] * _WORTH):
            best = (cost, target, low)
        if nearest is None or late < nearest[0]:
            nearest = (late, target, low)
    chosen = best or nearest
    assert chosen is not None
    return chosen[1], chosen[2]


def _held(curve: Floats, interval: float, target: float, reaction: float, down_window: float) -> Floats:
    """Pods that are ready: the most asked for within the window, a reaction ago."""
    late, window = max(1, round(reaction / interval)), max(1, round(down_window / interval))
    wanted = np.maximum(np.ceil(curve / target), 1)
    kept = _sliding_maximum(wanted, window)
    return np.concatenate([np.full(min(late, len(kept)), kept[0]), kept[:-late]])[: len(curve)]


def _late(curve: Floats, pods: Floats, slots: int) -> float:
    """The share of requests that come while there are more than slots."""
    total = curve.sum()
    return float(curve[curve > slots * pods].sum() / total) if total else 0.0


def _sliding_maximum(values: Floats, window: int) -> Floats:
    """Of the last `window` values, by doubling."""
    result, covered = values.copy(), 1
    while covered < window:
        step = min(covered, window - covered)
        result[step:] = np.maximum(result[step:], result[:-step])
        covered += step
    return result


def _rounded_up(seconds: float, multiple: int) -> int:
    return max(multiple, math.ceil(seconds / multiple) * multiple)
