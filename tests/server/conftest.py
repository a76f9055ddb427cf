"""One real tritonserver with the demo model for the whole session; its log is shown with a test that fails."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import engines
import pytest
from running_server import ROOT, Server

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


@pytest.fixture(scope="session")
def session_server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(repository, tmp_path_factory.mktemp("server") / "log") as server:
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
