"""What Triton and everything around the engine cost a real engine: tokens/s through the server against in process.

Both sides have the same engine, prompts and lengths, and take turns, so that a machine that grows faster or slower
changes both. While one works the other has nothing to do. Streams are compared with reading each token in process,
whole answers with reading them at their end. In process there are only token ids; through Triton it is text.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tokenizers
import tritonclient.grpc.aio as grpcclient
from benchmarks.asking import ask_all, infer, stream
from benchmarks.repositories import build, served
from benchmarks.results import Result
from local_server import LocalServer

AT_ONCE = 16
LEAST_RATIO = 0.97
_WORDS = [
    "the",
    "fox",
    "river",
    "mountain",
    "question",
    "answer",
    "seven",
    "window",
    "morning",
    "letter",
    "garden",
    "winter",
]


def measure(folder: Path, model: Path, name: str, rounds: int, max_tokens: int) -> Result:
    repository = build(folder, name, model, "--engine", "openvino", "--max-batch-size", str(AT_ONCE))
    tokenizer = tokenizers.Tokenizer.from_file(str(repository / "tensorrt_llm/1/engine/tokenizer.json"))
    num_tokens = AT_ONCE * max_tokens
    ways = ("streamed in process", "streamed through Triton", "whole in process", "whole through Triton")
    rates: dict[str, list[float]] = {way: [] for way in ways}
    with in_process(repository) as engine, served(repository) as server:
        for number in range(rounds + 1):
            # The order changes too: whoever comes after a busy time may find the machine slower.
            for way in random.Random(number).sample(ways, len(ways)):
                prompts = _prompts(f"{number} {way}")
                is_streamed = way.startswith("streamed")
                if way.endswith("in process"):
                    seconds = engine([tokenizer.encode(prompt).ids for prompt in prompts], max_tokens, is_streamed)
                else:
                    seconds = asyncio.run(_ask(server, prompts, max_tokens, is_streamed))
                if number:  # the first one is for caches
                    rates[way].append(num_tokens / seconds)
    result = Result(
        name=f"engine-{name}", title=f"OpenVINO, {name}, {AT_ONCE} requests of {max_tokens} tokens at a time"
    )
    for way, values in rates.items():
        result.add(f"{way}, median of {rounds}", statistics.median(values), "tokens/s")
    for kind in ("streamed", "whole"):
        pairs = zip(rates[f"{kind} through Triton"], rates[f"{kind} in process"], strict=True)
        ratio = statistics.median(through / alone for through, alone in pairs)
        result.add(f"{kind}, through Triton / in process", ratio, at_least=LEAST_RATIO)
    result.data = {"tokens_per_second": rates}
    return result


def _prompts(seed: str) -> list[str]:
    """No two begin alike: the engine's prefix cache is not what is measured."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(_WORDS, k=16)) for _ in range(AT_ONCE)]


async def _ask(server: LocalServer, prompts: list[str], max_tokens: int, is_streamed: bool) -> float:
    model = server.name if is_streamed else server.infer_name
    async with grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        ask = stream if is_streamed else infer
        return await ask_all(lambda prompt: ask(client, model, prompt, max_tokens), prompts, AT_ONCE)


@contextmanager
def in_process(repository: Path) -> Iterator:
    command = [sys.executable, str(Path(__file__).with_name("in_process.py")), str(repository)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert json.loads(process.stdout.readline()) == {"ready": True}

        def run(prompts: list[list[int]], max_tokens: int, is_streamed: bool) -> float:
            work = {"prompts": prompts, "max_tokens": max_tokens, "at_once": AT_ONCE, "is_streamed": is_streamed}
            process.stdin.write(json.dumps(work) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())["seconds"]

        yield run
        process.stdin.close()
