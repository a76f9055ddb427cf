"""A recorded load: JSON lines, one request each.

    {"time": 0.0, "prompt": "What is the capital of France?", "output_tokens": 32}
    {"time": 0.4, "input_tokens": 700, "output_tokens": 120}

`time` is in seconds from the start and never goes back. Each line has `prompt` or `input_tokens`; a line without
`output_tokens` takes those of --output-tokens.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from failures import UsageError
from lengths import LONGEST

KEYS = ("time", "prompt", "input_tokens", "output_tokens")
_OTHER_NAMES = {"timestamp": "time", "text_input": "prompt", "max_tokens": "output_tokens"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedRequest:
    """Either `prompt` or `input_tokens` is given."""

    seconds: float
    prompt: str | None
    input_tokens: int | None
    output_tokens: int | None


def read_trace(path: Path) -> tuple[TracedRequest, ...]:
    """Raises UsageError for a file that cannot be read, with the line."""
    requests: list[TracedRequest] = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            request = _traced_request(line)
            if requests and request.seconds < requests[-1].seconds:
                raise ValueError(
                    f"time {request.seconds:g} is before {requests[-1].seconds:g}, the time of the line before; "
                    "sort the lines by time"
                )
        except ValueError as error:
            raise UsageError(f"{path} line {number}: {error}") from None
        requests.append(request)
    if not requests:
        raise UsageError(f"{path} has no request; a line is like " + '{"time": 0, "prompt": "Hello"}')
    return tuple(requests)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file. Raises UsageError."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text: byte {error.start} is wrong") from None


def read_object(line: str) -> dict[str, Any]:
    """The JSON object of one line. Raises ValueError."""
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{line.strip()[:40]} is no JSON object")
    return content


def _traced_request(line: str) -> TracedRequest:
    content = read_object(line)
    for key in content:
        if key not in KEYS:
            matches = [_OTHER_NAMES[key]] if key in _OTHER_NAMES else difflib.get_close_matches(key, KEYS, n=1)
            hint = f"perhaps you meant {matches[0]!r}" if matches else f"the keys are {', '.join(KEYS)}"
            raise ValueError(f"{key!r} is no key of a trace; {hint}")
    if "time" not in content:
        raise ValueError("it has no time; give seconds from the start")
    if ("prompt" in content) == ("input_tokens" in content):
        raise ValueError("it must have either prompt or input_tokens")
    if "prompt" in content:
        check_text("prompt", content["prompt"])
    return TracedRequest(
        seconds=_seconds(content["time"]),
        prompt=content.get("prompt"),
        input_tokens=_count(content, "input_tokens"),
        output_tokens=_count(content, "output_tokens"),
    )


def check_text(name: str, value: object) -> None:
    """Raises ValueError for what cannot be sent; JSON can hold halves of characters, as in "\\ud800"."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; it must be a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has half a character at {error.start}, which UTF-8 cannot hold") from None


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"time is {value!r}; it must be a number of seconds, at least 0")
    return float(value)


def _count(content: dict[str, Any], key: str) -> int | None:
    if key not in content:
        return None
    value = content[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LONGEST:
        raise ValueError(f"{key} is {value!r}; it must be a whole number from 1 to {LONGEST}")
    return value
