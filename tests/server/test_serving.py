"""Starting and stopping: scripts/serve.py, signals, ports, repositories that are not whole."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import serve
from running_server import ROOT, Server

LONG = {"text_input": "Count", "max_tokens": 1000, "end_id": -1}


@pytest.fixture
def own_server(repository: Path, tmp_path: Path):
    """A server of the test's own, to end as it likes."""
    servers = []

    def start(folder: Path = repository, *options: str) -> Server:
        servers.append(Server(folder, tmp_path / f"log{len(servers)}", options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def test_one_line_says_where_it_listens(own_server):
    server = own_server().wait_until_ready()
    deadline = time.monotonic() + 10
    while "serve: ready" not in server.log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    ready = [line for line in server.log.read_text().splitlines() if line.startswith("serve: ready")]
    assert len(ready) == 1
    for part in ("'demo-gpt2'", "'demo-gpt2_infer'", str(server.http_port), str(server.grpc_port)):
        assert part in ready[0]


def test_sigterm_lets_requests_finish_and_ends_with_0(own_server):
    server = own_server().wait_until_ready()
    answers: list = []
    pieces = threading.Thread(target=lambda: answers.extend(server.generate_stream(**LONG, stream=True)))
    whole = threading.Thread(target=lambda: answers.append(server.generate(**LONG)))
    pieces.start(), whole.start()
    while server.active_requests() < 2:
        time.sleep(0.01)
    assert server.stop() == 0
    pieces.join(), whole.join()
    assert sum(answer["num_output_tokens"] for answer in answers) == 2 * 1000
    assert [answer["finish_reason"] for answer in answers].count("length") == 2


def test_an_idle_server_ends_with_0(own_server):
    assert own_server().wait_until_ready().stop() == 0


def test_a_repository_works_wherever_it_is_moved(own_server, repository: Path, tmp_path: Path):
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(repository, moved)
    answer = own_server(moved).wait_until_ready().generate(text_input="The capital of France is", max_tokens=8)
    assert answer["text_output"].startswith(" Paris")


def test_a_flipped_byte_in_the_engine_is_named_and_nothing_is_served(own_server, repository: Path, tmp_path: Path):
    damaged = tmp_path / "damaged"
    shutil.copytree(repository, damaged)
    weights = damaged / "tensorrt_llm/1/engine/openvino_model.bin"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    server = own_server(damaged)
    assert server.process.wait(timeout=60) != 0
    assert "openvino_model.bin" in server.log.read_text()


def test_an_engine_of_a_newer_runtime_is_refused_with_both_versions(
    own_server, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TERMINATION_MESSAGE_PATH", str(tmp_path / "message"))
    newer = tmp_path / "newer"
    shutil.copytree(repository, newer)
    manifest = newer / "tensorrt_llm/1/engine/engine.json"
    content = json.loads(manifest.read_text())
    content["versions"]["openvino"] = "2099.1.0"
    manifest.write_text(json.dumps(content))
    server = own_server(newer)
    assert server.process.wait(timeout=60) != 0
    assert "2099.1" in server.log.read_text()
    sentence = (tmp_path / "message").read_text()  # the status of a Pod
    assert sentence.startswith("the engine was built with OpenVINO 2099.1.0; this machine has OpenVINO ")


# ---- mistakes on the command line --------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts/serve.py"), *arguments], capture_output=True, text=True, timeout=30
    )


def test_a_missing_repository_is_named_with_the_command_that_builds_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TERMINATION_MESSAGE_PATH", str(tmp_path / "message"))
    result = run(str(tmp_path / "nothing"))
    assert result.returncode == 2
    assert (tmp_path / "message").read_text() == result.stderr.strip()
    assert "is not a folder; build a repository with: python build/engines.py" in result.stderr


def test_a_folder_that_is_no_repository_is_named(tmp_path: Path):
    result = run(str(tmp_path))
    assert result.returncode == 2
    assert "has no repository.json" in result.stderr


def test_a_repository_of_another_version_is_refused(repository: Path, tmp_path: Path):
    older = tmp_path / "older"
    shutil.copytree(repository, older)
    feedback = older / "tensorrt_llm/1/feedback_channel.py"
    feedback.write_text(feedback.read_text().replace("def drain(", "def finish("))
    result = run(str(older))
    assert result.returncode == 2
    assert "was assembled by another version of this project; assemble it again" in result.stderr


def test_a_path_with_a_space_is_refused_since_triton_would_hang(repository: Path, tmp_path: Path):
    spaced = tmp_path / "else where"
    shutil.copytree(repository, spaced)
    result = run(str(spaced))
    assert result.returncode == 2
    assert "has ' ', and tritonserver cannot load a repository from there" in result.stderr


def test_a_taken_port_is_named(repository: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run(str(repository), "--http-port", str(taken.getsockname()[1]))
    assert result.returncode == 2
    assert "choose another --http-port" in result.stderr


def test_equal_ports_are_refused(repository: Path):
    result = run(str(repository), "--http-port", "8123", "--grpc-port", "8123")
    assert result.returncode == 2
    assert "must all be different" in result.stderr


def test_without_a_server_the_way_to_one_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(serve, "NGC_TRITONSERVER", tmp_path / "none")
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(serve.ServeError, match="make install"):
        serve.find_tritonserver(None)


def test_a_container_s_tritonserver_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    binary = tmp_path / "tritonserver"
    binary.write_text("")
    binary.chmod(0o755)
    monkeypatch.setattr(serve, "NGC_TRITONSERVER", binary)
    server = serve.find_tritonserver(None)
    assert server.binary == binary
    assert server.environment["PATH"].startswith(f"{Path(sys.executable).parent}:")  # its stubs take this Python


def test_ctrl_c_ends_the_server_and_nothing_is_left(own_server):
    server = own_server().wait_until_ready()
    processes = [process.pid for process in psutil.Process(server.process.pid).children(recursive=True)]
    assert len(processes) >= 6  # tritonserver, four models, the engine
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(timeout=60) == 0
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
