"""The command line of load.py, as argparse knows it."""

from __future__ import annotations

import argparse
import difflib
import math
from pathlib import Path
from typing import Any, NoReturn

from failures import UsageError
from option_types import (
    address,
    channel_option,
    duration,
    duration_or_zero,
    lengths,
    number,
    port,
    text,
    token_id,
    whole,
)

DESCRIPTION = """\
Offer load to an LLM service on Triton over gRPC, and measure it.

  load.py --rate 5 --duration 60s             5 requests/s, as a Poisson process, whatever the answers take
  load.py --concurrency 16 --duration 60s     16 users, each asks again when it has its answer
  load.py --rate 5@30s,5..50@2m,50            steps and ramps; the last step lasts until SIGINT or SIGTERM
  load.py --trace day.jsonl                   requests as they were recorded
"""
EPILOG = """\
Lengths are 128, uniform:16:256, normal:128:32, lognormal:128:64 (mean and deviation; a third number cuts), or
choice:64,128. Durations are 90, 90s, 5m, 1h. docs/load-client.md explains every number of the report.

SIGINT or SIGTERM ends the load: requests in flight get --grace, then the report is written; a second one skips --grace.

exit codes: 0 the load was offered (errors of the service are data) or a signal ended it, 1 no answer at all or more
errors than --max-error-ratio, 2 wrong option
"""


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="load.py",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_target(parser.add_argument_group("the service"))
    _add_load(parser.add_argument_group("the load (one of --rate, --concurrency, --trace)"))
    _add_questions(parser.add_argument_group("what is asked"))
    _add_patience(parser.add_argument_group("what a client does about trouble"))
    _add_outputs(parser.add_argument_group("results, besides the table on stdout"))
    return parser


def _add_target(group: Any) -> None:
    group.add_argument(
        "--url",
        type=address,
        default="localhost:8001",
        metavar="HOST:PORT",
        help="gRPC address of the server (default: localhost:8001)",
    )
    group.add_argument(
        "--model",
        metavar="NAME",
        help="model that streams; NAME_infer is asked with --no-stream (default: the served model, when there is one)",
    )
    group.add_argument(
        "--no-stream", dest="stream", action="store_false", help="plain infer() instead of streams (default: streams)"
    )
    group.add_argument(
        "--connections", type=whole(1), default=4, metavar="N", help="TCP connections, used in turn (default: 4)"
    )
    group.add_argument(
        "--connection-age",
        type=duration,
        default=math.inf,
        metavar="DURATION",
        help="renew each connection after this time, so that replicas which were added get their share "
        "(default: never)",
    )
    group.add_argument(
        "--round-robin",
        action="store_true",
        help="ask all addresses of the host's name in turn, as for a headless Service (default: one "
        "address per connection)",
    )
    group.add_argument(
        "--grpc-option",
        type=channel_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a gRPC channel argument, as grpc.keepalive_time_ms=60000; may be repeated",
    )
    group.add_argument(
        "--wait",
        type=duration,
        default=0.0,
        metavar="DURATION",
        help="wait this long for the server and the model to be there (default: not at all)",
    )


def _add_load(group: Any) -> None:
    shape = group.add_mutually_exclusive_group()
    shape.add_argument(
        "--rate",
        metavar="SCHEDULE",
        help="open loop: requests per second, as a Poisson process: 5, 5@30s,20@60s or 5..20@60s",
    )
    shape.add_argument(
        "--concurrency",
        metavar="SCHEDULE",
        help="closed loop: users who ask again when they have their answer: 16, 4@30s,16@60s or 1..64@5m",
    )
    shape.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="open loop: JSON lines with time (seconds), prompt or input_tokens, output_tokens",
    )
    group.add_argument("--repeat", action="store_true", help="begin the schedule again at its end (default: stop)")
    group.add_argument(
        "--duration",
        type=duration,
        default=math.inf,
        metavar="DURATION",
        help="send no longer than this (default: to the end of the schedule)",
    )
    group.add_argument("--requests", type=whole(1), metavar="N", help="send no more than this many (default: no limit)")
    group.add_argument(
        "--max-in-flight",
        type=whole(1),
        default=4096,
        metavar="N",
        help="open loop: requests due while so many are in flight are not sent, and counted as errors (default: 4096)",
    )
    group.add_argument(
        "--seed",
        type=whole(0),
        metavar="N",
        help="of arrivals, prompts and lengths (default: a new one, which the report names)",
    )


def _add_questions(group: Any) -> None:
    texts = group.add_mutually_exclusive_group()
    texts.add_argument(
        "--prompt", type=text, metavar="TEXT", help="ask this (default: random words, --input-tokens of them)"
    )
    texts.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="ask one of these at random: a line each, or JSON lines with prompt (FILE.jsonl)",
    )
    group.add_argument(
        "--input-tokens",
        type=lengths,
        metavar="LENGTHS",
        help="length of random prompts, in frequent English words, about a token each (default: 64)",
    )
    group.add_argument(
        "--output-tokens",
        type=lengths,
        default="128",
        metavar="LENGTHS",
        help="max_tokens of each request (default: 128)",
    )
    group.add_argument(
        "--end-id",
        type=token_id,
        metavar="ID",
        help="token that ends an answer; -1: none, so that answers have exactly max_tokens (default: the model's)",
    )
    group.add_argument(
        "--stop-word",
        type=text,
        action="append",
        default=[],
        metavar="TEXT",
        help="text that ends an answer; may be repeated",
    )
    group.add_argument("--temperature", type=number(0.0, math.inf), metavar="T", help="sample (default: greedy)")
    group.add_argument("--chat", action="store_true", help="have the model's chat template applied (default: not)")
    group.add_argument(
        "--cancel-ratio",
        type=number(0.0, 1.0),
        default=0.0,
        metavar="R",
        help="share of streams to cancel after a random part of max_tokens; counted apart (default: 0)",
    )


def _add_patience(group: Any) -> None:
    group.add_argument(
        "--timeout",
        type=duration,
        metavar="DURATION",
        help="give a request up, retries included, this long after it was sent (default: never)",
    )
    group.add_argument(
        "--retries",
        type=whole(0),
        default=0,
        metavar="N",
        help="ask again up to N times when refused or unreachable before the first token, after 0.1 s, "
        "0.2 s, ... 5 s with jitter (default: 0)",
    )
    group.add_argument(
        "--grace",
        type=duration_or_zero,
        default=10.0,
        metavar="DURATION",
        help="how long requests in flight may take at the end before they are cut off (default: 10s)",
    )
    group.add_argument(
        "--max-error-ratio",
        type=number(0.0, 1.0),
        default=1.0,
        metavar="R",
        help="exit with 1 when more than this share of requests failed (default: 1)",
    )


def _add_outputs(group: Any) -> None:
    group.add_argument("--json", type=Path, metavar="FILE", help="everything, as one JSON document")
    group.add_argument("--csv", type=Path, metavar="FILE", help="a line per second, written as it goes")
    group.add_argument(
        "--request-log", type=Path, metavar="FILE", help="a JSON line per request, written as it ends; -: to stdout"
    )
    group.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="load, throughput and latency over time (matplotlib)"
    )
    group.add_argument(
        "--prometheus-port",
        type=port,
        metavar="PORT",
        help="serve metrics at http://ADDRESS:PORT/metrics while it runs; 0 takes a free port",
    )
    group.add_argument(
        "--prometheus-address",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where; 0.0.0.0 for all interfaces (default: 127.0.0.1)",
    )


class _Parser(argparse.ArgumentParser):
    """Says what is wrong by an exception, for main to print in one place."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the options")


def unknown_option(argument: str, parser: argparse.ArgumentParser) -> str:
    """What is wrong with an argument that argparse does not know."""
    option = argument.partition("=")[0]
    if not option.startswith("-"):
        return f"{argument!r} belongs to no option"
    known = [name for action in parser._actions for name in action.option_strings]
    matches = difflib.get_close_matches(option, known, n=1)
    return f"there is no option {option!r}" + (f"; perhaps you meant {matches[0]!r}" if matches else "")
