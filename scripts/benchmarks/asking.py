"""One request after another to a server, with the times that only a benchmark wants to know."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc.aio as grpcclient


@dataclass(frozen=True, slots=True)
class Chunk:
    """One response of a stream. Times in nanoseconds since the epoch."""

    num_tokens: int
    generated_ns: int  # when the engine gave its last token
    received_ns: int


def _inputs(prompt: str, max_tokens: int, is_streamed: bool) -> list[Any]:
    values = {
        "text_input": (np.array([[prompt.encode()]], np.object_), "BYTES"),
        "max_tokens": (np.array([[max_tokens]], np.int32), "INT32"),
        "end_id": (np.array([[-1]], np.int32), "INT32"),  # nothing ends it but its length
    }
    if is_streamed:
        values["stream"] = (np.array([[True]]), "BOOL")
    tensors = []
    for name, (array, datatype) in values.items():
        tensor = grpcclient.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return tensors


async def stream(client: grpcclient.InferenceServerClient, model: str, prompt: str, max_tokens: int) -> list[Chunk]:
    """Raises AssertionError when it is not answered to the end."""
    outputs = [grpcclient.InferRequestedOutput(n) for n in ("text_output", "num_output_tokens", "last_token_time_ns")]
    request = {"model_name": model, "inputs": _inputs(prompt, max_tokens, True), "outputs": outputs}

    async def requests():
        yield request

    chunks = []
    async for result, error in client.stream_infer(requests()):
        received_ns = time.time_ns()
        assert error is None, error
        number, generated_ns = (int(result.as_numpy(n).item()) for n in ("num_output_tokens", "last_token_time_ns"))
        chunks.append(Chunk(number, generated_ns, received_ns))
    assert sum(chunk.num_tokens for chunk in chunks) == max_tokens
    return chunks


async def infer(client: grpcclient.InferenceServerClient, model: str, prompt: str, max_tokens: int) -> None:
    """Raises AssertionError when it is not answered to the end."""
    outputs = [grpcclient.InferRequestedOutput(name) for name in ("text_output", "num_output_tokens")]
    result = await client.infer(model, _inputs(prompt, max_tokens, False), outputs=outputs)
    assert int(result.as_numpy("num_output_tokens").item()) == max_tokens


async def ask_all(ask: Any, prompts: Sequence[str], at_once: int) -> float:
    """Seconds until all are answered by `ask(prompt)`, `at_once` at a time."""
    left: Iterator[str] = iter(prompts)

    async def ask_some() -> None:
        for prompt in left:
            await ask(prompt)

    started = time.monotonic()
    await asyncio.gather(*(ask_some() for _ in range(at_once)))
    return time.monotonic() - started
