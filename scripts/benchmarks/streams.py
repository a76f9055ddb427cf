"""Many streams at a rate that no CPU engine reaches: what the repository around the engine can carry."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.repositories import ROOT, BenchmarkError, CpuSeconds, build_synthetic, served
from benchmarks.results import Result
from local_server import LocalServer

NUM_STREAMS = 256
TOKENS_PER_SECOND = 170.0  # of each stream
LEAST_TOKENS_PER_SECOND = 40_000
MOST_GAP_SECONDS = 0.250

_OUTPUT_TOKENS = "uniform:512:1536"  # so that streams end, and new ones begin, all the time
RATES = f"tokens_per_second={TOKENS_PER_SECOND:g}"
LIMITS = ("--max-batch-size", str(NUM_STREAMS), "--max-seq-len", "9000")
_WARM_UP_SECONDS = 8.0


def measure(folder: Path, seconds: float) -> Result:
    with served(build_synthetic(folder, "streams", RATES, *LIMITS)) as server:
        load(server, folder, _WARM_UP_SECONDS)
        cpu = CpuSeconds(server)
        before = cpu.read()
        report = load(server, folder, seconds)
        used = {name: value - before[name] for name, value in cpu.read().items()}
    result = Result(name="streams", title=f"{NUM_STREAMS} streams, {TOKENS_PER_SECOND:g} tokens/s each at most")
    while_sending, gap = report["while_sending"], report["latency_seconds"]["response_gap"]
    result.add("tokens/s", while_sending["tokens_per_second"], at_least=LEAST_TOKENS_PER_SECOND)
    result.add("responses/s", report["rates"]["responses_per_second"])
    result.add("gap between responses, p50", gap["p50"] * 1000, "ms")
    result.add("gap between responses, p99", gap["p99"] * 1000, "ms", at_most=MOST_GAP_SECONDS * 1000)
    result.add("gap between responses, most", gap["max"] * 1000, "ms")
    result.add("time to first token, p99", report["latency_seconds"]["time_to_first_token"]["p99"] * 1000, "ms")
    for name, value in used.items():
        result.add(f"cores, {name}", value / report["seconds"])
    result.add("cores, client", report["client"]["cores"])
    result.add("requests that failed", report["requests"]["failed"], at_most=0)
    result.data = {"tokens_per_second": report["per_second"]["tokens"], "client_warnings": report["warnings"]}
    return result


def load(server: LocalServer, folder: Path, seconds: float, output_tokens: str = _OUTPUT_TOKENS) -> dict:
    """The report of clients/load.py."""
    path = folder / "load.json"
    command = [sys.executable, str(ROOT / "clients/load.py"), "--url", f"127.0.0.1:{server.grpc_port}"]
    command += ["--model", server.name, "--concurrency", str(NUM_STREAMS), "--duration", f"{seconds:g}s"]
    command += ["--output-tokens", output_tokens, "--end-id", "-1", "--seed", "1", "--json", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BenchmarkError(f"clients/load.py failed:\n{result.stderr}")
    return json.loads(path.read_text())
