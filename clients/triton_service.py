"""The service under load, through tritonclient: connections, the model's name, answers as they arrive."""

from __future__ import annotations

import asyncio
import difflib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from failures import LoadError, UsageError, request_failure
from questions import Question
from tritonclient.grpc.aio import InferenceServerClient, InferInput, InferRequestedOutput, InferResult
from tritonclient.utils import InferenceServerException

CHECK_SECONDS = 5.0
POLL_SECONDS = 0.5
# Only these come back: text as a reader's client would take it, and what is counted.
OUTPUTS = [InferRequestedOutput(name) for name in ("text_output", "num_output_tokens", "finish_reason")]

CHANNEL_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.use_local_subchannel_pool", 1),  # else channels to one address share one TCP connection
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # 120 s otherwise: a server that came back would be found late
)
ROUND_ROBIN = ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}')


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where to ask. `connection_age_seconds` may be infinite."""

    url: str
    model: str | None
    streams: bool
    connections: int
    connection_age_seconds: float
    channel_options: tuple[tuple[str, str | int], ...]
    wait_seconds: float


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Inputs that are the same in every request; None leaves the service's default."""

    temperature: float | None = None
    stop_words: tuple[str, ...] = ()
    end_id: int | None = None
    chat: bool = False


class Connection:
    """One TCP connection (one per address with round robin). Closes once it is retired and its last answer is over."""

    def __init__(self, target: Target):
        options = [*CHANNEL_OPTIONS, *target.channel_options]
        self.client = InferenceServerClient(target.url, channel_args=options)
        self._retires = time.monotonic() + target.connection_age_seconds
        self._answers = 0
        self._is_retired = False

    @property
    def is_old(self) -> bool:
        return time.monotonic() >= self._retires

    async def __aenter__(self) -> InferenceServerClient:
        self._answers += 1
        return self.client

    async def __aexit__(self, *_: object) -> None:
        self._answers -= 1
        await self._close_if_done()

    async def retire(self) -> None:
        self._is_retired = True
        await self._close_if_done()

    async def _close_if_done(self) -> None:
        if self._is_retired and not self._answers:
            await self.client.close()


class TritonService:
    """Asks one model. `start` before anything else."""

    def __init__(self, target: Target, sampling: Sampling):
        self._target = target
        self._sampling_inputs = sampling_inputs(sampling, streams=target.streams)
        self._connections: list[Connection] = []
        self._turn = 0
        self.model = ""

    async def start(self, say: Callable[[str], None]) -> None:
        """Connects, and finds the model, for at most `wait_seconds`. Raises LoadError."""
        try:
            self._connections = [Connection(self._target) for _ in range(self._target.connections)]
        except ValueError as error:
            raise UsageError(f"--grpc-option: {error}") from None
        deadline, said = time.monotonic() + self._target.wait_seconds, ""
        while not self.model:
            try:
                self.model = await self._find_model()
            except LoadError as error:
                if time.monotonic() >= deadline:
                    raise
                if said != (said := str(error)):
                    say(f"waiting: {error}")
                await asyncio.sleep(POLL_SECONDS)
        # Every connection is made now: none is part of a measured answer.
        calls = [connection.client.is_server_live() for connection in self._connections]
        await asyncio.gather(*calls, return_exceptions=True)

    async def close(self) -> None:
        await asyncio.gather(*(connection.client.close() for connection in self._connections))

    async def answer(self, question: Question, timeout_seconds: float | None) -> AsyncGenerator[tuple[int, bool]]:
        """(tokens, is the last) of each response, as it arrives. Raises RequestFailure. Closing it cancels."""
        due = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        async with await self._connection() as client:
            ask = self._stream if self._target.streams else self._infer
            try:
                async with aclosing(ask(client, question, timeout_seconds)) as responses:
                    async for response in responses:
                        yield response
            except grpc.aio.AioRpcError as error:
                raise request_failure(error.code().name, error.details(), is_overdue=is_past(due)) from None
            except InferenceServerException as error:
                status = error.status()
                name = None if status is None else str(status).removeprefix("StatusCode.")
                raise request_failure(name, error.message(), is_overdue=is_past(due)) from None

    async def _stream(
        self, client: InferenceServerClient, question: Question, timeout_seconds: float | None
    ) -> AsyncGenerator[tuple[int, bool]]:
        async def one_request() -> AsyncIterator[dict[str, Any]]:
            # No empty final response is asked for: a stream carries one question, so its end is the end of the answer.
            yield {"model_name": self.model, "inputs": self._inputs(question), "outputs": OUTPUTS}

        # Errors come inside the stream, without a status. The header triton_grpc_error would bring one, but it ends
        # tritonserver 2.51 with SIGSEGV when requests are refused quickly one after the other.
        call = client.stream_infer(one_request(), stream_timeout=timeout_seconds)
        try:
            async for result, error in call:
                if error is not None:
                    raise error
                yield read_response(result)
        finally:
            call.cancel()  # nothing to a call that is over

    async def _infer(
        self, client: InferenceServerClient, question: Question, timeout_seconds: float | None
    ) -> AsyncGenerator[tuple[int, bool]]:
        inputs = self._inputs(question)
        yield read_response(await client.infer(self.model, inputs, outputs=OUTPUTS, client_timeout=timeout_seconds))

    def _inputs(self, question: Question) -> list[InferInput]:
        return [
            tensor("text_input", "BYTES", np.array([[question.prompt.encode()]], dtype=np.object_)),
            tensor("max_tokens", "INT32", np.array([[question.output_tokens]], dtype=np.int32)),
            *self._sampling_inputs,
        ]

    async def _connection(self) -> Connection:
        """Each in turn; one that is old is replaced, so that servers that were added since get their share."""
        self._turn = (self._turn + 1) % len(self._connections)
        connection = self._connections[self._turn]
        if connection.is_old:
            self._connections[self._turn] = Connection(self._target)
            await connection.retire()
        return self._connections[self._turn]

    # ---- the model's name --------------------------------------------------------------------------------------

    async def _find_model(self) -> str:
        """Raises LoadError when the server is not there or does not have the model."""
        client = self._connections[0].client
        try:
            index = await client.get_model_repository_index(client_timeout=CHECK_SECONDS)
        except InferenceServerException as error:
            if "UNAVAILABLE" in str(error.status()) or "DEADLINE" in str(error.status()):
                raise LoadError(self._nobody_there(error.message() or "")) from None
            return self._named_model(f"the server lists no models ({error.message()})")
        return choose_model(
            [model.name for model in index.models if model.state == "READY"],
            self._target.model,
            streams=self._target.streams,
        )

    def _named_model(self, reason: str) -> str:
        if self._target.model is None:
            raise LoadError(f"{reason}; name one with --model")
        return self._target.model if self._target.streams else infer_name(self._target.model)

    def _nobody_there(self, message: str) -> str:
        reason = (message.rpartition(": ")[2] or message).strip("[]")
        return (
            f"no answer from {self._target.url} by gRPC ({reason}); start a server with: python scripts/serve.py "
            "REPOSITORY, give its gRPC port (8001, not HTTP's 8000) with --url HOST:PORT, or let this wait with --wait"
        )


def is_past(due: float | None) -> bool:
    """`due` is a time.monotonic(), or None for never."""
    return due is not None and time.monotonic() >= due


def choose_model(ready: Sequence[str], wanted: str | None, *, streams: bool) -> str:
    """The model to ask. Raises LoadError, with the names that there are."""
    if wanted is not None:
        name = wanted if streams else infer_name(wanted)
        if name in ready:
            return name
        matches = difflib.get_close_matches(name, ready, n=1)
        hint = f"; perhaps you meant {matches[0]!r}" if matches else ""
        raise LoadError(f"the server has no model {name!r} ready{hint}; ready are: {', '.join(ready) or 'none'}")
    # A repository of build/engines.py has each served name twice: itself, which streams, and NAME_infer.
    pairs = [name for name in ready if infer_name(name) != name and infer_name(name) in ready]
    if len(pairs) != 1:
        raise LoadError(f"name the model with --model; ready are: {', '.join(ready) or 'none'}")
    return pairs[0] if streams else infer_name(pairs[0])


def infer_name(model: str) -> str:
    """The model that answers plain infer(); Triton refuses that on models that stream."""
    return model if model.endswith("_infer") else f"{model}_infer"


def sampling_inputs(sampling: Sampling, *, streams: bool) -> list[InferInput]:
    inputs = [tensor("stream", "BOOL", np.array([[streams]]))]
    if sampling.chat:
        inputs.append(tensor("apply_chat_template", "BOOL", np.array([[True]])))
    if sampling.temperature is not None:
        inputs.append(tensor("temperature", "FP32", np.array([[sampling.temperature]], dtype=np.float32)))
    if sampling.end_id is not None:
        inputs.append(tensor("end_id", "INT32", np.array([[sampling.end_id]], dtype=np.int32)))
    if sampling.stop_words:
        stop_words = np.array([[word.encode() for word in sampling.stop_words]], dtype=np.object_)
        inputs.append(tensor("stop_words", "BYTES", stop_words))
    return inputs


def tensor(name: str, datatype: str, value: np.ndarray) -> InferInput:
    result = InferInput(name, list(value.shape), datatype)
    result.set_data_from_numpy(value)
    return result


def read_response(result: InferResult) -> tuple[int, bool]:
    """(tokens, is the last). From the bytes: as_numpy() of each output would cost more than the rest of a response."""
    response = result.get_response()
    tokens, is_last = 0, False
    for output, content in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.name == "num_output_tokens":
            tokens = int.from_bytes(content[:4], "little")
        elif output.name == "finish_reason":
            is_last = len(content) > 4  # four bytes with its length come before the text, which is empty until the end
    return tokens, is_last
