"""Every request gets exactly one end, whatever happens, and what it held is free again.

With a synthetic engine, whose requests last as long as the tests want: 20 tokens a second in four slots.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import tritonclient.grpc as grpcclient
from running_server import Server, ServerError, tensors
from tritonclient.utils import InferenceServerException

SECONDS = 30
PROMPT = {"text_input": "Count", "max_tokens": 20}  # a second
LONG = {"text_input": "Count", "max_tokens": 4000}  # minutes


@pytest.fixture(scope="module")
def repository(build_synthetic: Callable[..., Path]) -> Path:
    return build_synthetic("tokens_per_second=20", "--max-batch-size", "4", "--max-seq-len", "9000")


@pytest.fixture(scope="module")
def shared(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(repository, tmp_path_factory.mktemp("log") / "log", ("--exit-timeout=2",)) as server:
        for ask in WAYS:  # what a first request opens stays open
            ask(server, **PROMPT | {"max_tokens": 1})
        yield server


# ---- the ways to ask, each giving (tokens, finish reason) ----------------------------------------------------------


def grpc_stream(server: Server, **values: Any) -> tuple[int, str]:
    """Fails unless there is exactly one final response, and nothing after it."""
    answers: queue.SimpleQueue = queue.SimpleQueue()
    tokens, reason, finals = 0, "", 0
    with grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        parameters = {"timeout": values.pop("timeout")} if "timeout" in values else {}
        client.async_stream_infer(
            server.name,
            tensors(grpcclient, {**values, "stream": True}),
            enable_empty_final_response=True,
            **parameters,
        )
        while not finals:
            result, error = answers.get(timeout=SECONDS)
            if error is not None:
                time.sleep(0.1)
                assert answers.empty()
                raise ServerError(error.message(), error.status())
            response = result.get_response()
            finals += response.parameters["triton_final_response"].bool_param
            if response.outputs:
                tokens += int(result.as_numpy("num_output_tokens").item())
                reason = result.as_numpy("finish_reason").item().decode()
        time.sleep(0.1)
        assert answers.empty()
    return tokens, reason


def http_stream(server: Server, **values: Any) -> tuple[int, str]:
    events = server.generate_stream(**values, stream=True)
    if "error" in events[-1]:
        raise ServerError(events[-1]["error"])
    assert [event["finish_reason"] for event in events[:-1]] == [""] * (len(events) - 1)
    return sum(event["num_output_tokens"] for event in events), events[-1]["finish_reason"]


def generate(server: Server, **values: Any) -> tuple[int, str]:
    answer = server.generate(**values)
    return answer["num_output_tokens"], answer["finish_reason"]


def infer(server: Server, **values: Any) -> tuple[int, str]:
    with grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        parameters = {"timeout": values.pop("timeout")} if "timeout" in values else {}
        try:
            result = client.infer(server.infer_name, tensors(grpcclient, values), client_timeout=SECONDS, **parameters)
        except InferenceServerException as error:
            raise ServerError(error.message(), error.status()) from None
    return int(result.as_numpy("num_output_tokens").item()), result.as_numpy("finish_reason").item().decode()


WAYS = [grpc_stream, http_stream, generate, infer]
Way = Callable[..., tuple[int, str]]
every_way = pytest.mark.parametrize("ask", WAYS)


# ---- what is there before and after --------------------------------------------------------------------------------


def held(server: Server) -> dict[str, float]:
    """Slots, KV blocks, threads and open files; of all processes."""
    processes = psutil.Process(server.process.pid).children(recursive=True)
    return {
        "active": server.active_requests(),
        "blocks": server.metric("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="used"),
        "processes": len(processes),
        "threads of models": sum(p.num_threads() for p in processes if p.name().startswith("triton_python")),
        "files of models": sum(p.num_fds() for p in processes if p.name().startswith("triton_python")),
    }


def wait_for(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)


def held_at_rest(server: Server) -> dict[str, float]:
    """What is held when it has not changed for half a second: a slow machine takes its time to open and to close."""
    wait_for(lambda: server.active_requests() == 0)
    last, since = held(server), time.monotonic()
    deadline = since + SECONDS
    while time.monotonic() - since < 0.5:
        assert time.monotonic() < deadline, f"it does not come to rest: {last}"
        time.sleep(0.05)
        if (now := held(server)) != last:
            last, since = now, time.monotonic()
    return last


@pytest.fixture
def nothing_leaks(shared: Server) -> Iterator[None]:
    before = held_at_rest(shared)
    yield
    deadline = time.monotonic() + SECONDS
    while (after := held_at_rest(shared)) != before:
        assert time.monotonic() < deadline, f"held before {before}, after {after}"


def ended(server: Server, reason: str) -> float:
    return server.metric("triton_trtllm_requests_total", finish_reason=reason)


@every_way
def test_length(shared: Server, nothing_leaks: None, ask: Way):
    assert ask(shared, **PROMPT) == (20, "length")


@every_way
def test_stop_word(shared: Server, nothing_leaks: None, ask: Way):
    tokens, reason = ask(shared, **PROMPT | {"max_tokens": 400}, stop_words=["."])
    assert reason == "stop"
    assert tokens < 400


@every_way
def test_deadline(shared: Server, nothing_leaks: None, ask: Way):
    before, started = ended(shared, "timeout"), time.monotonic()
    tokens, reason = ask(shared, **LONG, timeout=800_000)
    assert reason == "timeout"
    assert 5 <= tokens <= 20
    assert time.monotonic() - started < 5  # 0.8 s and a tenth on an idle machine
    wait_for(lambda: ended(shared, "timeout") == before + 1)


@pytest.mark.parametrize("ask", [http_stream, generate])  # tritonclient sends numbers only
def test_a_deadline_that_is_no_time_is_refused(shared: Server, nothing_leaks: None, ask: Way):
    with pytest.raises(ServerError, match="timeout is 'soon'; it must be a whole number of microseconds"):
        ask(shared, **PROMPT, timeout="soon")


def test_cancelled_stream(shared: Server, nothing_leaks: None):
    before = ended(shared, "cancelled")
    client = grpcclient.InferenceServerClient(f"127.0.0.1:{shared.grpc_port}")
    came: queue.SimpleQueue = queue.SimpleQueue()
    client.start_stream(lambda result, error: came.put((result, error)))
    client.async_stream_infer(shared.name, tensors(grpcclient, {**LONG, "stream": True}))
    came.get(timeout=SECONDS)
    client.stop_stream(cancel_requests=True)
    client.close()
    wait_for(lambda: shared.active_requests() == 0, seconds=5)
    wait_for(lambda: ended(shared, "cancelled") == before + 1)


def test_vanished_http_client(shared: Server, nothing_leaks: None):
    connection = http.client.HTTPConnection("127.0.0.1", shared.http_port, timeout=SECONDS)
    connection.request("POST", f"/v2/models/{shared.name}/generate_stream", json.dumps({**LONG, "stream": True}))
    connection.getresponse().readline()
    connection.sock.close()
    connection.close()
    wait_for(lambda: shared.active_requests() == 0, seconds=5)


def test_thousand_connections_that_are_opened_and_dropped(shared: Server, nothing_leaks: None):
    """Half of them have asked something by then, and nobody reads the answer."""
    body = json.dumps({**PROMPT, "stream": True}).encode()
    request = b"POST /v2/models/synthetic/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    for number in range(1000):
        connection = http.client.HTTPConnection("127.0.0.1", shared.http_port, timeout=SECONDS)
        connection.connect()
        if number % 20 == 0:
            connection.sock.sendall(request + body)
        elif number % 2:
            connection.sock.sendall((request + body)[: number % len(request + body)])
        connection.close()
    assert generate(shared, **PROMPT) == (20, "length")


# ---- the server's own end ------------------------------------------------------------------------------------------


def ask_all(server: Server, pool: ThreadPoolExecutor, **values: Any) -> list[Future]:
    futures = [pool.submit(ask, server, **values) for ask in WAYS]
    wait_for(lambda: server.active_requests() >= len(WAYS))
    return futures


def test_sigterm_lets_all_finish(repository: Path, start_server: Callable[..., Server]):
    """gRPC streams too, whose next step tritonserver itself refuses from then on."""
    server = start_server(repository)
    with ThreadPoolExecutor() as pool:
        futures = ask_all(server, pool, **PROMPT | {"max_tokens": 60})
        server.process.terminate()
        assert [future.result(SECONDS) for future in futures] == [(60, "length")] * len(WAYS)
    assert server.process.wait(SECONDS) == 0


def test_sigterm_serves_those_that_wait_and_refuses_those_that_come(
    repository: Path, start_server: Callable[..., Server]
):
    server = start_server(repository)
    with ThreadPoolExecutor(20) as pool:
        read = server.metric("nv_inference_request_success", model="preprocessing")
        futures = [pool.submit(grpc_stream, server, **PROMPT) for _ in range(12)]
        # All have come: five are in the engine, one is at its door, the others wait in Triton's queue.
        wait_for(lambda: server.metric("nv_inference_pending_request_count", model="tensorrt_llm") >= 6)
        wait_for(lambda: server.metric("nv_inference_request_success", model="preprocessing") == read + 12)
        server.process.terminate()
        wait_for(lambda: "serve: ending" in server.log.read_text())
        with pytest.raises(ServerError, match="the server is shutting down; send the request again"):
            grpc_stream(server, **PROMPT)
        assert [future.result(SECONDS) for future in futures] == [(20, "length")] * 12
    assert server.process.wait(SECONDS) == 0


@every_way
def test_after_the_exit_timeout_requests_fail_and_the_server_ends(
    repository: Path, start_server: Callable[..., Server], ask: Way
):
    server = start_server(repository, "--exit-timeout=1")
    with ThreadPoolExecutor() as pool:
        future = pool.submit(ask, server, **LONG)
        wait_for(lambda: server.active_requests() == 1)
        server.process.terminate()
        with pytest.raises(ServerError, match="the server is shutting down; send the request again"):
            future.result(SECONDS)
    assert server.process.wait(SECONDS) == 1


# ---- ends of what the server is made of ----------------------------------------------------------------------------


def test_an_engine_that_hangs_is_given_up(
    request: pytest.FixtureRequest, tmp_path: Path, start_server: Callable[..., Server]
):
    """The process of the real CPU engine is stopped, which looks like a GPU that never answers."""
    import engines
    from conftest import CHECKPOINT

    output = tmp_path / "demo-gpt2"
    arguments = ["--model", str(CHECKPOINT), "--engine", "openvino", "--max-batch-size", "8", "--output", str(output)]
    assert engines.main([*arguments, "--hang-timeout", "1.5"]) == 0
    server = start_server(output)
    worker = server.pid_of("openvino_worker.py")
    with ThreadPoolExecutor() as pool:
        long = {"text_input": "Count", "max_tokens": 1000, "end_id": -1}
        futures = [pool.submit(ask, server, **long) for ask in WAYS]
        wait_for(lambda: server.active_requests() >= 3)
        os.kill(worker, signal.SIGSTOP)
        stopped = time.monotonic()
        for future in futures:
            with pytest.raises(ServerError, match=r"requests and has said nothing for 1\.5 s"):
                future.result(SECONDS)
        assert time.monotonic() - stopped < 15  # 2 s on an idle machine
    assert server.process.wait(SECONDS) != 0
    wait_for(lambda: not is_alive(worker))


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_server_that_is_killed_leaves_nothing_behind(repository: Path, start_server: Callable[..., Server]):
    server = start_server(repository)
    processes = [process.pid for process in psutil.Process(server.process.pid).children(recursive=True)]
    with ThreadPoolExecutor() as pool:
        futures = ask_all(server, pool, **LONG)
        os.kill(server.pid_of("bin/tritonserver"), signal.SIGKILL)
        assert server.process.wait(SECONDS) == 128 + signal.SIGKILL
        for future in futures:
            with pytest.raises(Exception, match=r"."):
                future.result(SECONDS)
    wait_for(lambda: not any(is_alive(pid) for pid in processes), seconds=10)


@pytest.mark.parametrize("model", ["tensorrt_llm", "postprocessing"])
def test_when_a_model_dies_that_every_answer_needs_all_clients_hear_of_it(
    repository: Path, start_server: Callable[..., Server], model: str
):
    server = start_server(repository)
    with ThreadPoolExecutor() as pool:
        futures = ask_all(server, pool, **LONG)
        os.kill(server.pid_of(f"{model}/1/model.py"), signal.SIGKILL)
        for future in futures:
            with pytest.raises(Exception, match=r".") as caught:
                future.result(SECONDS)
            assert not isinstance(caught.value, TimeoutError)
    assert server.process.wait(SECONDS) == 70
    assert f"the process of the model '{model}'" in server.log.read_text()


@pytest.mark.parametrize("model", ["preprocessing", "synthetic_infer"])
def test_when_another_model_dies_what_can_finish_does(
    repository: Path, start_server: Callable[..., Server], model: str
):
    server = start_server(repository)
    with ThreadPoolExecutor() as pool:
        futures = ask_all(server, pool, **PROMPT | {"max_tokens": 60})
        os.kill(server.pid_of(f"{model}/1/model.py"), signal.SIGKILL)
        for ask, future in zip(WAYS, futures, strict=True):
            if ask is infer and model == "synthetic_infer":
                with pytest.raises(ServerError):
                    future.result(SECONDS)
            else:
                assert future.result(SECONDS) == (60, "length")
    assert server.process.wait(SECONDS) == 70


def test_a_full_disk_for_the_log_disturbs_nobody(repository: Path, start_server: Callable[..., Server]):
    server = start_server(repository, "--log-file=/dev/full", "--log-verbose=1")
    for ask in WAYS:
        assert ask(server, **PROMPT) == (20, "length")
    assert server.stop() == 0


# ---- models that are loaded anew -----------------------------------------------------------------------------------


def post(server: Server, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=SECONDS)
    connection.request("POST", f"/v2/repository/models/{path}", "{}")
    response = connection.getresponse()
    assert response.status == 200, response.read()
    connection.close()


def test_a_model_that_is_loaded_anew_finishes_what_it_had(repository: Path, start_server: Callable[..., Server]):
    server = start_server(repository, "--", "--model-control-mode=explicit", "--load-model=*")
    with ThreadPoolExecutor(2 * len(WAYS)) as pool:
        before = ask_all(server, pool, **PROMPT | {"max_tokens": 40})
        post(server, "tensorrt_llm/load")
        after = [pool.submit(ask, server, **PROMPT) for ask in WAYS]
        assert [future.result(SECONDS) for future in before] == [(40, "length")] * len(WAYS)
        assert [future.result(SECONDS) for future in after] == [(20, "length")] * len(WAYS)
    wait_for(lambda: server.active_requests() == 0)
    wait_for(lambda: ended(server, "length") == 2 * len(WAYS))
    for path in ("preprocessing/load", "postprocessing/load", f"{server.infer_name}/load"):
        post(server, path)
    for ask in WAYS:
        assert ask(server, **PROMPT) == (20, "length")
    assert server.stop() == 0


def test_a_model_that_is_unloaded_finishes_what_it_had(repository: Path, start_server: Callable[..., Server]):
    server = start_server(repository, "--", "--model-control-mode=explicit", "--load-model=*")
    with ThreadPoolExecutor() as pool:
        futures = ask_all(server, pool, **PROMPT | {"max_tokens": 40})
        threads = [
            threading.Thread(target=post, args=(server, f"{name}/unload")) for name in (server.name, "tensorrt_llm")
        ]
        for thread in threads:
            thread.start()
        assert [future.result(SECONDS) for future in futures] == [(40, "length")] * len(WAYS)
        for thread in threads:
            thread.join(SECONDS)
    with pytest.raises(ServerError, match=f"'{server.name}'"):
        generate(server, **PROMPT)
    post(server, "tensorrt_llm/load")
    post(server, f"{server.name}/load")
    for ask in WAYS:
        assert ask(server, **PROMPT) == (20, "length")
    assert server.stop() == 0
