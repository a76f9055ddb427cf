"""Types of command line options: each turns a text into a value, or says in a sentence what is wrong with it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from failures import UsageError
from lengths import LONGEST, parse_lengths
from schedules import parse_seconds
from traces import check_text

_GRPC_ADDRESS = "give HOST:PORT of the server's gRPC port"


def sentence_of(check: Callable[[str], Any]) -> Callable[[str], Any]:
    """argparse says 'invalid value' of a ValueError; this keeps the sentence."""

    def checked(text: str) -> Any:
        try:
            return check(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


duration = sentence_of(parse_seconds)
lengths = sentence_of(parse_lengths)


def duration_or_zero(text: str) -> float:
    return 0.0 if text.strip() in ("0", "0s") else duration(text)


def text(value: str) -> str:
    try:
        check_text("it", value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no UTF-8 text") from None
    return value


def token_id(text: str) -> int:
    if (text.strip() != "-1" and not text.strip().isdecimal()) or int(text) > LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is no token id; use -1 for none, or 0 to {LONGEST}")
    return int(text)


def whole(lowest: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        if not text.strip().isascii() or not text.strip().isdigit() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {lowest}")
        return int(text)

    return check


def number(lowest: float, highest: float) -> Callable[[str], float]:
    def check(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not lowest <= value <= highest or math.isinf(value):
            upper = "" if math.isinf(highest) else f" to {highest:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {lowest:g}{upper}")
        return value

    return check


def port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; use 0 to 65535")
    return int(text)


def address(text: str) -> str:
    if text.startswith(("http://", "https://", "grpc://")):
        raise argparse.ArgumentTypeError(f"{text!r} is a URL of HTTP; {_GRPC_ADDRESS}, as localhost:8001")
    if not text.startswith(("dns:", "ipv4:", "ipv6:", "unix:")) and not text.rpartition(":")[2].isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} has no port; {_GRPC_ADDRESS}, as {text}:8001")
    return text


def channel_option(text: str) -> tuple[str, str | int]:
    name, has_value, value = text.partition("=")
    if not has_value or not name.startswith("grpc."):
        raise argparse.ArgumentTypeError(f"{text!r} is no channel argument of gRPC, as grpc.keepalive_time_ms=60000")
    return name, int(value) if value.lstrip("-").isdigit() else value
