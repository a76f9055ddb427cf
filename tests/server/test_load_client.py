"""The load client as a user runs it, against a real server; its numbers against the server's own."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from free_ports import free_ports
from running_server import ROOT, Server
from schedules import parse_schedule, poisson_times
from tallies import COUNTED

END_SECONDS = 60
# Every answer has exactly its --output-tokens, and fits with its prompt into the 1024 tokens of the demo model.
EXACT = ("--end-id", "-1", "--input-tokens", "8")


@dataclass(frozen=True)
class Result:
    """What a run left behind. `document` is --json's, None when there is none."""

    code: int
    table: str
    errors: str
    document: dict[str, Any] | None


class Client:
    """`python clients/load.py` against a gRPC port, with --json."""

    def __init__(self, port: int, folder: Path, *arguments: str):
        self._json = folder / "result.json"
        command = [sys.executable, str(ROOT / "clients/load.py"), "--url", f"127.0.0.1:{port}", *arguments]
        self.process = subprocess.Popen(
            [*command, "--json", str(self._json)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def end(self) -> Result:
        try:
            table, errors = self.process.communicate(timeout=END_SECONDS)
        finally:
            self.process.kill()
        print(table, errors, sep="\n")
        document = json.loads(self._json.read_text()) if self._json.exists() else None
        return Result(self.process.returncode, table, errors, document)


@pytest.fixture
def load(server: Server, tmp_path: Path) -> Callable[..., Result]:
    return lambda *arguments: Client(server.grpc_port, tmp_path, *arguments).end()


def successes(server: Server, model: str) -> int:
    deadline = time.monotonic() + 10
    while True:
        try:
            return int(server.metric("nv_inference_request_success", model=model))
        except OSError:  # a server that has just become ready listens for metrics a moment later
            assert time.monotonic() < deadline
            time.sleep(0.05)


def wait_until(is_so: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.05)


class Scrape:
    """The metrics of a client that runs."""

    def __init__(self, port: int):
        self._url = f"http://127.0.0.1:{port}/metrics"

    def value(self, sample: str) -> float:
        """Of `name` or `name{labels}`; 0 while there is no such sample, or no client yet."""
        try:
            text = urllib.request.urlopen(self._url, timeout=10).read().decode()
        except OSError:
            return 0.0
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{sample} ")), 0.0)


# ---- the loads -------------------------------------------------------------------------------------------------------


def test_a_closed_loop_counts_what_the_server_counts_and_all_its_reports_agree(
    server: Server, load: Callable[..., Result], tmp_path: Path
):
    before = successes(server, server.name)
    files = ("--csv", str(tmp_path / "c.csv"), "--plot", str(tmp_path / "p.png"))
    result = load("--concurrency", "3", "--requests", "40", "--output-tokens", "12", *EXACT, *files)
    assert result.code == 0
    document = result.document
    assert document["requests"]["sent"] == document["requests"]["ok"] == 40
    assert document["tokens"] == 40 * 12
    wait_until(lambda: successes(server, server.name) - before == 40)

    latencies = document["latency_seconds"]
    assert latencies["time_to_first_token"]["count"] == latencies["end_to_end"]["count"] == 40
    assert latencies["response_gap"]["count"] == document["responses"] - 40
    assert latencies["time_to_first_token"]["max"] < latencies["end_to_end"]["max"]
    assert document["rates"]["tokens_per_second"] * document["seconds"] == pytest.approx(480)

    with (tmp_path / "c.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in COUNTED:
        assert sum(int(row[name]) for row in rows) == sum(document["per_second"][name])
    assert sum(int(row["tokens"]) for row in rows) == 480
    assert float(rows[-1]["time_seconds"]) == pytest.approx(document["seconds"], abs=0.5)

    assert "requests     40 sent, 40 ok, 0 failed" in result.table
    assert f"tokens       480 in {document['responses']} responses" in result.table
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in tmp_path.iterdir()} == {"result.json", "c.csv", "p.png"}


def test_an_open_loop_sends_what_its_seed_says(load: Callable[..., Result]):
    result = load("--rate", "10@1s,40@1s", "--seed", "5", "--output-tokens", "uniform:2:6", *EXACT)
    assert result.code == 0
    expected = list(poisson_times(parse_schedule("10@1s,40@1s"), Random("5 arrivals")))
    assert result.document["requests"]["sent"] == result.document["requests"]["ok"] == len(expected)
    assert result.document["client"]["lateness_seconds"]["count"] == len(expected)
    assert result.document["seconds"] >= 2
    assert "client late" in result.table


def test_plain_infer_asks_the_other_model(server: Server, load: Callable[..., Result]):
    before = successes(server, server.infer_name)
    result = load("--concurrency", "2", "--requests", "6", "--no-stream", "--output-tokens", "5", *EXACT)
    assert result.code == 0
    assert result.document["model"] == server.infer_name
    assert (result.document["responses"], result.document["tokens"]) == (6, 30)
    assert result.document["latency_seconds"]["time_to_first_token"]["count"] == 0
    assert result.document["latency_seconds"]["end_to_end"]["count"] == 6
    wait_until(lambda: successes(server, server.infer_name) - before == 6)


def test_a_trace_is_asked_as_it_was_recorded(load: Callable[..., Result], tmp_path: Path):
    requests = [
        {"time": 0.0, "prompt": "Hello", "output_tokens": 3},
        {"time": 0.2, "input_tokens": 9, "output_tokens": 4},
        {"time": 1.3, "prompt": "Count"},
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(request) + "\n" for request in requests))
    result = load("--trace", str(trace), "--output-tokens", "10", "--end-id", "-1")
    assert result.code == 0
    assert result.document["requests"]["ok"] == 3
    assert result.document["tokens"] == 3 + 4 + 10
    assert result.document["seconds"] > 1.3


def test_cancelled_streams_are_counted_apart_and_leave_the_engine(server: Server, load: Callable[..., Result]):
    long = ("--output-tokens", "400", "--temperature", "1", *EXACT)
    result = load("--concurrency", "4", "--requests", "12", "--cancel-ratio", "0.5", "--seed", "3", *long)
    assert result.code == 0
    requests = result.document["requests"]
    assert requests["cancelled"] > 0
    assert requests["ok"] + requests["cancelled"] == requests["sent"] == 12
    assert requests["failed"] == 0
    assert requests["ok"] * 400 < result.document["tokens"] < 12 * 400
    assert f"{requests['cancelled']} cancelled" in result.table
    wait_until(lambda: server.active_requests() == 0)


def test_requests_that_time_out_are_cancelled(server: Server, load: Callable[..., Result]):
    long = ("--output-tokens", "900", "--temperature", "1", *EXACT)
    result = load("--concurrency", "8", "--requests", "8", "--timeout", "100ms", *long)
    assert result.document["errors"] == {"timeout": 8}
    assert result.document["latency_seconds"]["end_to_end"]["count"] == 0
    wait_until(lambda: server.active_requests() == 0)


# ---- metrics and signals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_end_and_metrics_were_right_meanwhile(server: Server, tmp_path: Path, number: int):
    (port,) = free_ports(1)
    tokens_each = 900  # so long that both users are in the middle of an answer when the signal comes
    arguments = ("--concurrency", "2", "--output-tokens", str(tokens_each), *EXACT, "--prometheus-port", str(port))
    client, scrape = Client(server.grpc_port, tmp_path, *arguments, "--grace", "50s"), Scrape(port)
    wait_until(lambda: scrape.value('load_client_requests_total{outcome="ok"}') >= 2)
    assert scrape.value("load_client_requests_in_flight") == 2
    assert scrape.value("load_client_offered_users") == 2
    assert scrape.value("load_client_time_to_first_token_seconds_count") >= 2
    tokens = scrape.value("load_client_tokens_total")
    client.process.send_signal(number)
    result = client.end()
    assert result.code == 0
    requests = result.document["requests"]
    assert requests["ok"] == requests["sent"]
    assert requests["cut_off"] == 0
    assert result.document["tokens"] == tokens_each * requests["ok"] >= tokens
    assert result.document["ended_by_signal"] is True
    assert "stopping: 2 requests in flight have 50 s to end" in result.errors


def test_what_takes_longer_than_the_grace_is_cut_off(server: Server, tmp_path: Path):
    (port,) = free_ports(1)
    arguments = ("--concurrency", "4", "--output-tokens", "900", "--temperature", "1", *EXACT)
    client = Client(server.grpc_port, tmp_path, *arguments, "--grace", "0", "--prometheus-port", str(port))
    wait_until(lambda: Scrape(port).value("load_client_tokens_total") > 0)
    client.process.send_signal(signal.SIGTERM)
    result = client.end()
    assert result.code == 0
    requests = result.document["requests"]
    assert requests["cut_off"] == 4
    assert requests["ok"] + 4 == requests["sent"]
    assert "4 requests were still in flight at the end and were cut off after --grace 0 s" in result.table
    wait_until(lambda: server.active_requests() == 0)


# ---- trouble ---------------------------------------------------------------------------------------------------------


def test_a_wrong_model_is_refused_with_those_that_are_there(server: Server, load: Callable[..., Result]):
    result = load("--rate", "1", "--model", "demo-gtp2")
    assert result.code == 1
    assert "the server has no model 'demo-gtp2' ready; perhaps you meant 'demo-gpt2'; ready are: " in result.errors
    assert server.infer_name in result.errors
    assert result.document is None


def test_nobody_there_is_said_with_the_address(tmp_path: Path):
    (port,) = free_ports(1)
    result = Client(port, tmp_path, "--rate", "1").end()
    assert result.code == 1
    assert f"no answer from 127.0.0.1:{port} by gRPC (Connection refused); start a server with" in result.errors
    assert result.errors.count("\n") == 1


def test_a_request_that_the_service_cannot_take_is_a_bad_one(load: Callable[..., Result]):
    result = load("--concurrency", "1", "--requests", "2", "--output-tokens", "100000")
    assert result.code == 1
    assert result.document["errors"] == {"bad_request": 2}
    assert "it must be 1 to" in result.document["error_examples"]["bad_request"]
    assert "load: no request was answered" in result.errors


@pytest.fixture
def small_server(repository: Path, tmp_path: Path) -> Iterator[Server]:
    """Only one request may wait for the engine."""
    copy = tmp_path / "small"
    shutil.copytree(repository, copy)
    path = copy / "tensorrt_llm/1/settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_queue_size": 1}))
    server = Server(copy, tmp_path / "log", ("--exit-timeout=5",))
    try:
        yield server.wait_until_ready()
    finally:
        server.stop()


def test_refusals_and_a_server_that_dies_are_counted_and_survived(small_server: Server, tmp_path: Path):
    long = ("--output-tokens", "200", "--temperature", "1", *EXACT)
    full = Client(small_server.grpc_port, tmp_path, "--concurrency", "30", "--requests", "60", "--retries", "1", *long)
    result = full.end()
    assert result.code == 0
    assert set(result.document["errors"]) == {"refused"}
    assert result.document["requests"]["retries"] >= result.document["errors"]["refused"]
    assert result.document["requests"]["ok"] + result.document["errors"]["refused"] == 60
    assert "the server is busy: 1 requests wait" in result.document["error_examples"]["refused"]

    (port,) = free_ports(1)
    arguments = ("--concurrency", "4", "--output-tokens", "50", *EXACT, "--prometheus-port", str(port))
    client, scrape = Client(small_server.grpc_port, tmp_path, *arguments), Scrape(port)
    wait_until(lambda: scrape.value('load_client_requests_total{outcome="ok"}') >= 4)
    os.kill(small_server.pid_of("bin/tritonserver"), signal.SIGKILL)
    wait_until(lambda: scrape.value('load_client_requests_total{outcome="unavailable"}') >= 8)
    client.process.send_signal(signal.SIGTERM)
    result = client.end()
    assert result.code == 0
    requests, errors = result.document["requests"], result.document["errors"]
    assert errors["unavailable"] >= 8
    assert set(errors) <= {"unavailable", "refused"}  # four users and a queue of one meet now and then
    assert requests["ok"] + requests["failed"] == requests["sent"]
    assert "unavailable  " in result.table
