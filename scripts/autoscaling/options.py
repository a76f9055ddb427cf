"""The command line: what is simulated, in groups as the simulator's parts."""

from __future__ import annotations

import argparse
import difflib
import math
from pathlib import Path
from typing import get_args

import option_types
from autoscaling.balancing import Balancing
from autoscaling.durations import parse_durations
from autoscaling.hpa import Policy, PolicyKind, PolicySelection
from autoscaling.offered_load import Pattern
from autoscaling.prometheus import SignalName
from autoscaling.simulation import Mode, Target
from failures import UsageError
from schedules import Schedule, parse_schedule


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="simulate_autoscaling.py",
        description="Simulate a load, servers and their autoscaler; print what users would feel, and what to set.",
    )
    _load(root.add_argument_group("load", "one of --trace, --rate, --concurrency, --pattern"))
    _server(root.add_argument_group("server"))
    _pods(root.add_argument_group("Pods"))
    _autoscaler(root.add_argument_group("autoscaler"))
    _output(root.add_argument_group("output"))
    return root


def _load(group: argparse._ArgumentGroup) -> None:
    kind = group.add_mutually_exclusive_group()
    kind.add_argument("--trace", type=Path, metavar="FILE", help="JSON lines as the load client's --trace reads")
    kind.add_argument("--rate", type=_schedule, metavar="SCHEDULE", help="requests/s, as 2@5m,15@20m or 2..15@10m")
    kind.add_argument("--concurrency", type=_users, metavar="SCHEDULE", help="users who wait for their answers")
    kind.add_argument("--pattern", choices=get_args(Pattern), help="a rate between --low and --high")
    group.add_argument("--low", type=option_types.number(0, math.inf), default=1.0, help="requests/s (default: 1)")
    group.add_argument("--high", type=option_types.number(0, math.inf), default=10.0, help="requests/s (default: 10)")
    group.add_argument(
        "--duration",
        type=option_types.duration,
        metavar="TIME",
        help="what is simulated (default: the trace, the schedule; of a pattern 1h, of a day 24h)",
    )
    lengths = option_types.lengths
    group.add_argument(
        "--input-tokens",
        type=lengths,
        default="lognormal:256:128:4096",
        metavar="LENGTHS",
        help="as 128, uniform:16:256, lognormal:MEAN:DEVIATION:HIGHEST (default: %(default)s)",
    )
    group.add_argument(
        "--output-tokens",
        type=lengths,
        default="lognormal:256:128:2048",
        metavar="LENGTHS",
        help="of a trace, for lines without them (default: %(default)s)",
    )
    group.add_argument(
        "--think",
        type=option_types.duration_or_zero,
        default=0.0,
        metavar="TIME",
        help="pause of a user between answer and question (default: 0)",
    )
    group.add_argument("--seed", type=option_types.whole(0), default=1, help="the same seed, the same run (default: 1)")


def _server(group: argparse._ArgumentGroup) -> None:
    positive = option_types.number(1e-6, math.inf)
    group.add_argument("--slots", type=option_types.whole(1), default=16, help="--max-batch-size (default: 16)")
    group.add_argument(
        "--tokens-per-second",
        type=positive,
        default=50.0,
        help="of each sequence, at the batch that is served (default: 50)",
    )
    group.add_argument(
        "--prefill-seconds",
        type=option_types.number(0, math.inf),
        default=0.2,
        help="from slot to first token, for any prompt (default: 0.2)",
    )
    group.add_argument(
        "--prefill-tokens-per-second",
        type=positive,
        default=math.inf,
        help="and besides, by the prompt's length (default: no limit)",
    )
    group.add_argument(
        "--kv-tokens", type=option_types.whole(32), default=None, help="room of the KV cache (default: never full)"
    )
    group.add_argument(
        "--balancing",
        choices=get_args(Balancing),
        default="round-robin",
        help="by request: round-robin, least-requests; or by connection (default: round-robin)",
    )
    group.add_argument("--connections", type=option_types.whole(1), default=64, help="of all clients (default: 64)")
    group.add_argument(
        "--connection-age",
        type=option_types.duration,
        default=math.inf,
        metavar="TIME",
        help="after which a connection is opened anew (default: never)",
    )


def _pods(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--image-pull",
        type=_durations,
        default="0",
        metavar="TIMES",
        help="as 30, uniform:20:40, lognormal:60:20, exponential:30, choice:0,0,90 (default: 0)",
    )
    group.add_argument("--engine-load", type=_durations, default="40", metavar="TIMES", help="(default: 40 s)")
    group.add_argument(
        "--drain",
        type=option_types.duration,
        default=120.0,
        metavar="TIME",
        help="that a Pod has to finish its answers; then it is killed (default: 120 s)",
    )
    group.add_argument("--gpus", type=option_types.whole(1), default=None, help="in all (default: any number)")
    group.add_argument("--gpus-per-pod", type=option_types.whole(1), default=1, help="(default: 1)")
    group.add_argument(
        "--begin-with",
        type=option_types.whole(1),
        default=None,
        metavar="PODS",
        help="Pods that are ready at the start (default: --min-replicas)",
    )


def _autoscaler(group: argparse._ArgumentGroup) -> None:
    window = option_types.number(0, 3600)
    group.add_argument(
        "--mode",
        choices=get_args(Mode),
        default="keda",
        help="keda: External metrics; hpa: Pods metrics (default: keda)",
    )
    group.add_argument(
        "--signal",
        type=_targets,
        action="append",
        metavar="NAME=TARGET[+NAME=TARGET]",
        help="concurrency, queueComputeRatio, kvCache; with + the largest wins; given again, another run "
        "to compare (default: concurrency= three quarters of the slots)",
    )
    group.add_argument("--min-replicas", type=option_types.whole(1), default=1, help="(default: 1)")
    group.add_argument("--max-replicas", type=option_types.whole(1), default=8, help="(default: 8)")
    group.add_argument("--tolerance", type=option_types.number(0, 1), default=0.1, help="(default: 0.1)")
    for direction, seconds, policies in (("up", 0, "percent:100:15,pods:4:15"), ("down", 300, "percent:100:15")):
        group.add_argument(
            f"--scale-{direction}-window",
            type=window,
            default=float(seconds),
            metavar="SECONDS",
            help=f"stabilization (default: {seconds})",
        )
        group.add_argument(
            f"--scale-{direction}-policies",
            type=_policies,
            default=policies,
            metavar="POLICIES",
            help="KIND:VALUE:SECONDS, with commas (default: %(default)s)",
        )
        group.add_argument(
            f"--scale-{direction}-select",
            type=str.title,
            choices=get_args(PolicySelection),
            default="Max",
            help="of several policies (default: Max)",
        )
    interval = option_types.duration
    group.add_argument("--sync-period", type=interval, default=15.0, metavar="TIME", help="(default: 15 s)")
    group.add_argument("--scrape-interval", type=interval, default=15.0, metavar="TIME", help="(default: 15 s)")
    group.add_argument(
        "--evaluation-interval",
        type=interval,
        default=15.0,
        metavar="TIME",
        help="of the recording rules (default: 15 s, as monitoring/rules.yaml)",
    )
    group.add_argument(
        "--metric-delay",
        type=option_types.duration_or_zero,
        default=0.0,
        metavar="TIME",
        help="age of what an adapter answers (default: 0)",
    )


def _output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--first-token-within",
        type=option_types.number(1e-3, math.inf),
        default=2.0,
        metavar="SECONDS",
        help="the objective (default: 2)",
    )
    group.add_argument(
        "--for-share",
        type=option_types.number(0.5, 0.99999),
        default=0.95,
        metavar="SHARE",
        help="of the requests (default: 0.95)",
    )
    group.add_argument("--no-recommendation", action="store_true", help="only what was asked for")
    group.add_argument(
        "--search",
        action="store_true",
        help="simulate larger targets than the arithmetic's while the objective holds, or smaller ones until it does",
    )
    group.add_argument("--json", action="store_true", help="one JSON object instead of the text")
    group.add_argument("--plot", type=Path, metavar="FILE", help="a picture of all runs")
    group.add_argument(
        "--compare",
        type=Path,
        metavar="FILE",
        help="a recorded run, and how far the first simulated one is off; exit code 1 beyond "
        "its tolerances. Its load is taken if none is given",
    )


_durations = option_types.sentence_of(parse_durations)
_schedule = option_types.sentence_of(parse_schedule)


@option_types.sentence_of
def _users(text: str) -> Schedule:
    return parse_schedule(text, whole=True)


@option_types.sentence_of
def _targets(text: str) -> tuple[Target, ...]:
    targets = []
    for part in text.split("+"):
        name, _, value = part.partition("=")
        names = get_args(SignalName)
        if name not in names:
            matches = difflib.get_close_matches(name, names, n=1)
            hint = f"perhaps you meant {matches[0]!r}" if matches else f"there are {', '.join(names)}"
            raise UsageError(f"{name!r} is no signal; {hint}")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0.001 <= number < math.inf:
            raise UsageError(
                f"{part!r} has no target; write {name}=NUMBER, at least 0.001, the least that Kubernetes knows"
            )
        if name in [target.signal for target in targets]:
            raise UsageError(f"{text!r} has {name} twice; the larger target would never matter, so leave it out")
        targets.append(Target(signal=name, value=number))
    return tuple(targets)


@option_types.sentence_of
def _policies(text: str) -> tuple[Policy, ...]:
    policies = []
    for part in text.split(","):
        kind, *numbers = part.strip().split(":")
        if kind.title() not in get_args(PolicyKind) or len(numbers) != 2 or not all(map(str.isdecimal, numbers)):
            raise UsageError(f"{part!r} is no policy; write pods:4:15 (4 Pods in any 15 s) or percent:100:15")
        value, seconds = map(int, numbers)
        if value < 1 or not 1 <= seconds <= 1800:
            raise UsageError(f"{part!r} is out of range; the value is at least 1, the period 1 to 1800 s")
        policies.append(Policy(kind=kind.title(), value=value, period_seconds=seconds))
    return tuple(policies)
