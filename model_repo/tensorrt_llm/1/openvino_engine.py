"""The engine `openvino`: OpenVINO GenAI's continuous batching on this machine's CPU.

One thread owns the pipeline's loop: take new requests, `step()`, hand on what each request got. `step()` releases
the GIL, so the other threads run while the CPU computes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
import psutil
from engine_manifest import EngineManifest
from generation import (
    Capability,
    Deliver,
    EngineError,
    EngineLimits,
    EngineStats,
    FinishReason,
    GenerationRequest,
    RequestError,
    Step,
)

_log = logging.getLogger(__name__)

_TOKENS_PER_BLOCK = 32  # the CPU plugin's paged attention has no other block size
_KV_CACHE_SHARE_OF_MEMORY = 0.5  # of what is free when the engine loads; the rest is weights' copies and activations

_FINISH_REASONS: Mapping[openvino_genai.GenerationFinishReason, FinishReason] = {
    openvino_genai.GenerationFinishReason.NONE: "",
    openvino_genai.GenerationFinishReason.STOP: "stop",
    openvino_genai.GenerationFinishReason.LENGTH: "length",
}


def runtime_versions() -> dict[str, str]:
    return {"openvino": openvino.__version__, "openvino-genai": openvino_genai.__version__}


@dataclass(slots=True)
class _Running:
    request: GenerationRequest
    deliver: Deliver
    handle: openvino_genai.GenerationHandle = None


class OpenVinoEngine:
    """See `generation.Engine`."""

    capabilities: frozenset[Capability] = frozenset({"beam_search", "log_probs", "min_tokens", "no_end_id"})

    def __init__(self, folder: Path, manifest: EngineManifest):
        self.limits = EngineLimits(
            max_batch_size=manifest.limits["max_batch_size"],
            max_input_len=manifest.limits["max_input_len"],
            max_seq_len=manifest.limits["max_seq_len"],
            max_beam_width=manifest.limits["max_beam_width"],
            vocab_size=manifest.vocab_size,
        )
        self._num_kv_blocks = _num_kv_blocks(self.limits, manifest.kv_bytes_per_token)
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = self._num_kv_blocks
        scheduler.max_num_seqs = self.limits.max_batch_size
        scheduler.max_num_batched_tokens = max(256, self.limits.max_batch_size)
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(folder), scheduler, "CPU", _precision(manifest.dtype)
        )
        self._new: list[_Running] = []
        self._aborted: set[int] = set()
        self._running: dict[int, _Running] = {}  # owned by the thread
        self._stopping = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="openvino", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        config = _generation_config(request)
        try:
            config.validate()
        except RuntimeError as error:
            raise RequestError(f"OpenVINO GenAI refuses these sampling values: {_last_line(error)}") from error
        with self._wake:
            if self._stopping:
                raise RequestError("the engine is shutting down; send the request again")
            self._new.append(_Running(request, deliver))
            self._wake.notify()

    def abort(self, key: int) -> None:
        with self._wake:
            self._aborted.add(key)
            self._wake.notify()

    def stats(self) -> EngineStats:
        metrics = self._pipeline.get_metrics()
        busy = bool(self._running)  # the pipeline's own numbers stay what they were at the last step
        return EngineStats(
            num_active_requests=len(self._running) + len(self._new),
            num_scheduled_requests=metrics.scheduled_requests if busy else 0,
            kv_blocks_max=self._num_kv_blocks,
            kv_blocks_used=round(metrics.cache_usage / 100 * self._num_kv_blocks) if busy else 0,
            kv_tokens_per_block=_TOKENS_PER_BLOCK,
        )

    def shutdown(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    # ---- the engine's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_changes():
                self._pipeline.step()
                for running in list(self._running.values()):
                    self._hand_on(running)
        except Exception as error:
            _log.exception("OpenVINO GenAI failed")
            self._fail(EngineError(f"the engine failed and must be restarted: {_last_line(error)}"))
        else:
            self._fail(EngineError("the engine was shut down; send the request again"))

    def _take_changes(self) -> bool:
        """Waits until there is work. False when the engine shall stop."""
        with self._wake:
            while not (self._new or self._running or self._stopping):
                self._aborted.clear()
                self._wake.wait()
            new, self._new = self._new, []
            aborted, self._aborted = self._aborted, set()
            if self._stopping:
                self._new = new
                return False
        for running in new:
            if running.request.key not in aborted:
                self._start(running)
        for key in aborted:
            if running := self._running.pop(key, None):
                running.handle.cancel()
        return True

    def _start(self, running: _Running) -> None:
        request = running.request
        ids = openvino.Tensor(np.asarray([request.prompt_ids], dtype=np.int64))
        try:
            running.handle = self._pipeline.add_request(request.key, ids, _generation_config(request))
        except RuntimeError as error:
            running.deliver(RequestError(f"OpenVINO GenAI refuses the request: {_last_line(error)}"))
            return
        self._running[request.key] = running

    def _hand_on(self, running: _Running) -> None:
        if not running.handle.can_read():
            if running.handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                del self._running[running.request.key]
                running.deliver(RequestError("the engine dropped the request; its KV cache may be too small for it"))
            return
        outputs = running.handle.read().values()
        if running.request.sampling.beam_width > 1:  # all beams come together, when all are done: best first
            outputs = sorted(outputs, key=lambda output: output.score, reverse=True)
        for beam, output in enumerate(outputs):
            running.deliver(_step(running.request, output, beam))
        if all(output.finish_reason != openvino_genai.GenerationFinishReason.NONE for output in outputs):
            del self._running[running.request.key]

    def _fail(self, error: EngineError) -> None:
        with self._wake:
            self._stopping = True
            left, self._new = [*self._running.values(), *self._new], []
        self._running.clear()
        for running in left:
            running.deliver(error)


def _step(request: GenerationRequest, output: openvino_genai.GenerationOutput, beam: int) -> Step:
    ids, log_probs = list(output.generated_ids), list(output.generated_log_probs)
    finish_reason = _FINISH_REASONS[output.finish_reason]
    if finish_reason == "stop" and ids and ids[-1] in request.end_ids:
        ids.pop()
    return Step(ids, log_probs[: len(ids)] if request.log_probs else None, finish_reason, beam)


def _generation_config(request: GenerationRequest) -> openvino_genai.GenerationConfig:
    sampling = request.sampling
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = request.max_tokens
    config.min_new_tokens = request.min_tokens
    if request.end_ids:
        config.eos_token_id = request.end_ids[0]
        config.stop_token_ids = set(request.end_ids)
    else:
        config.ignore_eos = True
    config.repetition_penalty = sampling.repetition_penalty
    config.presence_penalty = sampling.presence_penalty
    config.frequency_penalty = sampling.frequency_penalty
    config.logprobs = int(request.log_probs)
    if sampling.beam_width > 1:
        config.num_beams = sampling.beam_width
        config.num_return_sequences = request.num_beams_returned
        config.length_penalty = sampling.length_penalty
    elif not sampling.greedy:
        config.do_sample = True
        config.temperature = sampling.temperature
        config.top_p = sampling.top_p
        if sampling.top_k:
            config.top_k = sampling.top_k
        config.rng_seed = sampling.seed % 2**63
    return config


def _precision(dtype: str) -> dict[str, str]:
    """float32 engines compute exactly what the checkpoint says; the plugin's own defaults are bf16 and an 8-bit cache."""
    if dtype == "float32":
        return {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    return {}


def _num_kv_blocks(limits: EngineLimits, kv_bytes_per_token: int) -> int:
    """Enough for every slot at its longest, unless that is more than this machine can spare."""
    blocks_per_sequence = -(-limits.max_seq_len // _TOKENS_PER_BLOCK) + 1
    wanted = limits.max_batch_size * blocks_per_sequence
    affordable = int(
        psutil.virtual_memory().available * _KV_CACHE_SHARE_OF_MEMORY / (kv_bytes_per_token * _TOKENS_PER_BLOCK)
    )
    if affordable < blocks_per_sequence:
        raise EngineError(
            f"the KV cache of one sequence of {limits.max_seq_len} tokens needs "
            f"{blocks_per_sequence * kv_bytes_per_token * _TOKENS_PER_BLOCK / 2**20:.0f} MiB, more than half of the free "
            "memory; build with a smaller --max-seq-len"
        )
    if affordable < wanted:
        _log.warning("KV cache: %d blocks of %d wanted, memory for %d", wanted, _TOKENS_PER_BLOCK, affordable)
    return min(wanted, affordable)


def _last_line(error: Exception) -> str:
    """OpenVINO's messages put the reason last, below the C++ file names."""
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
