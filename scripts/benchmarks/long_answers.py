"""Does a token cost more, the later it comes? CPU time of the whole server per token, along long answers."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import tritonclient.grpc.aio as grpcclient
from benchmarks.asking import ask_all, infer, stream
from benchmarks.repositories import CpuSeconds, build_synthetic, served
from benchmarks.results import Result
from local_server import LocalServer

NUM_TOKENS = 8192
AT_ONCE = 32
PARTS = 8
TOKENS_PER_SECOND = 400.0
MOST_GROWTH = 1.10  # of the last part's cost above the second's: what repeated runs differ by

_LIMITS = ("--max-batch-size", str(AT_ONCE), "--max-seq-len", str(NUM_TOKENS + 500))
_MORE_TOKENS = 200  # so that no answer ends within what is measured
_WHOLE_LENGTHS = (512, 2048, NUM_TOKENS)


def measure(folder: Path) -> Result:
    repository = build_synthetic(folder, "long", f"tokens_per_second={TOKENS_PER_SECOND:g}", *_LIMITS)
    with served(repository) as server:
        along, ends = asyncio.run(_along_streams(server))
        whole = {length: asyncio.run(_whole(server, length)) for length in _WHOLE_LENGTHS}
    result = Result(name="length", title=f"CPU time per token, answers of {NUM_TOKENS:,} tokens, {AT_ONCE} at a time")
    for number, microseconds in enumerate(along):
        first = number * NUM_TOKENS // PARTS
        result.add(f"streamed, tokens {first:,} to {first + NUM_TOKENS // PARTS:,}", microseconds, "us")
    # The first part has the prompts as well, and whatever happens once.
    result.add("streamed, last part / second part", along[-1] / along[1], at_most=MOST_GROWTH)
    result.add("streamed, ending the answers, per token", ends, "us")
    for length, microseconds in whole.items():
        result.add(f"not streamed, {length:,} tokens", microseconds, "us")
    result.add(f"not streamed, {NUM_TOKENS:,} / 2,048 tokens", whole[NUM_TOKENS] / whole[2048], at_most=MOST_GROWTH)
    result.data = {"streamed_microseconds_per_token": along, "whole_microseconds_per_token": whole}
    return result


async def _along_streams(server: LocalServer) -> tuple[list[float], float]:
    """Microseconds per token in each part, and afterwards, when Triton frees what it has kept of each answer."""
    cpu = CpuSeconds(server)
    readings: list[float] = []
    num_tokens = NUM_TOKENS + _MORE_TOKENS

    async def read() -> None:
        """The synthetic engine keeps its rate by the clock, so a part is a time."""
        started = time.monotonic()
        for number in range(PARTS + 1):
            await asyncio.sleep(started + number * NUM_TOKENS / PARTS / TOKENS_PER_SECOND - time.monotonic())
            readings.append(cpu.total())

    async with grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        await ask_all(lambda prompt: stream(client, server.name, prompt, 200), _prompts("Warm"), AT_ONCE)
        reader = asyncio.create_task(read())
        await ask_all(lambda prompt: stream(client, server.name, prompt, num_tokens), _prompts("Count"), AT_ONCE)
        await reader
    await asyncio.sleep(2.0)
    tokens = AT_ONCE * NUM_TOKENS / PARTS
    along = [(later - earlier) / tokens * 1e6 for earlier, later in zip(readings, readings[1:], strict=False)]
    return along, (cpu.total() - readings[-1]) / (AT_ONCE * NUM_TOKENS) * 1e6


async def _whole(server: LocalServer, length: int) -> float:
    """Microseconds per token of answers that are not streamed."""
    cpu = CpuSeconds(server)
    before = cpu.total()
    prompts = _prompts("Whole") * (NUM_TOKENS // length)
    async with grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        await ask_all(lambda prompt: infer(client, server.infer_name, prompt, length), prompts, AT_ONCE)
    return (cpu.total() - before) / (len(prompts) * length) * 1e6


def _prompts(word: str) -> list[str]:
    return [f"{word} {number}" for number in range(AT_ONCE)]
