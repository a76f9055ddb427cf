"""What can go wrong: for the program, one exit code per class; for one request, one kind.

A request that fails is a result and is counted by kind. Only what keeps the program from running is a LoadError.
"""

from __future__ import annotations

import re
from typing import Literal

ErrorKind = Literal["refused", "bad_request", "unavailable", "timeout", "incomplete", "failed", "not_sent"]

# Kinds after which the same question may be asked again: the server did no work for it, or it is gone.
RETRIED_KINDS: tuple[ErrorKind, ...] = ("refused", "unavailable")

_KIND_OF_STATUS: dict[str, ErrorKind] = {
    "UNAVAILABLE": "refused",
    "RESOURCE_EXHAUSTED": "refused",  # what gateways answer for a rate limit
    "INVALID_ARGUMENT": "bad_request",
    "NOT_FOUND": "bad_request",
    "UNIMPLEMENTED": "bad_request",
    "OUT_OF_RANGE": "bad_request",
    "DEADLINE_EXCEEDED": "timeout",
}
# gRPC says UNAVAILABLE both for what a server answered and for a server that is not there; only the text differs.
_NOBODY_THERE = re.compile(
    r"failed to connect|connection (?:refused|reset|timed out)|socket closed|stream removed|broken pipe|recvmsg"
    r"|goaway|endpoint|errors? resolving|dns|empty address list|cancelling all calls|ping timeout|keepalive"
    r"|upstream connect|no healthy upstream"  # the words of Envoy, for a server behind a gateway
    r"|server is (?:stopping|exiting)|has no available versions"  # Triton's own, while it shuts down
    r"|send the request again|engine failed",  # ours: the server shuts down, or its engine died
    re.IGNORECASE,
)
_BROKEN_CONNECTION = "Internal error from Core"  # what grpc.aio says now and then instead of one of those

# Ours and Triton's own; the sentences stand also where there is no status, inside a stream.
_QUEUE = re.compile(r"the server is busy|exceeds maximum queue size|request timeout expired", re.IGNORECASE)
# A sentence inside a stream has no status, so that what is wrong with the request must be read from its words.
_BAD_REQUEST = re.compile(
    r"unknown model|unexpected inference|inference (?:input|output)|expected \d+ inputs|unexpected (?:shape|datatype)"
    # Ours: 'temperature is -1; it must be at least 0', 'the prompt has 9 tokens; this engine takes at most 8', ...
    r"|must be|at most|no room for|not UTF-8|leave it out|; send (?:one|at least|text|it)|so set"
    r"|this (?:engine|repository)|refused the request",
    re.IGNORECASE,
)


class LoadError(Exception):
    """The load cannot be offered, or nothing came of it: one sentence."""

    exit_code = 1


class UsageError(LoadError):
    """An option, or a file that an option names, that cannot be used."""

    exit_code = 2


class RequestFailure(Exception):
    """One request failed."""

    def __init__(self, kind: ErrorKind, message: str):
        super().__init__(message)
        self.kind = kind
        self.message = message


def request_failure(status: str | None, message: str | None, *, is_overdue: bool = False) -> RequestFailure:
    """`status` is gRPC's name, as 'UNAVAILABLE', or None where Triton gives only a sentence."""
    message = message or f"no message, status {status}"
    return RequestFailure(kind_of(status, message, is_overdue=is_overdue), message)


def kind_of(status: str | None, message: str, *, is_overdue: bool = False) -> ErrorKind:
    """`is_overdue`: the request's own time was over when it failed."""
    if is_overdue and message == _BROKEN_CONNECTION:
        return "timeout"  # grpc.aio, when the deadline passes while it sends the request
    if _QUEUE.search(message):
        return "refused"
    if status == "INTERNAL" and message == _BROKEN_CONNECTION:
        return "unavailable"
    if status in (None, "UNAVAILABLE") and _NOBODY_THERE.search(message):
        return "unavailable"
    if status is None:
        return "bad_request" if _BAD_REQUEST.search(message) else "failed"
    return _KIND_OF_STATUS.get(status, "failed")
