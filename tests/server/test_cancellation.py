"""Whoever goes away frees what he held; whoever stays gets exactly one end."""

from __future__ import annotations

import http.client
import json
import queue
import threading
import time

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from running_server import Server, ServerError, tensors

# Long enough that no test waits for its natural end: seconds, where a cancelled one takes milliseconds.
LONG = {"text_input": "Count", "max_tokens": 1000, "end_id": -1, "temperature": 1.0, "num_return_sequences": 8}
LONG_IDS = {
    "input_ids": np.array([[5, 6]], np.int32),
    "request_output_len": 1000,
    "end_id": -1,
    "streaming": True,
    "temperature": 1.0,
    "num_return_sequences": 8,
}


def wait_for_active(server: Server, number: int, seconds: float = 10) -> float:
    """Seconds until the engine has this many requests."""
    started = time.monotonic()
    while server.active_requests() != number:
        if time.monotonic() - started > seconds:
            raise AssertionError(f"{server.active_requests()} requests are active after {seconds} s, not {number}")
        time.sleep(0.005)
    return time.monotonic() - started


@pytest.fixture(scope="module")
def soon(session_server: Server) -> float:
    """Seconds, far less than the long requests take on this machine today: they end early or these tests fail."""
    started = time.monotonic()
    session_server.infer_grpc(**LONG)
    return (time.monotonic() - started) / 2


@pytest.fixture(autouse=True)
def idle(server: Server):
    wait_for_active(server, 0)
    yield
    wait_for_active(server, 0)


def start_grpc_stream(server: Server, model: str, request_id: str = "", **values):
    """An open stream whose first response has come, and the queue of what comes after it."""
    answers: queue.SimpleQueue = queue.SimpleQueue()
    client = grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer(
        model, tensors(grpcclient, values), request_id=request_id, enable_empty_final_response=True
    )
    _, error = answers.get(timeout=30)
    assert error is None, error
    return client, answers


def test_a_cancelled_grpc_stream_frees_its_slot(server: Server, soon: float):
    client, _ = start_grpc_stream(server, server.name, **LONG, stream=True)
    wait_for_active(server, 8)
    client.stop_stream(cancel_requests=True)
    assert wait_for_active(server, 0) < soon


def test_a_closed_http_stream_frees_its_slot(server: Server, soon: float):
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)
    connection.request("POST", f"/v2/models/{server.name}/generate_stream", json.dumps({**LONG, "stream": True}))
    connection.getresponse().readline()
    wait_for_active(server, 8)
    connection.sock.close()
    connection.close()
    assert wait_for_active(server, 0) < soon


def test_a_cancelled_grpc_infer_frees_its_slot(server: Server, soon: float):
    errors: queue.SimpleQueue = queue.SimpleQueue()
    with grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        call = client.async_infer(
            server.infer_name, tensors(grpcclient, LONG), callback=lambda result, error: errors.put(error)
        )
        wait_for_active(server, 8)
        call.cancel()
        assert wait_for_active(server, 0) < soon
        assert "cancelled" in str(errors.get(timeout=10)).lower()


def test_a_cancelled_stream_of_token_ids_frees_its_slot(server: Server, soon: float):
    client, _ = start_grpc_stream(server, "tensorrt_llm", **LONG_IDS)
    wait_for_active(server, 8)
    client.stop_stream(cancel_requests=True)
    assert wait_for_active(server, 0) < soon


def test_a_stop_request_ends_the_request_with_its_id(server: Server, soon: float):
    client, answers = start_grpc_stream(server, "tensorrt_llm", request_id="mine", **LONG_IDS)
    wait_for_active(server, 8)
    client.async_stream_infer(
        "tensorrt_llm", tensors(grpcclient, {"stop": True}), request_id="mine", enable_empty_final_response=True
    )
    assert wait_for_active(server, 0) < soon
    finals = 0
    while finals < 2:  # of the stop request and of the stopped one
        result, error = answers.get(timeout=10)
        assert error is None
        finals += result.get_response().parameters["triton_final_response"].bool_param
    client.stop_stream()


def test_a_stop_request_without_an_id_is_refused(server: Server):
    with pytest.raises(ServerError, match="has no id"):
        list(server.stream_grpc("tensorrt_llm", stop=True))


def test_a_cancelled_request_leaves_the_others_alone(server: Server):
    expected = server.generate(text_input="Count", max_tokens=300, end_id=-1)["text_output"]
    answers: list[str] = []
    stays = threading.Thread(
        target=lambda: answers.append(server.generate(text_input="Count", max_tokens=300, end_id=-1)["text_output"])
    )
    client, _ = start_grpc_stream(server, server.name, **LONG, stream=True)
    stays.start()
    client.stop_stream(cancel_requests=True)
    stays.join()
    assert answers == [expected]


def test_a_hundred_streams_cancelled_at_once_leave_nothing_behind(server: Server):
    clients = []
    for _ in range(8):
        client = grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
        client.start_stream(lambda result, error: None)
        for _ in range(13):
            client.async_stream_infer(
                server.name, tensors(grpcclient, {**LONG, "num_return_sequences": 1, "stream": True})
            )
        clients.append(client)
    wait_for_active(server, 9 + 1)  # the last one has left the queue and waits for a slot
    for client in clients:
        client.stop_stream(cancel_requests=True)
    wait_for_active(server, 0, seconds=30)
    assert server.generate(text_input="The capital of France is", max_tokens=8)["text_output"].startswith(" Paris")
