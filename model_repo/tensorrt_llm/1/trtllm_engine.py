"""The engines `tensorrt` and `pytorch`: TensorRT-LLM's LLM API on NVIDIA GPUs.

One thread with one event loop owns the `LLM` from its start to its end, since the library binds itself to the loop of
its first request. Everybody else leaves a message there. Every request is streamed inside the process, also those whose
client wants one answer: stop words, cancellation, metrics and the watch for hangs then work alike for all.

The ranks of TP x PP engines are processes that the library starts.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from engine_manifest import EngineManifest
from generation import (
    Capability,
    Deliver,
    EngineError,
    EngineLimits,
    EngineStats,
    GenerationRequest,
    RequestError,
    Sampling,
)
from gpus import Gpu
from trtllm_llm import LlmPlan, import_library, plan_llm
from trtllm_sampling import SequenceReader, sampling_arguments

_log = logging.getLogger(__name__)

_LOAD_SECONDS = 3600.0  # the largest models from a slow disk; ranks that wait for each other would wait for ever
_LOAD_NEWS_SECONDS = 60.0
_ABORT_SECONDS = 5.0  # for a request that is aborted to have its last response
_STOP_SECONDS = 20.0  # for the library's own shutdown; then its processes are killed
_STATS_SECONDS = 10.0  # to wait for those of the next step; a long prompt may take seconds
_STATS_PAUSE_SECONDS = 0.2  # after there were none: there are none before the next request begins
_FIRST_STATS_SECONDS = 2.0
_WATCH_SECONDS = 0.5
_SILENCE_SECONDS = 1.0  # after which a process that has died is why
_WARM_UP_TOKENS = 2


@dataclass(slots=True, eq=False)
class _Running:
    """One request. `deliver` is None when nobody waits for it any more; the library may still work on it."""

    request: GenerationRequest
    deliver: Deliver | None
    handle: Any = None  # the library's RequestOutput
    task: asyncio.Task | None = None  # that follows it


class TensorRtLlmEngine:
    """See `generation.Engine`. Raises ManifestError and EngineError when the engine cannot be loaded."""

    computes_on_cpu = False

    def __init__(self, folder: Path, manifest: EngineManifest, gpus: list[Gpu]):
        plan = plan_llm(folder, manifest, gpus)
        self._library = import_library(plan)
        self.limits = EngineLimits(**manifest.limits, vocab_size=manifest.vocab_size)
        self.capabilities: frozenset[Capability] = plan.capabilities
        self._lock = threading.Lock()  # for the next two
        self._deliverable: dict[int, _Running] = {}
        self._error: EngineError | None = None
        # Owned by the loop's thread.
        self._running: set[_Running] = set()  # what the library works on, whether somebody waits for it or not
        self._last_news = 0.0  # from the library, monotonic seconds
        self._llm: Any = None
        self._stats = EngineStats(
            num_active_requests=0,
            num_scheduled_requests=0,
            num_context_requests=0,
            kv_blocks_max=0,
            kv_blocks_used=0,
            kv_tokens_per_block=0,
        )
        self._loop = asyncio.new_event_loop()
        self._is_over = asyncio.Event()
        self._is_loaded = threading.Event()
        self._is_ending = threading.Event()
        self._load_error: EngineError | None = None
        self._thread = threading.Thread(target=self._run, args=(plan, _any_token(manifest)), name="engine", daemon=True)
        self._thread.start()
        self._wait_until_loaded()

    # ---- called by other threads -------------------------------------------------------------------------------

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        running = _Running(request, deliver)
        arguments = sampling_arguments(request)
        with self._lock:
            if self._error is None:
                self._deliverable[request.key] = running
                self._loop.call_soon_threadsafe(self._begin, running, arguments)
                return
        deliver(self._error)

    def abort(self, key: int) -> None:
        with self._lock:
            running = self._deliverable.pop(key, None)
            if running is None or self._error is not None:
                return
            running.deliver = None
            self._loop.call_soon_threadsafe(self._abort, running)

    def pace(self, seconds: float) -> None:
        """Every step as it comes: handing over costs the GPU nothing."""

    def stats(self) -> EngineStats:
        return self._stats

    def shutdown(self) -> None:
        """Bounded: whatever of the library does not end in time is killed."""
        self._fail_all(EngineError("the engine was shut down; send the request again"))
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._is_over.set)
        self._thread.join(_ABORT_SECONDS + _STOP_SECONDS)
        if self._thread.is_alive():
            _log.warning("TensorRT-LLM does not end within %g s; its processes are killed", _STOP_SECONDS)
            _kill_children()
        gc.collect()  # the library's objects, whose processes may otherwise live as long as this one

    def _wait_until_loaded(self) -> None:
        started = time.monotonic()
        while not self._is_loaded.wait(_LOAD_NEWS_SECONDS):
            seconds = time.monotonic() - started
            if seconds > _LOAD_SECONDS:
                _kill_children()
                raise EngineError(
                    f"TensorRT-LLM has not loaded the engine within {_LOAD_SECONDS:g} s and was given up; "
                    "its own messages are in the server's log above"
                )
            _log.info("TensorRT-LLM has been loading the engine for %.0f s", seconds)
        if self._load_error is not None:
            raise self._load_error

    def _deliver(self, running: _Running, what: Any, *, is_last: bool = False) -> None:
        with self._lock:
            deliver = running.deliver
            if is_last:
                running.deliver = None
                self._deliverable.pop(running.request.key, None)
        if deliver is not None:
            deliver(what)

    def _fail_all(self, error: EngineError) -> None:
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            deliverable, self._deliverable = self._deliverable, {}
        for running in deliverable.values():
            deliver, running.deliver = running.deliver, None
            if deliver is not None:
                deliver(error)

    # ---- the thread of the loop --------------------------------------------------------------------------------

    def _run(self, plan: LlmPlan, warm_up_token: int) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve(plan, warm_up_token))
        except Exception as error:
            _log.exception("the engine's thread failed")
            self._load_error = EngineError(_sentence("the engine's thread failed", error))
            self._fail_all(self._load_error)
        finally:
            self._is_loaded.set()
            if self._llm is not None:
                try:
                    self._llm.shutdown()  # outside of the loop, as it may block
                except Exception:
                    _log.exception("TensorRT-LLM cannot be shut down")
                self._llm = None

    async def _serve(self, plan: LlmPlan, warm_up_token: int) -> None:
        try:
            self._llm = self._library.start(plan)
            await self._warm_up(warm_up_token)
        except Exception as error:
            _log.debug("the engine cannot be loaded", exc_info=True)
            self._load_error = (
                error if isinstance(error, EngineError) else EngineError(_sentence("cannot be loaded", error))
            )
            return
        self._is_loaded.set()
        watch = threading.Thread(target=self._watch_processes, name="engine-watch", daemon=True)
        watch.start()
        statistics = asyncio.create_task(self._follow_statistics())
        await self._is_over.wait()
        self._is_ending.set()
        statistics.cancel()
        tasks = [running.task for running in self._running]
        for running in list(self._running):
            self._abort(running)
        if tasks:
            await asyncio.wait(tasks, timeout=_ABORT_SECONDS)

    async def _warm_up(self, token_id: int) -> None:
        """An engine that cannot answer is found out now, and the first statistics are there before the first client."""
        request = GenerationRequest(key=0, prompt_ids=[token_id], max_tokens=_WARM_UP_TOKENS, sampling=Sampling())
        num_tokens = 0
        async for output in self._generate(request, sampling_arguments(request)):
            num_tokens = len(output.outputs[0].token_ids)
        if num_tokens != _WARM_UP_TOKENS:
            raise EngineError(f"the engine answers a request for {_WARM_UP_TOKENS} tokens with {num_tokens}")
        async for statistics in self._llm.get_stats_async(timeout=_FIRST_STATS_SECONDS):
            self._take_statistics(statistics)
            break

    def _generate(self, request: GenerationRequest, arguments: dict[str, Any]) -> Any:
        # `streaming` by its name: its place differs between releases. A SamplingParams of its own: the library writes
        # into it. Must be called from this loop, to which the library sends all answers.
        return self._llm.generate_async(
            list(request.prompt_ids), sampling_params=self._library.sampling_params(**arguments), streaming=True
        )

    def _begin(self, running: _Running, arguments: dict[str, Any]) -> None:
        if running.deliver is None:  # aborted, or failed with all others
            return
        try:
            running.handle = self._generate(running.request, arguments)
        except (ValueError, TypeError, self._library.request_error) as error:
            self._deliver(running, RequestError(_sentence("refuses the request", error)), is_last=True)
            return
        except Exception as error:  # the library is shutting down, or a process of it has died
            self._break_down(error)
            return
        if not self._running:
            self._last_news = time.monotonic()
        self._running.add(running)
        running.task = self._loop.create_task(self._follow(running))

    async def _follow(self, running: _Running) -> None:
        """To the end, also when nobody waits for it: the library frees what a request holds with its last response."""
        reader = SequenceReader(running.request)
        is_over = False
        try:
            async for output in running.handle:
                self._last_news = time.monotonic()
                is_over = bool(output.finished)
                if running.deliver is None:
                    continue
                step = reader.read(output.outputs[0], is_over=is_over)
                if step is not None:
                    self._deliver(running, step, is_last=is_over)
            if not is_over:
                raise RequestError("TensorRT-LLM ended the request without its last tokens; send it again")
        except RequestError as error:
            self._abort(running)
            self._deliver(running, error, is_last=True)
        except self._library.request_error as error:  # of this one alone; to ask for more of it would wait for ever
            self._deliver(running, RequestError(_sentence("ended the request", error)), is_last=True)
        except Exception as error:
            self._break_down(error)
        finally:
            self._running.discard(running)
            if not self._running:
                self._stats = self._stats.when_idle()

    def _abort(self, running: _Running) -> None:
        if running.handle is None or running.handle.finished:
            return
        try:
            running.handle.abort()  # asks for it; the request's last response comes later
        except Exception:  # the library has shut itself down
            _log.debug("a request cannot be aborted", exc_info=True)
        # The PyTorch backend of 1.2 never sends one for a request that still waits in its queue.
        self._loop.call_later(_ABORT_SECONDS, running.task.cancel)

    def _break_down(self, error: Exception) -> None:
        """Whatever request meets it first: the library is lost, and tells none of the others."""
        _log.error("TensorRT-LLM failed", exc_info=error)
        self._fail_all(EngineError(_sentence("failed and must be restarted", error)))

    def _watch_processes(self) -> None:
        """A rank that dies is told to nobody who waits: the library looks when its next response comes, or request.

        In a thread of its own, since the library may block the loop while it shuts down after an error.
        """
        ranks = _python_children()
        while not self._is_ending.wait(_WATCH_SECONDS):
            dead = [process.pid for process in ranks if not _is_alive(process)]
            # Not for a process that was there by chance, and ends while answers go on.
            if dead and self._running and time.monotonic() - self._last_news > _SILENCE_SECONDS:
                self._break_down(RuntimeError(f"its process {dead[0]} has died"))
                return

    # ---- statistics --------------------------------------------------------------------------------------------

    async def _follow_statistics(self) -> None:
        has_failed = False
        while True:
            try:
                # Ends when there was nothing for a while; a new one has something again after the next request.
                async for statistics in self._llm.get_stats_async(timeout=_STATS_SECONDS):
                    self._take_statistics(statistics)
            except Exception as error:
                if not has_failed:
                    _log.warning("TensorRT-LLM gives no statistics: %s: %s", type(error).__name__, error)
                has_failed = True
            await asyncio.sleep(_STATS_PAUSE_SECONDS)

    def _take_statistics(self, statistics: dict[str, Any]) -> None:
        batch = statistics.get("inflightBatchingStats") or {}
        cache = statistics.get("kvCacheStats") or {}
        stats = EngineStats(
            num_active_requests=len(self._running),
            num_scheduled_requests=int(batch.get("numScheduledRequests") or 0),
            num_context_requests=int(batch.get("numContextRequests") or 0),
            kv_blocks_max=int(cache.get("maxNumBlocks") or 0),
            kv_blocks_used=int(cache.get("usedNumBlocks") or 0),
            kv_tokens_per_block=int(cache.get("tokensPerBlock") or 0),
        )
        self._stats = stats if self._running else stats.when_idle()


def _any_token(manifest: EngineManifest) -> int:
    """A prompt for trying out the engine."""
    known = (manifest.bos_token_id, *manifest.eos_token_ids, manifest.pad_token_id, 0)
    return next(token_id for token_id in known if token_id is not None)


def _sentence(what: str, error: BaseException) -> str:
    """With the errors that led to it: "Executor worker returned error" says nothing, and its cause does."""
    reasons = []
    cause: BaseException | None = error
    while cause is not None and len(reasons) < 3:
        reasons.append(f"{type(cause).__name__}: {' '.join(str(cause).split())[:400]}")
        cause = cause.__cause__
    return f"TensorRT-LLM {what}: {', because of '.join(reasons)}"


def _python_children() -> list[psutil.Process]:
    """The ranks' processes among others; compilers that the library may have started are not meant."""
    return [process for process in psutil.Process().children(recursive=True) if process.name().startswith("python")]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill_children() -> None:
    for process in psutil.Process().children(recursive=True):
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
