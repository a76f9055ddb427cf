"""A real Prometheus with monitoring/'s rules scrapes a real server, under loads of which it is known what they are.

The engine is the synthetic one, so a request takes as long as it has tokens, on any machine. Scrapes and evaluations
come every second, and the windows of the rules are cut to match: 1m is 6 s here, 2m 10 s, 5m 20 s. What the windows
themselves do, and longer intervals, is tested with promtool (monitoring/tests/).
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import queue
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import packed_binaries
import pytest
import tritonclient.grpc as grpcclient
from free_ports import free_ports
from running_server import ROOT, Server, tensors

SLOTS = 8
TOKENS_PER_SECOND = 50

INTERVALS = {"interval: 15s": "interval: 1s", "[1m]": "[6s]", "[2m]": "[10s]", "[5m]": "[20s]"}
DEADLINE_SECONDS = 40  # for what takes 10 on a machine that has nothing else to do

# Whatever labels the scraper adds, the records have them, and nothing else.
JOBS: dict[str, dict] = {
    "plain": {},
    "kubernetes": {"labels": {"namespace": "prod", "pod": "llm-0"}, "honor_labels": True},
    "in the way": {"labels": {"model": "gpt2", "version": "v2", "shelf": "top"}},  # become exported_model, ...
}
LABELS = {
    "plain": {"job": "plain"},
    "kubernetes": {"job": "kubernetes", "namespace": "prod", "pod": "llm-0"},
    "in the way": {"job": "in the way", "shelf": "top"},
}


@dataclass
class Prometheus:
    """A running one that scrapes the port `target` once for each of JOBS; `stop()` ends it."""

    folder: Path
    target: int
    address: str = field(init=False)
    process: subprocess.Popen = field(init=False)

    def __post_init__(self) -> None:
        binary = packed_binaries.find("prometheus")
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        for name in ("rules.yaml", "alerts.yaml"):
            text = (ROOT / "monitoring" / name).read_text()
            for written, here in INTERVALS.items():
                text = text.replace(written, here)
            (self.folder / name).write_text(text)
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml", "alerts.yaml"],
            "scrape_configs": [
                {
                    "job_name": name,
                    "honor_labels": job.get("honor_labels", False),
                    "static_configs": [{"targets": [f"127.0.0.1:{self.target}"], "labels": job.get("labels", {})}],
                }
                for name, job in JOBS.items()
            ],
        }
        (self.folder / "prometheus.yml").write_text(json.dumps(config))  # which is YAML, too
        command = [binary, "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
        command += [f"--web.listen-address={self.address}"]
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)

    def get(self, path: str, **parameters: str) -> dict:
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as response:
            return json.load(response)["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The labels and the value of each series. Nothing yet while Prometheus starts."""
        try:
            result = self.get("query", query=expression)["result"]
        except OSError:
            assert self.process.poll() is None, (self.folder / "log").read_text()[-6000:]
            return []
        return [(series["metric"], float(series["value"][1])) for series in result]

    def value(self, expression: str, job: str = "plain") -> float | None:
        """Of the server as that job sees it."""
        values = [value for labels, value in self.query(expression) if labels["job"] == job]
        assert len(values) <= 1, f"{expression} has several values for one server"
        return values[0] if values else None

    def wait_for(self, expression: str, is_right: Callable[[float], bool]) -> float:
        """The first value that is right."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (value := self.value(expression)) is None or not is_right(value):
            assert time.monotonic() < deadline, f"{expression} is {value} after {DEADLINE_SECONDS} s"
            time.sleep(0.2)
        return value


class Load:
    """`clients` clients with one request in flight at any time each, until the end of the `with`, which cancels them.

    Every other one is answered as a stream, the rest by infer().
    """

    def __init__(self, server: Server, clients: int, *, max_tokens: int):
        self._server = server
        self._values = {"text_input": "Count", "max_tokens": max_tokens, "end_id": -1}
        self._is_over = threading.Event()
        self._cancel: dict[int, Callable[[], object]] = {}  # by client
        self._errors: list[Exception] = []
        self._threads = [
            threading.Thread(target=self._run, args=(number, self._infer if number % 2 else self._stream))
            for number in range(clients)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for cancel in list(self._cancel.values()):
            with contextlib.suppress(OSError):  # the connection has just been closed
                cancel()
        for thread in self._threads:
            thread.join(timeout=30)
        assert not self._errors, f"clients failed: {self._errors}"

    def _run(self, number: int, ask: Callable[[int], None]) -> None:
        try:
            while not self._is_over.is_set():
                ask(number)
        except Exception as error:
            if not self._is_over.is_set():
                self._errors.append(error)

    def _infer(self, number: int) -> None:
        answers: queue.SimpleQueue = queue.SimpleQueue()
        with grpcclient.InferenceServerClient(f"127.0.0.1:{self._server.grpc_port}") as client:
            call = client.async_infer(
                self._server.infer_name,
                tensors(grpcclient, self._values),
                lambda result, error: answers.put(error),
            )
            self._cancel[number] = call.cancel
            if (error := answers.get()) is not None:
                raise error

    def _stream(self, number: int) -> None:
        """By HTTP: tritonserver 2.51 may die when gRPC streams are cancelled (mended in 24.12, server PR 7840)."""
        connection = http.client.HTTPConnection("127.0.0.1", self._server.http_port)
        body = json.dumps({**self._values, "stream": True})
        connection.request("POST", f"/v2/models/{self._server.name}/generate_stream", body)
        self._cancel[number] = functools.partial(connection.sock.shutdown, socket.SHUT_RDWR)
        with connection.getresponse() as response:
            text = response.read().decode()
        assert self._is_over.is_set() or '"finish_reason":"length"' in text.replace(" ", ""), text[-300:]
        connection.close()


@pytest.fixture(scope="module")
def synthetic_server(
    build_synthetic: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    limits = ("--max-batch-size", str(SLOTS), "--max-seq-len", "4096")
    repository = build_synthetic(f"tokens_per_second={TOKENS_PER_SECOND}", *limits)
    with Server(repository, tmp_path_factory.mktemp("monitored") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def prometheus(synthetic_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), synthetic_server.metrics_port)
    try:
        yield prometheus
    finally:
        prometheus.stop()


def test_an_idle_server_has_a_ratio_of_zero_and_no_alerts(prometheus: Prometheus):
    prometheus.wait_for("triton:generated_tokens:rate", lambda rate: rate == 0)
    assert prometheus.value("triton:queue_compute:ratio") == 0
    assert prometheus.value("triton:slots:current") == SLOTS
    assert prometheus.value("triton:requests_slots:ratio") == 0
    prometheus.wait_for("count_over_time(triton:queue_compute:ratio[20s])", lambda number: number >= 3)
    assert prometheus.value("max_over_time(triton:queue_compute:ratio[20s])") < 0.05
    assert prometheus.query('ALERTS{alertstate="firing"}') == []
    # Nor is there one on its way, once the server has been scraped twice.
    prometheus.wait_for('count by (job) (up) unless on () ALERTS{alertstate="pending"}', lambda _: True)


def test_the_ratio_tells_capacity_from_a_queue_and_rises_with_it(synthetic_server: Server, prometheus: Prometheus):
    short = {"max_tokens": 2 * TOKENS_PER_SECOND}  # 2 s in a slot
    with Load(synthetic_server, SLOTS, **short):
        prometheus.wait_for("avg_over_time(triton:requests_running:current[6s])", lambda running: running > 0.9 * SLOTS)
        at_capacity = prometheus.value("triton:queue_compute:ratio")
        assert at_capacity < 0.2
        # The means are of requests that ended, so those of the blog are true, and in its microseconds.
        assert prometheus.value("triton:request_duration:average") == pytest.approx(2e6, rel=0.25)
        assert prometheus.value("triton:compute_duration:average") == pytest.approx(2e6, rel=0.25)
        assert prometheus.value("triton:queue_duration:average") < 0.2e6
        assert prometheus.value("triton:generated_tokens:rate") > 0.8 * SLOTS * TOKENS_PER_SECOND
        assert prometheus.value("triton:inter_token_seconds:p50") == pytest.approx(1 / TOKENS_PER_SECOND, rel=0.5)
        assert prometheus.value("triton:requests_failed:ratio5m") == 0
    with Load(synthetic_server, 2 * SLOTS, **short):
        prometheus.wait_for("avg_over_time(triton:requests:current[6s])", lambda number: number > 1.9 * SLOTS)
        twice = prometheus.wait_for("triton:queue_compute:ratio", lambda ratio: ratio > 0.8)
        assert twice < 1.2
    with Load(synthetic_server, 3 * SLOTS, **short):
        prometheus.wait_for("triton:queue_compute:ratio", lambda ratio: ratio > twice + 0.6)
        assert prometheus.value("triton:queue_seconds:p95") > 1
        assert prometheus.value("triton:time_to_first_token_seconds:p95") > 1
    prometheus.wait_for("triton:queue_compute:ratio", lambda ratio: ratio < 0.05)
    assert prometheus.value("max_over_time(triton:queue_compute:ratio[1m])") < 2.5  # no peak where a load ends


def test_what_waits_and_what_runs_is_counted_for_every_way_to_scrape(synthetic_server: Server, prometheus: Prometheus):
    """12 requests of more than a minute: 8 run and 4 wait, and nothing changes while we look."""
    tokens = 64 * TOKENS_PER_SECOND
    blocks = tokens / 32 + 1  # the prompt has one
    expected = {
        "triton:requests:current": SLOTS + 4,
        "triton:requests_running:current": SLOTS,
        "triton:requests_waiting:current": 4,
        "triton:requests_slots:ratio": 1.5,
        "triton:kv_cache:fraction": SLOTS * blocks / (SLOTS * 4096 / 32),
    }
    with Load(synthetic_server, SLOTS + 4, max_tokens=tokens):
        prometheus.wait_for("min_over_time(triton:requests:current[4s])", lambda number: number == SLOTS + 4)
        for record, value in expected.items():
            found = {labels["job"]: (labels, value) for labels, value in prometheus.query(record)}
            own = {"__name__": record, "instance": f"127.0.0.1:{synthetic_server.metrics_port}"}
            assert found == {job: ({**own, **LABELS[job]}, value) for job in JOBS}
    prometheus.wait_for("triton:requests:current", lambda number: number == 0)
    assert prometheus.value("triton:kv_cache:fraction") == 0


def test_a_server_that_has_gone_has_no_records_and_an_alert(synthetic_server: Server, prometheus: Prometheus):
    """The last test here: the server does not come back."""
    prometheus.wait_for("triton:slots:current", lambda slots: slots == SLOTS)
    synthetic_server.stop()
    prometheus.wait_for('ALERTS{alertname="TritonServerDown"}', lambda _: True)
    # Each job scrapes, and each group is evaluated, at a time of its own within the second.
    records = '{__name__=~"triton:.+(current|fraction|queue_compute:ratio|slots:ratio|:rate)"}'
    deadline = time.monotonic() + DEADLINE_SECONDS
    while left := prometheus.query(records):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
