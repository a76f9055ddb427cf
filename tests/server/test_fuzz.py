"""Whatever comes, each request is answered once, and good ones in between are answered right.

FUZZ_EXAMPLES=10000 python -m pytest tests/server/test_fuzz.py      (make fuzz)
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from odd_requests import HttpRequest, generate_requests, grpc_requests, infer_requests
from running_server import Server
from tritonclient.grpc import service_pb2_grpc

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "400"))
SECONDS = 20  # for one answer, which takes milliseconds
GOOD = {"text_input": "The capital of France is", "max_tokens": 30}

fuzzed = settings(
    max_examples=EXAMPLES // 4,
    deadline=None,  # of a machine that is busy
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    # Without shrinking: a request that ends the server cannot be sent a second time.
    phases=[Phase.explicit, Phase.generate],
    derandomize="FUZZ_EXAMPLES" not in os.environ,  # CI sees the same ones every time
    database=None,
    print_blob=True,
)


@pytest.fixture(scope="module")
def fast(build_synthetic: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An engine that answers in no time, so that the models around it are what is tried."""
    rates = ("tokens_per_second=5000", "--max-batch-size", "16", "--max-seq-len", "600")
    with Server(build_synthetic(*rates), tmp_path_factory.mktemp("fuzz") / "log") as server:
        yield server


def processes(server: Server) -> set[int]:
    running = psutil.Process(server.process.pid).children(recursive=True)
    return {process.pid for process in running if process.status() != psutil.STATUS_ZOMBIE}


@pytest.fixture(autouse=True)
def the_server_is_what_it_was(fast: Server) -> Iterator[None]:
    right, before, log_before = fast.generate(**GOOD)["text_output"], processes(fast), fast.log.stat().st_size
    yield
    assert fast.generate(**GOOD)["text_output"] == right
    assert processes(fast) == before
    deadline = time.monotonic() + SECONDS
    while fast.active_requests() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert fast.active_requests() == 0
    with fast.log.open() as log:
        log.seek(log_before)
        assert "Traceback" not in log.read()


class Good:
    """Every now and then a good request, whose answer is known."""

    def __init__(self, server: Server):
        self._server, self._right = server, server.generate(**GOOD)["text_output"]
        self._number = 0

    def ask_sometimes(self) -> None:
        self._number += 1
        if self._number % 10 == 0:
            assert self._server.generate(**GOOD)["text_output"] == self._right
        if self._number % 25 == 0:
            pieces = self._server.generate_stream(**GOOD, stream=True)
            assert "".join(piece["text_output"] for piece in pieces) == self._right


def answer(server: Server, request: HttpRequest) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=SECONDS)
    try:
        connection.request("POST", request.path, request.body)
        response = connection.getresponse()
        # What Triton itself says of a body that is not UTF-8 cites it as it is.
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()


@pytest.fixture(scope="module")
def good(fast: Server) -> Good:
    return Good(fast)


@fuzzed
@given(request=generate_requests())
def test_generate(fast: Server, good: Good, request: HttpRequest):
    status, body = answer(fast, request)
    if request.path.endswith("generate"):
        document = json.loads(body)  # one, and nothing after it
        assert status == 200 or document["error"]
    else:
        events = [json.loads(line.removeprefix("data:")) for line in body.split("\n") if line]
        # Direct requests to tensorrt_llm may end in nothing: `stop` is answered by an empty final response.
        assert events or "tensorrt_llm" in request.path
        assert status == 200 or len(events) == 1
        assert all("error" not in event for event in events[:-1])
        if "synthetic" in request.path and events and "error" not in events[-1]:
            assert_each_sequence_ends_once(events)
    good.ask_sometimes()


def assert_each_sequence_ends_once(events: list[dict]) -> None:
    ended: dict[tuple[int, int], int] = {}
    for event in events:
        key = (event["batch_index"], event["sequence_index"])
        assert not ended.get(key), "something comes after the end"
        reasons = event["finish_reason"]
        ended[key] = bool(reasons[0] if isinstance(reasons, list) else reasons)
    assert all(ended.values())


@fuzzed
@given(request=infer_requests())
def test_infer_over_http(fast: Server, good: Good, request: HttpRequest):
    status, body = answer(fast, request)
    document = json.loads(body)
    assert ("outputs" in document) == (status == 200)
    assert status == 200 or isinstance(document["error"], str)
    good.ask_sometimes()


@pytest.fixture(scope="module")
def stub(fast: Server) -> Iterator[service_pb2_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(f"127.0.0.1:{fast.grpc_port}") as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


# What the server may say; UNKNOWN would be an exception of its own, DEADLINE_EXCEEDED nothing at all.
ANSWERS = {"INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "UNAVAILABLE", "INTERNAL", "CANCELLED", "ALREADY_EXISTS"}


@fuzzed
@given(request=grpc_requests())
def test_infer_over_grpc(fast: Server, good: Good, stub: service_pb2_grpc.GRPCInferenceServiceStub, request):
    try:
        assert stub.ModelInfer(request, timeout=SECONDS).model_name == request.model_name
    except grpc.RpcError as error:
        assert error.code().name in ANSWERS, error
        assert error.details()
        assert not re.search("socket|connect", error.details(), re.IGNORECASE), "the server is gone"
    good.ask_sometimes()


@fuzzed
@given(request=grpc_requests())
def test_a_stream_over_grpc(fast: Server, good: Good, stub: service_pb2_grpc.GRPCInferenceServiceStub, request):
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    ends = 0
    for response in stub.ModelStreamInfer(iter([request]), timeout=SECONDS):
        assert not ends, "something comes after the end"
        final = response.infer_response.parameters["triton_final_response"].bool_param
        ends += bool(response.error_message) or final
    assert ends == 1
    good.ask_sometimes()
