"""Results of requests, and of iterations. Each is one object, changed in every step."""

from __future__ import annotations

import asyncio
import json
import queue
import time
import weakref
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

from .._double.records import SamplingParams
from .utils import RequestError

__all__ = ["CompletionOutput", "IterationResult", "Logprob", "RequestOutput"]

_NO_LOOP = "The asyncio event loop was not present during initialization, so async operations are not available."
_FOREVER_SECONDS = 5.0  # how long the double waits where the library would for ever
_TIMES = ("arrival_time", "first_scheduled_time", "first_token_time", "last_token_time")
_FINISH_REASONS = {"end_id": "stop", "stop_words": "stop", "length": "length", "cancelled": "cancelled"}


def running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class ResponseQueue:
    """Of a loop if there is one where it is made, of threads otherwise."""

    def __init__(self, maxlen: int | None = None) -> None:
        self.is_async = running_loop() is not None
        self._items: deque[Any] = deque(maxlen=maxlen)
        self._event = asyncio.Event() if self.is_async else None
        self._blocking: queue.Queue[Any] = queue.Queue()

    def put(self, item: Any) -> asyncio.Event | None:
        """From a thread. The event to set on the loop."""
        if not self.is_async:
            self._blocking.put(item)
            return None
        self._items.append(item)
        return self._event

    async def get_async(self, timeout: float | None = None) -> Any:
        assert self.is_async, _NO_LOOP
        while not self._items:
            self._event.clear()
            if not self._items:
                await asyncio.wait_for(self._event.wait(), timeout)
        return self._items.popleft()

    def get(self, timeout: float | None = None) -> Any:
        if not self.is_async:
            return self._blocking.get(timeout=timeout)
        until = None if timeout is None else time.monotonic() + timeout
        while not self._items:
            if until is not None and time.monotonic() > until:
                raise queue.Empty
            time.sleep(0.005)
        return self._items.popleft()


@dataclass(slots=True)
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass(slots=True)
class CompletionOutput:
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    generation_logits: Any = None
    additional_context_outputs: Any = None
    additional_generation_outputs: Any = None
    disaggregated_params: Any = None
    request_perf_metrics: Any = None
    _last_text_len: int = field(default=0, init=False, repr=False)
    _last_token_ids_len: int = field(default=0, init=False, repr=False)
    _last_logprobs_len: int = field(default=0, init=False, repr=False)

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def text_diff(self) -> str:
        return self.text[self._last_text_len :]

    @property
    def token_ids_diff(self) -> list[int]:
        return self.token_ids[self._last_token_ids_len :]

    @property
    def logprobs_diff(self) -> list[dict[int, Logprob]]:
        return self.logprobs[self._last_logprobs_len :]


class RequestOutput:
    def __init__(self) -> None:
        raise RuntimeError("RequestOutput is designed to be instantiated by the library")

    @classmethod
    def _make(cls, executor: Any, prompt: list[int], params: SamplingParams, streaming: bool) -> RequestOutput:
        self = cls.__new__(cls)
        self.request_id = 0  # given by the executor
        self.prompt = None
        self.prompt_token_ids = prompt
        self.outputs = [CompletionOutput(0)]
        self.context_logits = self.mm_embedding_handle = self.trace_headers = self.disaggregated_params = None
        self.finished = False
        self.cached_tokens = 0
        self.avg_decoded_tokens_per_iter = None
        self.decoding_iter = 0
        self.metrics_dict = {}
        self.sampling_params = params
        self._executor = weakref.ref(executor)
        self._streaming, self._aborted, self._failed = streaming, False, False
        self._queue = ResponseQueue()
        return self

    def abort(self) -> None:
        executor = self._executor()
        if executor is None or executor.is_dropped:
            raise AttributeError("'NoneType' object has no attribute 'abort_request'")
        executor.abort_request(self.request_id)
        self._aborted = True

    def aborted(self) -> bool:
        return self._aborted

    def result(self, timeout: float | None = None) -> RequestOutput:
        while not self.finished:
            self._step()
        return self

    async def aresult(self) -> RequestOutput:
        while not self.finished:
            await self._async_step()
        return self

    def __await__(self) -> Any:
        return self.aresult().__await__()

    def __iter__(self) -> RequestOutput:
        return self

    def __next__(self) -> RequestOutput:
        if self.finished:
            raise StopIteration
        self._step()
        return self

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.finished:
            raise StopAsyncIteration
        await self._async_step()
        return self

    def _step(self) -> None:
        if self._failed:
            time.sleep(_FOREVER_SECONDS)
            self._refuse_to_hang()
        self._handle(self._queue.get())

    async def _async_step(self) -> None:
        if self._failed:
            await asyncio.sleep(_FOREVER_SECONDS)
            self._refuse_to_hang()
        self._handle(await self._queue.get_async())

    def _refuse_to_hang(self) -> None:
        raise RuntimeError(
            "the double: iterated again after the error of this request; `finished` stays False, and the library "
            "would wait for ever"
        )

    def _handle(self, response: dict[str, Any]) -> None:
        if "is_background" in response:
            self._executor().raise_background_error()
        if "error" in response:
            self._failed = True
            raise RequestError(response["error"])
        self.decoding_iter = response["step"]
        output = self.outputs[0]
        output._last_token_ids_len = len(output.token_ids)
        output.token_ids.extend(response["tokens"])
        if response["log_probs"] is not None:
            self._add_log_probs(output, response)
        reason = response.get("finish_reason")
        if reason is not None:
            self._finish(output, response, reason)
        # An error of the background is raised here, from whichever request gets a response, and from no other.
        executor = self._executor()
        if executor is not None:
            executor.raise_background_error()

    def _add_log_probs(self, output: CompletionOutput, response: dict[str, Any]) -> None:
        output._last_logprobs_len = len(output.logprobs)
        for token, found in zip(response["tokens"], response["log_probs"], strict=True):
            output.logprobs.append({one: Logprob(*values) for one, values in found.items()})
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + found[token][0]

    def _finish(self, output: CompletionOutput, response: dict[str, Any], reason: str) -> None:
        self.finished = True
        self.cached_tokens = response["num_cached"]
        output.finish_reason = _FINISH_REASONS[reason]
        if reason == "stop_words":
            output.stop_reason = output.token_ids[-1]
            if not self.sampling_params.include_stop_str_in_output:
                output.token_ids = output.token_ids[:-1]
        if self.sampling_params.return_perf_metrics:
            times = {name: timedelta(seconds=response["times"].get(name, 0)) for name in _TIMES}
            output.request_perf_metrics = SimpleNamespace(timing_metrics=SimpleNamespace(**times))


class IterationResult:
    """The statistics of steps: ends after `timeout` without any, and goes on after the next request."""

    def __init__(self) -> None:
        self._done = False
        self._timeout: float | None = 2
        self._queue = ResponseQueue(maxlen=1000)

    def set_timeout(self, timeout: float | None) -> None:
        self._timeout = timeout

    def mark_undone(self) -> None:
        self._done = False

    def get_results(self) -> list[dict[str, Any]]:
        results = []
        while not self._done:
            try:
                results.append(json.loads(self._queue.get(self._timeout)))
            except queue.Empty:
                self._done = True
        return results

    def __aiter__(self) -> IterationResult:
        return self

    async def __anext__(self) -> dict[str, Any]:
        if self._done:
            raise StopAsyncIteration
        try:
            return json.loads(await self._queue.get_async(self._timeout))
        except TimeoutError:
            self._done = True
            raise StopAsyncIteration from None
