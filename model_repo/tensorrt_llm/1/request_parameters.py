"""A request's parameters, as opposed to its tensors: which may come, and what they say. Knows nothing of Triton.

gRPC and /infer carry `timeout` in a field that Triton itself reads. The generate endpoints do not: there every JSON key
that names no input becomes a parameter, and Triton ignores all of them.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from typing import Protocol

# Those of Triton's own protocols, which come along with a request.
TRITON_PARAMETERS = frozenset({"id", "timeout", "sequence_id", "sequence_start", "sequence_end", "binary_data_output"})


class Request(Protocol):
    """What is needed of Triton's."""

    def request_id(self) -> str: ...

    def parameters(self) -> str:
        """JSON; empty when there are none."""


class ParameterError(Exception):
    """This parameter cannot be honoured: one sentence for the client."""


def refuse_unknown_parameters(names: Collection[str], known_inputs: Collection[str]) -> None:
    """Raises ParameterError for a misspelled input, and for what has no effect where it was given."""
    for name in names:
        if name in known_inputs:  # from clients of /infer and gRPC, which write both
            raise ParameterError(f"'{name}' came as a parameter, where it has no effect; send it as an input tensor")
        if name == "priority":  # where Triton reads it, it does not reach a model
            raise ParameterError(
                "'priority' has no effect on the generate endpoints; ask by gRPC or /infer, or leave it out"
            )
        if name not in TRITON_PARAMETERS and not name.startswith("triton_"):
            nearest = difflib.get_close_matches(name, known_inputs, n=1)
            hint = f"perhaps you meant '{nearest[0]}'" if nearest else "leave it out"
            raise ParameterError(f"'{name}' is not an input of this model; {hint}")


def read_parameters(request: Request) -> dict[str, object]:
    """Those of a request. Raises ParameterError."""
    try:
        request.request_id()  # asked for here, so that nobody else has to expect what follows
        return json.loads(request.parameters() or "{}")
    except UnicodeDecodeError:
        raise ParameterError("the request's id or one of its parameters is not UTF-8; send it as UTF-8") from None


def timeout_microseconds(request_timeout: int, parameters: dict[str, object]) -> int:
    """How long the request may take in all; 0: no limit. `request_timeout` is what Triton itself read.

    Raises ParameterError.
    """
    timeout = parameters.get("timeout", request_timeout)
    if type(timeout) is not int or not 0 <= timeout < 2**63:  # no isinstance: true is no time
        raise ParameterError(f"timeout is {timeout!r}; it must be a whole number of microseconds, 0 for no limit")
    return timeout
