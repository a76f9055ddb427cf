"""Parameters that come with a request: Triton's own pass, the rest is refused or honoured, never ignored."""

from __future__ import annotations

from typing import Any

import pytest
from prompt_encoding import CLIENT_INPUTS
from request_parameters import ParameterError, read_parameters, refuse_unknown_parameters, timeout_microseconds


@pytest.mark.parametrize(
    "names", [[], ["id"], ["timeout"], ["triton_enable_empty_final_response"], ["sequence_id"]], ids=str
)
def test_parameters_of_triton_pass(names: list[str]):
    refuse_unknown_parameters(names, CLIENT_INPUTS)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_token", "perhaps you meant 'max_tokens'"),
        ("temprature", "perhaps you meant 'temperature'"),
        ("text", "leave it out|perhaps you meant 'text_input'"),
        ("stop_word", "perhaps you meant 'stop_words'"),
        ("streaming", "perhaps you meant 'stream'"),
        ("Temperature", "perhaps you meant 'temperature'"),
        ("zzz", "leave it out"),
    ],
)
def test_an_unknown_parameter_is_refused_with_the_nearest_name(name: str, hint: str):
    with pytest.raises(ParameterError, match=f"'{name}' is not an input of this model; ({hint})"):
        refuse_unknown_parameters({"id": 1, name: 2}, CLIENT_INPUTS)


def test_an_input_that_came_as_a_parameter_is_refused():
    with pytest.raises(ParameterError, match="'top_k' came as a parameter, where it has no effect"):
        refuse_unknown_parameters(["top_k"], CLIENT_INPUTS)


class Request:
    """Triton's, as far as it is needed; text that is not UTF-8 is an error of pybind11."""

    def __init__(self, parameters: bytes = b"", request_id: bytes = b""):
        self._parameters, self._request_id = parameters, request_id

    def parameters(self) -> str:
        return self._parameters.decode()

    def request_id(self) -> str:
        return self._request_id.decode()


def test_without_parameters_there_are_none():
    assert read_parameters(Request()) == {}
    assert read_parameters(Request(b'{"id": "a", "timeout": 5}')) == {"id": "a", "timeout": 5}


@pytest.mark.parametrize(
    "request_", [Request(parameters=b'{"\xff": 1}'), Request(request_id=b"\xff")], ids=["parameter", "id"]
)
def test_what_is_not_utf_8_is_refused(request_: Request):
    with pytest.raises(ParameterError, match="id or one of its parameters is not UTF-8"):
        read_parameters(request_)


@pytest.mark.parametrize(
    ("triton", "parameters", "expected"),
    [(0, {}, 0), (5, {}, 5), (0, {"timeout": 7}, 7), (0, {"timeout": 0}, 0), (0, {"timeout": 2**63 - 1}, 2**63 - 1)],
)
def test_a_timeout_is_what_either_says(triton: int, parameters: dict[str, Any], expected: int):
    assert timeout_microseconds(triton, parameters) == expected


@pytest.mark.parametrize("timeout", [-1, 1.5, "5", True, None, 2**63, [1]], ids=repr)
def test_a_timeout_that_is_no_time_is_refused(timeout: Any):
    with pytest.raises(ParameterError, match=r"timeout is .*; it must be a whole number of microseconds"):
        timeout_microseconds(0, {"timeout": timeout})
