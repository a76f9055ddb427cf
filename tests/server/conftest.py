"""One real tritonserver with the demo model for each engine kind; its log is shown with a test that fails.

The kinds for NVIDIA GPUs run on a strict double of TensorRT-LLM (tests/fakes/tensorrt_llm), everything else is real.
"""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import engines
import pytest
import trtllm_environment
from running_server import ROOT, Server
from trtllm_environment import TrtllmEnvironment

CHECKPOINT = ROOT / "scripts/demo_checkpoint/demo-gpt2"
PROMPTS = ROOT / "scripts/demo_checkpoint/prompts.jsonl"


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's repository, built as a user builds it; the engine store is the user's own, to be quick."""
    output = tmp_path_factory.mktemp("repositories") / "demo-gpt2"
    code = engines.main(
        ["--model", str(CHECKPOINT), "--engine", "openvino", "--max-batch-size", "8", "--output", str(output)]
    )
    assert code == 0
    return output


@pytest.fixture(scope="session")
def trtllm(tmp_path_factory: pytest.TempPathFactory) -> TrtllmEnvironment:
    """Four H100s and TensorRT-LLM 1.2.1. Its PyTorch backend has GPT-2 beside what it really has: the demo model."""
    folder = tmp_path_factory.mktemp("trtllm")
    return trtllm_environment.make(folder / "environment", pytorch_also=("GPT2LMHeadModel",))


BuildOnGpus = Callable[..., Path]


@pytest.fixture(scope="session")
def build_on_gpus(trtllm: TrtllmEnvironment, tmp_path_factory: pytest.TempPathFactory) -> BuildOnGpus:
    """Builds a repository of the demo model: an engine kind and further options of build/engines.py."""
    store = tmp_path_factory.mktemp("store")

    def build(kind: str, *options: str, environment: TrtllmEnvironment = trtllm) -> Path:
        output = tmp_path_factory.mktemp(kind) / "demo-gpt2"
        command = [environment.python, ROOT / "build/engines.py", "--model", CHECKPOINT, "--engine", kind]
        command += ["--max-batch-size", "8", "--cache-dir", store, "--output", output, *options]
        done = subprocess.run(command, env=environment.variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return output

    return build


BuildSynthetic = Callable[..., Path]


@pytest.fixture(scope="session")
def build_synthetic(tmp_path_factory: pytest.TempPathFactory) -> BuildSynthetic:
    """Builds a repository with a synthetic engine: `rates` as in --synthetic, further options of build/engines.py."""

    def build(rates: str, *options: str) -> Path:
        output = tmp_path_factory.mktemp("synthetic") / "synthetic"
        command = ["--model", str(CHECKPOINT), "--engine", "synthetic", "--synthetic", rates, "--output", str(output)]
        assert engines.main([*command, "--served-name", "synthetic", *options]) == 0
        return output

    return build


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server of the test's own, to end as it likes: `start_server(repository, *options)`. It is ready."""
    numbers = itertools.count()
    with ExitStack() as servers:

        def start(repository: Path, *options: str) -> Server:
            return servers.enter_context(Server(repository, tmp_path / f"log{next(numbers)}", options))

        yield start


# Engine kind -> how the session's engine of it is built. Every test of `server` runs with each.
KINDS = {"openvino": (), "tensorrt": ("--tp", "2", "--pp", "2"), "pytorch": ("--tp", "2")}


@pytest.fixture(scope="session", params=KINDS)
def session_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    if request.param == "openvino":
        server = Server(request.getfixturevalue("repository"), log)
    else:
        environment = request.getfixturevalue("trtllm")
        repository = request.getfixturevalue("build_on_gpus")(request.param, *KINDS[request.param])
        server = Server(repository, log, environment=environment.variables, python=environment.python)
    with server:
        yield server


@pytest.fixture
def server(session_server: Server, request: pytest.FixtureRequest) -> Iterator[Server]:
    start = session_server.log.stat().st_size
    yield session_server
    with session_server.log.open() as log:
        log.seek(start)
        if text := log.read():
            print(f"---- the server's log during this test ----\n{text}")


@pytest.fixture(scope="session")
def examples() -> list[dict]:
    """Prompts with the greedy answers that transformers gives."""
    return [json.loads(line) for line in PROMPTS.read_text().splitlines()]
