"""One stream alone: is every token sent by itself, and how soon after the engine gave it?"""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import tritonclient.grpc.aio as grpcclient
from benchmarks.asking import Chunk, stream
from benchmarks.repositories import build_synthetic, served
from benchmarks.results import Result
from local_server import LocalServer

TOKENS_PER_SECOND = 100.0
MOST_DELAY_SECONDS = 0.005


def measure(folder: Path, seconds: float) -> Result:
    rates = f"tokens_per_second={TOKENS_PER_SECOND:g}"
    num_tokens = round(TOKENS_PER_SECOND * seconds)
    with served(build_synthetic(folder, "single", rates, "--max-seq-len", str(num_tokens + 100))) as server:
        chunks = asyncio.run(_ask(server, num_tokens))
    delays = [(chunk.received_ns - chunk.generated_ns) / 1e6 for chunk in chunks]
    alone = sum(chunk.num_tokens == 1 for chunk in chunks) / len(chunks)
    result = Result(name="single", title=f"one stream, {TOKENS_PER_SECOND:g} tokens/s")
    result.add("tokens", num_tokens)
    result.add("responses with one token", alone * 100, "%", at_least=100)
    result.add("delay from engine to client, p50", np.percentile(delays, 50), "ms", at_most=MOST_DELAY_SECONDS * 1000)
    result.add("delay from engine to client, p99", np.percentile(delays, 99), "ms")
    result.add("delay from engine to client, most", max(delays), "ms")
    result.data = {"delay_milliseconds": delays}
    return result


async def _ask(server: LocalServer, num_tokens: int) -> list[Chunk]:
    async with grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        await stream(client, server.name, "The first one is slower than all others.", 10)
        return await stream(client, server.name, "Count for as long as you can.", num_tokens)
