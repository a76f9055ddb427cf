"""Thousands of requests of every kind leave nothing behind: memory, slots, threads.

SOAK_REQUESTS=20000 python -m pytest tests/server/test_soak.py      (make soak)
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import tritonclient.grpc.aio as aio
from running_server import Server, tensors
from tritonclient.utils import InferenceServerException

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "1500"))
WARM_UP = max(1000, REQUESTS // 5)  # before, until allocators and caches have their size
AT_ONCE = 32
# In a short run it shows when the machine stood still for a moment: what held the backlog then is kept. That happens
# once; what leaks grows in every round.
ROUNDS = 1 if REQUESTS >= 20_000 else 3
MOST_GROWTH = 0.05 if REQUESTS >= 20_000 else 0.10
SECONDS = 60


@pytest.mark.parametrize("engine", ["synthetic", "openvino"])
def test_a_long_time_of_everything(
    engine: str,
    build_synthetic: Callable[..., Path],
    repository: Path,
    start_server: Callable[..., Server],
):
    rates = ("tokens_per_second=1000", "--max-batch-size", "16", "--max-seq-len", "1024")
    server = start_server(build_synthetic(*rates) if engine == "synthetic" else repository)
    counts = asyncio.run(ask_many(server, WARM_UP, seed=1))
    threads, asked = num_threads(server), WARM_UP
    for seed in range(2, 2 + ROUNDS):
        before = memory(server)
        counts += asyncio.run(ask_many(server, REQUESTS, seed=seed))
        asked += REQUESTS
        wait_until_idle(server)
        after = memory(server)
        growth = {name: after[name] / before[name] - 1 for name in before}
        print(
            dict(counts), {name: f"{value >> 20} MiB, {growth[name]:+.1%}" for name, value in after.items()}, sep="\n"
        )
        assert server.active_requests() == 0
        assert server.metric("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="used") == 0
        assert set(after) == set(before)
        assert num_threads(server) == threads
        grown = {name: value for name, value in growth.items() if value > MOST_GROWTH}
        if not grown:
            break
    assert grown == {}
    # Each kind has come, and ended as it should.
    assert counts.total() == asked
    assert set(counts) == {"whole", "cancelled", "refused", "stop word", "infer"}
    assert server.metric("triton_trtllm_requests_total", finish_reason="failed") == 0


def wait_until_idle(server: Server) -> None:
    deadline = time.monotonic() + SECONDS
    while server.active_requests() and time.monotonic() < deadline:
        time.sleep(0.1)


def memory(server: Server) -> dict[str, int]:
    """Resident bytes of each process."""
    return {name: process.memory_info().rss for name, process in server.processes().items()}


def num_threads(server: Server) -> dict[str, int]:
    """Of the models; tritonserver makes threads for connections as they come."""
    return {name: p.num_threads() for name, p in server.processes().items() if name != "tritonserver"}


async def ask_many(server: Server, number: int, seed: int) -> Counter[str]:
    chance, counts = random.Random(seed), Counter()
    async with aio.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        left = iter(range(number))

        async def worker() -> None:
            for _ in left:
                counts[await asyncio.wait_for(ask(server, client, chance), SECONDS)] += 1

        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    return counts


async def ask(server: Server, client: aio.InferenceServerClient, chance: random.Random) -> str:
    """One request: 10 % are cancelled, 5 % wrong, 5 % with a stop word, 20 % plain infer(), the rest whole streams."""
    number = chance.random()
    prompt = "Count " * chance.choice([1, 1, 5, 40])
    values = {"text_input": prompt, "max_tokens": chance.choice([1, 4, 16, 64, 200]), "end_id": -1}
    if number < 0.05:
        try:
            await client.infer(server.infer_name, tensors(aio, {**values, "temperature": -1.0}))
        except InferenceServerException as error:
            assert "temperature is -1" in error.message()
            return "refused"
        raise AssertionError("a wrong request was answered")
    if number < 0.25:
        result = await client.infer(server.infer_name, tensors(aio, values))
        assert result.as_numpy("num_output_tokens").item() == values["max_tokens"]
        return "infer"
    if number < 0.30:
        values |= {"stop_words": [["e", "o"]], "max_tokens": 200}
    is_cancelled = number > 0.90
    if is_cancelled:
        # Long enough not to be over with the next response: of a gRPC stream that is cancelled just before its last one
        # tritonserver 2.51 keeps 3 to 10 KB for ever (docs/decisions.md).
        values["max_tokens"] = 900

    async def requests():
        yield {"model_name": server.name, "inputs": tensors(aio, {**values, "stream": True})}

    responses = client.stream_infer(requests())
    tokens, reason, after = 0, "", chance.randint(1, 3)
    async for result, error in responses:
        assert error is None, error
        tokens += int(result.as_numpy("num_output_tokens").item())
        reason = result.as_numpy("finish_reason").item().decode()
        after -= 1
        if reason or (is_cancelled and not after):
            break
    if is_cancelled:
        responses.cancel()
        return "cancelled"
    if "stop_words" in values:
        assert reason in ("stop", "length")
        return "stop word"
    assert (tokens, reason) == (values["max_tokens"], "length")
    return "whole"
