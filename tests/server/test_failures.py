"""The engine's process dies: everybody is told, and the server ends so that its platform starts a new one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_server import Server, ServerError

LONG = {"text_input": "Count", "max_tokens": 1000, "end_id": -1, "temperature": 1.0, "num_return_sequences": 6}


@pytest.fixture
def own_server(repository: Path, tmp_path: Path) -> Iterator[Server]:
    server = Server(repository, tmp_path / "log", ("--exit-timeout=5",))
    yield server.wait_until_ready()
    server.stop()


def test_when_the_engine_dies_every_request_fails_at_once_and_the_server_ends(own_server: Server):
    failures: list[tuple[float, str]] = []

    def ask(call) -> None:
        try:
            call()
        except Exception as error:
            failures.append((time.monotonic(), str(error)))

    calls = [
        lambda: list(own_server.stream_grpc(**LONG, stream=True)),
        lambda: own_server.infer_http(**LONG),
        lambda: own_server.generate(**LONG),
    ]
    threads = [threading.Thread(target=ask, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    while own_server.active_requests() < 8:
        time.sleep(0.01)
    killed = time.monotonic()
    os.kill(own_server.pid_of("openvino_worker.py"), signal.SIGKILL)
    for thread in threads:
        thread.join(timeout=30)
    assert len(failures) == len(calls)
    assert all(at - killed < 5 for at, _ in failures)  # 0.1 s on an idle machine
    assert all("the engine failed and must be restarted" in sentence for _, sentence in failures)
    own_server.process.wait(timeout=30)


def test_the_engine_ends_with_its_server(own_server: Server):
    pid = own_server.pid_of("openvino_worker.py")
    own_server.process.kill()
    own_server.process.wait(timeout=10)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_a_refused_request_takes_nothing_with_it(own_server: Server):
    with pytest.raises(ServerError, match="temperature is -1"):
        own_server.generate(text_input="x", temperature=-1.0)
    assert own_server.stop() == 0
