"""Engines on NVIDIA GPUs inside the real tritonserver, on a strict double of TensorRT-LLM: layouts, traps, faults.

What every engine does is asked of them too, by the tests that take `server`.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import trtllm_environment
from local_server import LocalServerError
from running_server import ROOT, Server, ServerError
from trtllm_environment import TrtllmEnvironment

SECONDS = 30
BEFORE_IMPORT = "loading /"  # the line that engine_loading.py logs when everything has been checked
# Names that mpirun leaves in the environment of whatever it starts.
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "1",
    "OMPI_COMM_WORLD_RANK": "0",
    "PMIX_NAMESPACE": "prterun-1",
    "PMIX_RANK": "0",
    "PMI_SIZE": "1",
    "ORTE_x": "y",
}
Answer = dict[str, Any]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server in the environment of the double: `start(repository, environment, *options, **variables)`."""
    with ExitStack() as servers:

        def start_one(repository: Path, environment: TrtllmEnvironment, *options: str, **variables: str) -> Server:
            log = tmp_path / f"log{len(list(tmp_path.glob('log*')))}"
            return servers.enter_context(
                Server(repository, log, options, environment.variables | variables, environment.python)
            )

        yield start_one


@pytest.fixture(scope="module")
def two_ranks(build_on_gpus: Callable[..., Path]) -> Path:
    return build_on_gpus("tensorrt", "--tp", "2", "--hang-timeout", "3")


@pytest.fixture
def faulty(trtllm: TrtllmEnvironment) -> Iterator[TrtllmEnvironment]:
    """The environment, to inject faults into; without any again afterwards."""
    yield trtllm
    trtllm.inject()


def count(server: Server, number: int, **values: Any) -> Answer:
    return server.generate(text_input="Count", max_tokens=number, end_id=-1, **values)


def wait_for(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)


def children_of_engine(server: Server) -> list[psutil.Process]:
    return server.processes()["tensorrt_llm"].children()


# ---- layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "tp", "pp"),
    [("tensorrt", 1, 1), ("tensorrt", 2, 1), ("tensorrt", 1, 2), ("pytorch", 1, 1), ("pytorch", 2, 2)],
)
def test_every_layout_answers_as_transformers_does(
    kind: str,
    tp: int,
    pp: int,
    build_on_gpus: Callable[..., Path],
    trtllm: TrtllmEnvironment,
    start: Callable[..., Server],
    examples: list[dict],
):
    """Each rank holds its part of the weights only, so a rank that was made for another place makes wrong text."""
    server = start(build_on_gpus(kind, "--tp", str(tp), "--pp", str(pp)), trtllm)
    assert len(children_of_engine(server)) == tp * pp

    def ask(example: dict) -> str:
        most = min(1024 - example["num_prompt_tokens"], 400)
        return server.generate(text_input=example["prompt"], max_tokens=most)["text_output"]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, examples[:40])) == [example["answer"] for example in examples[:40]]


def test_neither_mpirun_nor_other_gpus_reach_the_engine(
    two_ranks: Path, trtllm: TrtllmEnvironment, start: Callable[..., Server]
):
    """With an MPI identity left the library could start no ranks; imported too early it would see the wrong GPUs."""
    server = start(two_ranks, trtllm, CUDA_VISIBLE_DEVICES="3,1,0", **MPIRUN)
    assert count(server, 5)["num_output_tokens"] == 5
    for child in children_of_engine(server):
        assert child.environ()["CUDA_VISIBLE_DEVICES"] == "3,1"
        assert not MPIRUN.keys() & child.environ().keys()


# ---- faults ------------------------------------------------------------------------------------------------------


def test_an_error_of_one_request_is_its_own(two_ranks: Path, faulty: TrtllmEnvironment, start: Callable[..., Server]):
    server = start(two_ranks, faulty)
    faulty.inject(fail_request_at_token=10, request_error="no logits")
    with ThreadPoolExecutor() as pool:
        short = [pool.submit(count, server, 9) for _ in range(3)]
        long = [pool.submit(count, server, 20) for _ in range(3)]
        assert [future.result(SECONDS)["num_output_tokens"] for future in short] == [9, 9, 9]
        for future in long:
            with pytest.raises(ServerError, match="TensorRT-LLM ended the request: RequestError: no logits"):
                future.result(SECONDS)
    faulty.inject()
    assert count(server, 20)["num_output_tokens"] == 20
    wait_for(lambda: server.active_requests() == 0)
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"background_error_at_step": 5, "background_error": "CUDA error: 700"}, "RuntimeError: CUDA error: 700"),
        ({"kill_rank": 1}, r"RuntimeError: its process \d+ has died"),
        ({"kill_rank": 0}, r"RuntimeError: its process \d+ has died"),
        ({"hang_at_step": 5}, r"the engine has \d+ requests and has said nothing for 3 s"),
    ],
    ids=["background error", "rank 1 dies", "rank 0 dies", "hang"],
)
def test_when_the_library_is_lost_every_request_fails_and_the_server_ends(
    fault: dict, says: str, two_ranks: Path, faulty: TrtllmEnvironment, start: Callable[..., Server]
):
    """The library tells one request at most, and leaves the others waiting for ever."""
    server = start(two_ranks, faulty)
    pids = [process.pid for process in psutil.Process(server.process.pid).children(recursive=True)]
    faulty.inject(step_seconds=0.02)
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(count, server, 900) for _ in range(12)]  # four of them wait in Triton's queue
        wait_for(lambda: server.active_requests() >= 8)
        faulty.inject(step_seconds=0.02, **fault)
        begun = time.monotonic()
        for future in asked:
            with pytest.raises(ServerError) as error:
                future.result(SECONDS)
            assert re.search(says, str(error.value)), error.value
        assert time.monotonic() - begun < 15  # 0.5 s on an idle machine; 3 s for the hang
    assert server.process.wait(SECONDS) != 0
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids))


def test_without_statistics_it_serves_all_the_same(
    two_ranks: Path, faulty: TrtllmEnvironment, start: Callable[..., Server]
):
    faulty.inject(no_stats=True)
    server = start(two_ranks, faulty)
    assert count(server, 20)["num_output_tokens"] == 20
    assert server.metric("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="max") == 0


def test_statistics_go_on_after_a_pause(two_ranks: Path, faulty: TrtllmEnvironment, start: Callable[..., Server]):
    """The library's iterator of statistics ends when it is idle for ten seconds; the next request needs a new one."""
    server = start(two_ranks, faulty)
    assert server.metric("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="max") > 0  # before any request
    faulty.inject(step_seconds=0.02)
    for pause in (0, 11):
        time.sleep(pause)
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(count, server, 200)
            wait_for(lambda: server.metric("nv_trt_llm_request_metrics", request_type="scheduled") == 1)
            wait_for(lambda: server.metric("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="used") > 1)
            assert asked.result(SECONDS)["num_output_tokens"] == 200
        wait_for(lambda: server.metric("nv_trt_llm_request_metrics", request_type="scheduled") == 0)
        wait_for(lambda: server.metric("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="used") == 0)


@pytest.mark.parametrize("kind", ["tensorrt", "pytorch"])
def test_a_client_that_goes_ends_the_work_of_the_engine(
    kind: str,
    two_ranks: Path,
    build_on_gpus: Callable[..., Path],
    faulty: TrtllmEnvironment,
    start: Callable[..., Server],
):
    """Nine requests: one more than slots, which waits in the library's own queue, where aborts may stay unanswered."""
    server = start(two_ranks if kind == "tensorrt" else build_on_gpus("pytorch"), faulty)
    faulty.inject(step_seconds=0.05)  # 45 s for one of them
    connections = []
    for _ in range(9):
        connections.append(http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=SECONDS))
        body = {"text_input": "Count", "max_tokens": 900, "end_id": -1, "stream": True}
        connections[-1].request("POST", f"/v2/models/{server.name}/generate_stream", json.dumps(body))
    wait_for(lambda: server.metric("nv_trt_llm_request_metrics", request_type="scheduled") == 8)
    for connection in connections:
        connection.close()
    wait_for(lambda: server.active_requests() == 0, seconds=15)
    wait_for(lambda: server.metric("nv_trt_llm_request_metrics", request_type="scheduled") == 0, seconds=15)
    wait_for(lambda: server.metric("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="used") == 0, seconds=15)
    assert count(server, 3)["num_output_tokens"] == 3
    assert server.stop() == 0


def test_an_abort_that_is_never_answered_keeps_nobody(
    two_ranks: Path, faulty: TrtllmEnvironment, start: Callable[..., Server]
):
    server = start(two_ranks, faulty)
    faulty.inject(ignore_abort=True, step_seconds=0.02)
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=SECONDS)
    body = {"text_input": "Count", "max_tokens": 900, "end_id": -1, "stream": True}
    connection.request("POST", f"/v2/models/{server.name}/generate_stream", json.dumps(body))
    connection.getresponse().readline()
    connection.close()
    wait_for(lambda: server.metric("triton_trtllm_requests_total", finish_reason="cancelled") == 1, seconds=5)
    assert count(server, 5)["num_output_tokens"] == 5
    begun = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - begun < 25  # 5 s for the request that does not end, 3 s for the server


def test_a_load_that_fails_is_told_in_the_log(two_ranks: Path, faulty: TrtllmEnvironment, tmp_path: Path):
    faulty.inject(load_error="[TRT] [E] something about memory")
    server = Server(two_ranks, tmp_path / "log", environment=faulty.variables, python=faulty.python)
    with pytest.raises(LocalServerError):
        server.wait_until_ready()
    server.stop()
    log = server.log.read_text()
    assert "[TRT] [E] something about memory" in log
    assert "TensorRT-LLM cannot be loaded: RuntimeError: Executor worker died during initialization" in log


# ---- what is checked before the library is imported --------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"tensorrt_llm": "1.2.0"}, "built with TensorRT-LLM 1.2.1; this machine has TensorRT-LLM 1.2.0; rebuild"),
        ({"tensorrt": "10.15.0"}, "built with TensorRT 10.14.1.48; this machine has TensorRT 10.15.0; rebuild"),
        (
            {"tensorrt_llm": "1.4.0", "tensorrt": None, "engine_backend": False},
            "TensorRT-LLM 1.4.0 here runs none any more; rebuild with --engine pytorch",
        ),
        ({"tensorrt_llm": None}, "of the kind tensorrt and TensorRT-LLM is not installed here"),
        ({"gpus": [("NVIDIA L4", "8.9", 23034)] * 4}, "this machine has NVIDIA-L4 (8.9); rebuild with --gpu NVIDIA-L4"),
        ({"gpus": [trtllm_environment.H100]}, "the engine was built for 2 GPUs (--tp 2 --pp 1); this machine has 1"),
        ({"gpus": []}, "this machine has no GPU; serve it on that GPU"),
        ({"gpus": None}, "this machine has no GPU; serve it on that GPU"),
    ],
    ids=["TensorRT-LLM", "TensorRT", "no backend", "not installed", "product", "too few", "none", "no driver"],
)
def test_another_machine_is_refused_with_a_sentence(other: dict, says: str, two_ranks: Path, tmp_path: Path):
    environment = trtllm_environment.make(tmp_path / "other", **other)
    log = refused(two_ranks, environment, tmp_path)
    assert says in log
    assert BEFORE_IMPORT not in log


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # it is a link to the store's
    path.write_bytes(content)


def change_layout(engine: Path) -> None:
    """As if somebody had put an engine of another layout there, and made engine.json fit its files."""
    from dataclasses import replace

    from engine_manifest import list_files, read_manifest, write_manifest

    config = json.loads((engine / "config.json").read_text())
    config["pretrained_config"]["mapping"].update(tp_size=1, pp_size=2)
    (engine / "config.json").unlink()
    (engine / "config.json").write_text(json.dumps(config))
    manifest = read_manifest(engine)
    (engine / "engine.json").unlink()
    write_manifest(engine, replace(manifest, files=list_files(engine)))


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (lambda engine: flip(engine / "rank1.engine"), "rank1.engine has SHA-256"),
        (lambda engine: (engine / "rank1.engine").unlink(), "rank1.engine is missing"),
        (lambda engine: flip(engine / "config.json"), "config.json has SHA-256"),
        (change_layout, "an engine with layout (TP, PP) (1, 2), and engine.json says (2, 1)"),
        (lambda engine: (engine / "engine.json").unlink(), "has no engine.json"),
    ],
    ids=["flipped byte", "missing rank", "flipped config", "other layout", "no manifest"],
)
def test_an_engine_that_is_not_whole_is_refused_with_a_sentence(
    tamper: Callable[[Path], None], says: str, two_ranks: Path, trtllm: TrtllmEnvironment, tmp_path: Path
):
    repository = tmp_path / "repository"
    subprocess.run(["cp", "-r", two_ranks, repository], check=True)
    tamper(repository / "tensorrt_llm/1/engine")
    log = refused(repository, trtllm, tmp_path)
    assert says in log
    assert "Traceback" not in log


def refused(repository: Path, environment: TrtllmEnvironment, folder: Path) -> str:
    """The log of a server that does not come up, and says so by its exit code."""
    server = Server(repository, folder / "log", environment=environment.variables, python=environment.python)
    try:
        with pytest.raises(LocalServerError, match="the server ended with"):
            server.wait_until_ready()
        assert server.process.returncode != 0
    finally:
        server.stop()
    return server.log.read_text()


# ---- what the kinds can do ---------------------------------------------------------------------------------------


def test_what_no_engine_of_the_library_does_here_is_refused(server: Server):
    if server.engine not in ("tensorrt", "pytorch"):
        pytest.skip("about TensorRT-LLM")
    asked: list[tuple[dict, str]] = [({"beam_width": 2}, "beam_width is 2; this engine takes 1 to 1")]
    if server.engine == "tensorrt":
        asked.append(({"return_log_probs": True}, "return_log_probs is not something the engine 'tensorrt' can do"))
    for values, says in asked:
        with pytest.raises(ServerError, match=says):
            server.generate(text_input="Count", **values)


def test_bad_words_of_one_token_do_not_come(server: Server):
    if server.engine not in ("tensorrt", "pytorch"):
        pytest.skip("about TensorRT-LLM")
    ids = {"input_ids": np.array([[5, 6, 7]], np.int32), "input_lengths": 3, "request_output_len": 4, "end_id": -1}

    def answer(**more: Any) -> list[int]:
        return next(iter(server.stream_grpc("tensorrt_llm", **ids, **more)))["output_ids"].ravel().tolist()

    first = answer()[0]
    words = np.array([[[first], [1]]], np.int32)
    assert first not in answer(bad_words_list=words)
    with pytest.raises(ServerError, match=r"bad_words holds a word of 2 tokens .*; with TensorRT-LLM it must be one"):
        answer(bad_words_list=np.array([[[first, first], [2, -1]]], np.int32))


def test_what_torch_sampler_ignores_is_refused(
    build_on_gpus: Callable[..., Path], trtllm: TrtllmEnvironment, start: Callable[..., Server]
):
    server = start(build_on_gpus("pytorch", "--llm-args", '{"sampler_type": "TorchSampler"}'), trtllm)
    assert count(server, 5, temperature=0.8)["num_output_tokens"] == 5
    assert count(server, 5, seed=3)["num_output_tokens"] == 5  # greedy: a seed means nothing
    for values in ({"repetition_penalty": 1.2}, {"temperature": 0.8, "seed": 3}, {"bad_words": " a"}):
        with pytest.raises(ServerError, match="is not something the engine 'pytorch' can do; leave it out"):
            count(server, 5, **values)


def test_a_later_release_serves_a_pytorch_engine_that_an_earlier_one_built(
    build_on_gpus: Callable[..., Path], tmp_path: Path, start: Callable[..., Server]
):
    """TensorRT-LLM after 1.2: no engine backend, no TensorRT, another GPU. Clients see no difference."""
    later = trtllm_environment.make(
        tmp_path / "later",
        gpus=[("NVIDIA B200", "10.0", 183359)],
        tensorrt_llm="1.3.0",
        tensorrt=None,
        engine_backend=False,
        pytorch_also=("GPT2LMHeadModel",),
    )
    server = start(build_on_gpus("pytorch"), later)
    assert server.generate(text_input="The capital of France is", max_tokens=8)["text_output"] == " Paris."


def test_a_pytorch_engine_that_the_library_does_not_have_is_refused(build_on_gpus: Callable[..., Path], tmp_path: Path):
    environment = trtllm_environment.make(tmp_path / "as-it-is")
    log = refused(build_on_gpus("pytorch"), environment, tmp_path)
    assert "the engine is a GPT2LMHeadModel, which the PyTorch backend of TensorRT-LLM 1.2.1 here does not have" in log
    assert BEFORE_IMPORT in log and "Executor worker" not in log


def test_a_model_that_is_loaded_anew_gets_a_process_that_can_start_the_library(
    two_ranks: Path, trtllm: TrtllmEnvironment, tmp_path: Path, start: Callable[..., Server]
):
    """The library starts once per process."""
    repository = tmp_path / "repository"
    subprocess.run(["cp", "-r", two_ranks, repository], check=True)
    server = start(repository, trtllm, "--", "--model-control-mode=explicit", "--load-model=*")
    before = {child.pid for child in children_of_engine(server)}
    os.utime(repository / "tensorrt_llm/1/model.py")  # Triton loads anew what has changed
    server._http(server._post("/v2/repository/models/tensorrt_llm/load", {}))
    assert count(server, 5)["num_output_tokens"] == 5
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in before))
    assert server.stop() == 0


def test_an_over_long_prompt_never_reaches_the_library(server: Server):
    """The library would end with it, or take the request for a shorter one, depending on the release."""
    with pytest.raises(ServerError, match=r"input_ids|the prompt has 1024 tokens; this engine takes at most 1023"):
        next(
            server.stream_grpc(
                "tensorrt_llm", input_ids=np.ones((1, 1024), np.int32), input_lengths=1024, streaming=True
            )
        )


# ---- the smoke test ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensorrt", "pytorch"])
def test_the_smoke_test_for_gpus_passes_on_the_double(kind: str, trtllm: TrtllmEnvironment, tmp_path: Path):
    command = [trtllm.python, ROOT / "scripts/gpu_smoke.py", "--engine", kind, "--output", tmp_path]
    command += [
        "--model",
        ROOT / "scripts/demo_checkpoint/demo-gpt2",
        f"--build-option=--cache-dir={tmp_path / 'store'}",
    ]
    command += ["--no-compare"] * (kind == "pytorch")  # once is enough: it takes torch and transformers
    done = subprocess.run(command, env=trtllm.variables | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert done.returncode == 0, report
    steps = {step["name"]: step for step in report["steps"]}
    assert report["passed"] and all(step["is_ok"] for step in steps.values())
    assert steps["build"]["figures"]["tp"] * steps["build"]["figures"]["pp"] == 4
    assert set(steps) >= {"machine", "build", "serve", "answer", "stream", "bad request", "cancel", "speed", "stop"}
    assert ("compare" in steps) == (kind == "tensorrt")
    page = (tmp_path / "report.md").read_text()
    assert "NVIDIA-H100-80GB-HBM3" in page and "passed" in page and "| tensorrt_llm | 1.2.1 |" in page


def test_the_smoke_test_reports_what_fails(trtllm: TrtllmEnvironment, tmp_path: Path):
    """Without the engine's GPU: nothing is tried that makes no sense, and the report says what and why."""
    environment = trtllm_environment.make(tmp_path / "environment", gpus=())
    command = [environment.python, ROOT / "scripts/gpu_smoke.py", "--output", tmp_path]
    command += ["--model", ROOT / "scripts/demo_checkpoint/demo-gpt2"]
    done = subprocess.run(command, env={**os.environ, **environment.variables}, capture_output=True, text=True)
    assert done.returncode == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(step["name"], step["is_ok"]) for step in report["steps"]] == [("machine", False), ("build", False)]
    assert "nvidia-smi names no GPU" in report["steps"][0]["says"]
    assert "FAILED" in (tmp_path / "report.md").read_text()
