"""What load.py is to do, as dataclasses. Everything a user typed is checked here, before anything runs."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import random
from dataclasses import dataclass
from pathlib import Path

from failures import UsageError
from lengths import parse_lengths
from load_arguments import make_parser, unknown_option
from questions import Prompts, read_prompts
from schedules import Schedule, parse_schedule
from senders import Patience
from traces import TracedRequest, read_trace
from triton_service import ROUND_ROBIN, Sampling, Target


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Which load: one of the three is given. `words`: as it was typed, for the report."""

    rate: Schedule | None = None
    users: Schedule | None = None
    trace: tuple[TracedRequest, ...] | None = None
    words: str

    def offered(self, seconds: float) -> float | None:
        """Requests per second or users, at this time after the start; None for a trace."""
        schedule = self.rate or self.users
        return None if schedule is None else schedule.level(seconds)


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where results go; None: nowhere."""

    json: Path | None
    csv: Path | None
    request_log: Path | None
    plot: Path | None
    prometheus_port: int | None
    prometheus_address: str


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to do. `arguments`: as they were typed; `duration_seconds` may be infinite; `requests` None: no limit."""

    arguments: tuple[str, ...]
    target: Target
    sampling: Sampling
    prompts: Prompts
    shape: Shape
    patience: Patience
    outputs: Outputs
    duration_seconds: float
    requests: int | None
    max_in_flight: int
    grace_seconds: float
    max_error_ratio: float
    seed: int


def parse(argv: list[str]) -> Options:
    """Raises UsageError."""
    parser = make_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UsageError(f"{unknown_option(unknown[0], parser)}; --help lists the options")
    if arguments.rate is None and arguments.concurrency is None and arguments.trace is None:
        raise UsageError("which load? give --rate, --concurrency or --trace; --help has an example of each")
    if arguments.repeat and arguments.trace:
        raise UsageError("--repeat repeats the schedule of --rate or --concurrency, and --trace has none")
    if arguments.cancel_ratio and not arguments.stream:
        raise UsageError("--cancel-ratio cancels streams, and --no-stream has none; give one of the two")
    if arguments.round_robin and not arguments.url.startswith(("dns:", "ipv4:", "ipv6:")):
        arguments.url = f"dns:///{arguments.url}"
    outputs = _outputs(arguments)
    return Options(
        arguments=tuple(argv),
        target=Target(
            url=arguments.url,
            model=arguments.model,
            streams=arguments.stream,
            connections=arguments.connections,
            connection_age_seconds=arguments.connection_age,
            channel_options=(*([ROUND_ROBIN] if arguments.round_robin else []), *arguments.grpc_option),
            wait_seconds=arguments.wait,
        ),
        sampling=Sampling(
            temperature=arguments.temperature,
            stop_words=tuple(arguments.stop_word),
            end_id=arguments.end_id,
            chat=arguments.chat,
        ),
        prompts=_prompts(arguments),
        shape=_shape(arguments),
        patience=Patience(timeout_seconds=arguments.timeout, retries=arguments.retries),
        outputs=outputs,
        duration_seconds=arguments.duration,
        requests=arguments.requests,
        max_in_flight=arguments.max_in_flight,
        grace_seconds=arguments.grace,
        max_error_ratio=arguments.max_error_ratio,
        seed=random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed,
    )


def _shape(arguments: argparse.Namespace) -> Shape:
    if arguments.trace is not None:
        return Shape(trace=read_trace(arguments.trace), words=f"--trace {arguments.trace}")
    option = "--rate" if arguments.rate is not None else "--concurrency"
    text = arguments.rate if arguments.rate is not None else arguments.concurrency
    try:
        schedule = parse_schedule(text, repeats=arguments.repeat, whole=option == "--concurrency")
    except UsageError as error:
        raise UsageError(f"argument {option}: {error}") from None
    if not math.isinf(arguments.duration) and schedule.seconds < arguments.duration:
        raise UsageError(
            f"--duration {arguments.duration:g} s is longer than the {schedule.seconds:g} s of {option} {text}; "
            "leave --duration out, leave the last step open, or add --repeat"
        )
    words = f"{option} {text}" + (" --repeat" if arguments.repeat else "")
    return Shape(rate=schedule, words=words) if option == "--rate" else Shape(users=schedule, words=words)


def _prompts(arguments: argparse.Namespace) -> Prompts:
    for option in ("prompt", "prompts", "trace"):
        given = getattr(arguments, option)
        if given is not None and arguments.input_tokens is not None:
            raise UsageError(f"--input-tokens is the length of random prompts, and --{option} brings its own; drop one")
        if option != "trace" and given is not None and arguments.trace is not None:
            raise UsageError(f"--trace brings its own prompts, so leave out --{option}")
    texts: tuple[str, ...] = ()
    if arguments.prompt is not None:
        texts = (arguments.prompt,)
    elif arguments.prompts is not None:
        texts = read_prompts(arguments.prompts)
    return Prompts(
        texts=texts,
        input_tokens=arguments.input_tokens or parse_lengths("64"),
        output_tokens=arguments.output_tokens,
        cancel_ratio=arguments.cancel_ratio,
    )


def _outputs(arguments: argparse.Namespace) -> Outputs:
    for option in ("json", "csv", "plot"):
        path: Path | None = getattr(arguments, option)
        if path is not None:
            _check_writable(path, f"--{option}")
    if arguments.request_log not in (None, Path("-")):
        _check_writable(arguments.request_log, "--request-log")
    if arguments.plot is not None:
        if arguments.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise UsageError(f"--plot {arguments.plot} has no known kind of image; call it .png, .svg or .pdf")
        _check_installed("matplotlib", "--plot")
    if arguments.prometheus_port is not None:
        _check_installed("prometheus_client", "--prometheus-port")
    return Outputs(
        json=arguments.json,
        csv=arguments.csv,
        request_log=arguments.request_log,
        plot=arguments.plot,
        prometheus_port=arguments.prometheus_port,
        prometheus_address=arguments.prometheus_address,
    )


def _check_writable(path: Path, option: str) -> None:
    """Before the load, not after it."""
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{option} {path}: there is no folder {path.absolute().parent}; make it first")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise UsageError(f"{option} {path} cannot be written by this user")


def _check_installed(package: str, option: str) -> None:
    if importlib.util.find_spec(package) is None:
        name = package.replace("_", "-")
        raise UsageError(f"{option} needs {name}, which is not installed; pip install {name}, or leave it out")
