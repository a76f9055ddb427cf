"""Simulate autoscaling before a cluster is paid for: `python scripts/simulate_autoscaling.py --pattern day --high 40`.

A load (a trace, a rate, users), servers with slots and a queue, Prometheus with the rules of monitoring/, and the
HorizontalPodAutoscaler's algorithm, in simulated time. Prints a row per setting, and a recommendation with its
arithmetic. docs/autoscaling-simulator.md says what is modelled and what is not. Needs `pip install --group simulator`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "clients"))  # traces, schedules and lengths are theirs

import numpy as np
from autoscaling import options, report
from autoscaling.cluster import PodModel
from autoscaling.hpa import Behavior, ScalingRules
from autoscaling.offered_load import ClosedLoad, OfferedLoad, draw_lengths, from_rate, from_trace, pattern_schedule
from autoscaling.prometheus import PrometheusSettings
from autoscaling.recommendation import recommend, search
from autoscaling.recorded_run import RecordedRun, compare, comparison_text, read_recorded_run
from autoscaling.results import Objective, summarize
from autoscaling.servers import ServerModel
from autoscaling.simulation import Autoscaling, Run, Setting, Target, simulate
from failures import UsageError
from schedules import Schedule

PICTURES = (".png", ".svg", ".pdf")  # by what matplotlib tells the format


def main(argv: list[str] | None = None) -> int:
    arguments = options.parser().parse_args(argv)
    try:
        return run(arguments)
    except UsageError as error:
        print(f"simulate_autoscaling: {error}", file=sys.stderr)
        return UsageError.exit_code


def run(arguments: argparse.Namespace) -> int:
    if arguments.plot:
        check_picture(arguments.plot)
    recorded = read_recorded_run(arguments.compare) if arguments.compare else None
    objective = Objective(seconds=arguments.first_token_within, share=arguments.for_share)
    setting = read_setting(arguments, recorded)
    say = (lambda text: None) if arguments.json else (lambda text: print(text, flush=True))
    say(report.describe(setting, objective))

    runs: dict[str, Run] = {}
    for targets in arguments.signal or [(default_target(setting.server),)]:
        autoscaling = replace(setting.autoscaling, targets=targets)
        runs[str(autoscaling)] = _simulated(setting, autoscaling)
        if not len(runs[str(autoscaling)].arrivals):
            raise UsageError(
                f"no request comes within {setting.load.seconds:g} s; give a longer --duration or more load"
            )
    recommendation, tried = None, []
    if not arguments.no_recommendation:
        if arguments.search:
            recommendation, tried = search(
                setting, objective, lambda tested: summarize(_simulated(setting, tested), objective, f"tried {tested}")
            )
        else:
            recommendation = recommend(setting, objective)
        runs["recommended"] = _simulated(setting, recommendation.autoscaling)
    results = [summarize(each, objective, name) for name, each in runs.items()]
    results[-1:-1] = tried  # the recommended one stays the last
    say("\n" + report.table(results))
    if recommendation is not None:
        say("\n" + report.recommendation_text(recommendation, results[-1], objective))

    differences = [] if recorded is None else compare(recorded, next(iter(runs.values())))
    if differences:
        say("\n" + comparison_text(differences))
    if arguments.plot:
        from autoscaling.picture import write_plot  # matplotlib takes a second, and most runs draw nothing

        write_plot(runs, setting.load.description, arguments.plot, recorded)
        say(f"\nwrote {arguments.plot}")
    if arguments.json:
        content = {
            "objective": asdict(objective),
            "results": [result.as_json() for result in results],
            "recommendation": None if recommendation is None else recommendation.as_json(),
            "differences": [asdict(difference) for difference in differences],
            "timelines": {name: each.timeline.columns for name, each in runs.items()},
        }
        print(json.dumps(_without_nan(content)))
    return 1 if any(difference.holds is False for difference in differences) else 0


def read_setting(arguments: argparse.Namespace, recorded: RecordedRun | None) -> Setting:
    """Raises UsageError for options that do not go together."""
    if arguments.min_replicas > arguments.max_replicas:
        raise UsageError(
            f"--min-replicas {arguments.min_replicas} is above --max-replicas {arguments.max_replicas}; "
            "swap or raise one"
        )
    begin_with = arguments.begin_with or arguments.min_replicas
    if arguments.gpus is not None and begin_with * arguments.gpus_per_pod > arguments.gpus:
        raise UsageError(
            f"--gpus {arguments.gpus} are too few for the {begin_with} Pods at the start with {arguments.gpus_per_pod} "
            f"each; give at least {begin_with * arguments.gpus_per_pod}"
        )
    signals = [target.signal for targets in arguments.signal or [] for target in targets]
    if "kvCache" in signals and arguments.kv_tokens is None:
        raise UsageError("--signal kvCache needs a KV cache that can be full; give --kv-tokens")
    return Setting(
        load=read_load(arguments, recorded),
        server=ServerModel(
            slots=arguments.slots,
            tokens_per_second=arguments.tokens_per_second,
            prefill_seconds=arguments.prefill_seconds,
            prefill_tokens_per_second=arguments.prefill_tokens_per_second,
            kv_tokens=arguments.kv_tokens,
        ),
        pod=PodModel(
            image_pull=arguments.image_pull,
            engine_load=arguments.engine_load,
            drain_seconds=arguments.drain,
            gpus_per_pod=arguments.gpus_per_pod,
            gpus=arguments.gpus,
        ),
        autoscaling=Autoscaling(
            mode=arguments.mode,
            targets=(),
            behavior=Behavior(
                min_replicas=arguments.min_replicas,
                max_replicas=arguments.max_replicas,
                scale_up=ScalingRules(
                    stabilization_seconds=arguments.scale_up_window,
                    policies=arguments.scale_up_policies,
                    selection=arguments.scale_up_select,
                    tolerance=arguments.tolerance,
                ),
                scale_down=ScalingRules(
                    stabilization_seconds=arguments.scale_down_window,
                    policies=arguments.scale_down_policies,
                    selection=arguments.scale_down_select,
                    tolerance=arguments.tolerance,
                ),
            ),
            sync_seconds=arguments.sync_period,
        ),
        prometheus=PrometheusSettings(
            scrape_seconds=arguments.scrape_interval,
            evaluation_seconds=arguments.evaluation_interval,
            delay_seconds=arguments.metric_delay,
        ),
        balancing=arguments.balancing,
        connections=arguments.connections,
        connection_age_seconds=arguments.connection_age,
        begin_with=arguments.begin_with,
        seed=arguments.seed,
    )


def read_load(arguments: argparse.Namespace, recorded: RecordedRun | None) -> OfferedLoad:
    """Raises UsageError where there is none, or no end of it."""
    seconds = arguments.duration
    if arguments.trace:
        return from_trace(arguments.trace, _typical(arguments), seconds)
    if arguments.pattern:
        if arguments.low > arguments.high:
            raise UsageError(f"--low {arguments.low:g} is above --high {arguments.high:g}; swap them")
        seconds = seconds or (86400.0 if arguments.pattern == "day" else 3600.0)
        schedule = pattern_schedule(arguments.pattern, arguments.low, arguments.high, seconds)
        description = f"{arguments.pattern}, {arguments.low:g} to {arguments.high:g} requests/s"
        return _open(arguments, schedule, seconds, description)
    if arguments.rate:
        return _open(arguments, arguments.rate, _end(arguments.rate, seconds, "--rate"), "a rate")
    if arguments.concurrency:
        return _closed(arguments, arguments.concurrency, _end(arguments.concurrency, seconds, "--concurrency"))
    if recorded is not None and recorded.trace is not None:
        return from_trace(recorded.trace, _typical(arguments), seconds or recorded.seconds)
    if recorded is not None and recorded.schedule is not None:
        if recorded.kind == "rate":
            return _open(arguments, recorded.schedule, recorded.seconds, "the recorded rate")
        return _closed(arguments, recorded.schedule, recorded.seconds)
    raise UsageError("there is no load; give --trace, --rate, --concurrency or --pattern")


def check_picture(path: Path) -> None:
    """Before a run that may take a minute. Raises UsageError."""
    if path.suffix not in PICTURES:
        raise UsageError(f"--plot {path} has the ending {path.suffix!r}; it must be one of {', '.join(PICTURES)}")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path} is in a folder that does not exist; make {path.parent} first")


def default_target(server: ServerModel) -> Target:
    return Target(signal="concurrency", value=max(1, server.slots * 3 // 4))


def _simulated(setting: Setting, autoscaling: Autoscaling) -> Run:
    return simulate(replace(setting, autoscaling=autoscaling))


def _open(arguments: argparse.Namespace, rate: Schedule, seconds: float, description: str) -> OfferedLoad:
    return from_rate(rate, seconds, arguments.input_tokens, arguments.output_tokens, arguments.seed, description)


def _closed(arguments: argparse.Namespace, users: Schedule, seconds: float) -> OfferedLoad:
    return ClosedLoad(
        description="users who wait for their answers",
        seconds=seconds,
        users=users,
        input_lengths=arguments.input_tokens,
        output_lengths=arguments.output_tokens,
        think_seconds=arguments.think,
        seed=arguments.seed,
    )


def _end(schedule: Schedule, seconds: float | None, option: str) -> float:
    seconds = seconds or schedule.seconds
    if math.isinf(seconds):
        raise UsageError(f"{option} never ends; give --duration, or an @TIME to its last step")
    return seconds


def _typical(arguments: argparse.Namespace) -> int:
    """Tokens of an answer where a trace does not say it: the distribution's mean."""
    drawn = draw_lengths(arguments.output_tokens, 10_000, np.random.default_rng(arguments.seed))
    return max(1, round(float(drawn.mean())))


def _without_nan(content: object) -> object:
    """JSON has no NaN, and programs stumble over it."""
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


if __name__ == "__main__":
    sys.exit(main())
