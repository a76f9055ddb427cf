"""A server of one's own for a while: scripts/serve.py on free ports of 127.0.0.1, for demo, benchmarks and tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil
from free_ports import free_ports

SERVE = Path(__file__).with_name("serve.py")
READY_SECONDS = 90
STOP_SECONDS = 60


class LocalServerError(Exception):
    """The server ended, or is not ready in time: a sentence and the end of its log."""


class LocalServer:
    """Started when made; `stop()` ends it. Its output goes to `log`. In a `with` it is ready, and ends with that.

    `python` is the interpreter of the environment to serve from; None for this one's.
    """

    def __init__(
        self,
        repository: Path,
        log: Path,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        python: Path | None = None,
    ):
        self.repository, self.log = repository, log
        record = json.loads((repository / "repository.json").read_text())
        self.name, self.infer_name, self.engine = record["served_name"], record["infer_name"], record["engine"]
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        self.command = [str(python or sys.executable), str(SERVE), str(repository)]
        self.command += ["--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)]
        self.command += ["--metrics-port", str(self.metrics_port)]
        self.command += ["--benchmark"] * (record["engine"] == "synthetic")
        self.command += options
        with log.open("w") as output:
            self.process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=output,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C is for whoever started it
            )

    def wait_until_ready(self, seconds: float = READY_SECONDS) -> Self:
        """Raises LocalServerError."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (code := self.process.poll()) is not None:
                raise LocalServerError(f"the server ended with {code}; its log says:\n{self._end_of_log()}")
            try:
                # The port for metrics opens last, a moment after the server is ready.
                for url in (f"{self.http_port}/v2/health/ready", f"{self.metrics_port}/metrics"):
                    urllib.request.urlopen(f"http://127.0.0.1:{url}", timeout=1).close()
                return self
            except OSError:
                time.sleep(0.05)
        raise LocalServerError(f"the server is not ready after {seconds:g} s; its log says:\n{self._end_of_log()}")

    def __enter__(self) -> Self:
        try:
            return self.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    def processes(self) -> dict[str, psutil.Process]:
        """All that this server consists of: by model, by script, or by the program's name."""
        named = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            arguments = [Path(argument) for argument in process.cmdline()]
            models = [path.parts[-3] for path in arguments if path.name == "model.py"]
            scripts = [path.name for path in arguments if path.suffix == ".py"]
            named[(models or scripts or [process.name()])[0]] = process
        return named

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()  # tritonserver ends with it
            return self.process.wait()

    def _end_of_log(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]
