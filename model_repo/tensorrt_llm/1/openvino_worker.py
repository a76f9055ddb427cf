"""The process that runs OpenVINO GenAI: `python openvino_worker.py FD FOLDER`, started by openvino_engine.py.

`ContinuousBatchingPipeline.step()` keeps Python's GIL while it computes (seen with 2026.4: another thread ran once in
6 ms), so in the model's own process no response could be sent during a step. Here it has a process of its own.

Messages are pickled tuples over a socket pair. In: ("submit", GenerationRequest), ("abort", key), ("pace", seconds);
end of file ends this process. Out: ("ready", EngineStats) once, then ("steps", [(key, Step or RequestError, is the
last), ...], EngineStats) when there is something to say, ("failed", sentence) when the pipeline cannot go on.

Whatever runs beside a step on the same cores slows it down by more than its own time, since the threads of a step wait
for each other. So tokens are not handed over one by one where nobody waits for each: see `generation.Engine.pace`.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

# openvino reports its use to its makers when this package is there; a server of ours tells nobody what it does.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
import openvino
import openvino_genai
import psutil
from engine_manifest import EngineManifest, read_manifest
from generation import EngineError, EngineStats, FinishReason, GenerationRequest, RequestError, Step

TOKENS_PER_BLOCK = 32  # the CPU plugin's paged attention has no other block size
_PR_SET_PDEATHSIG = 1
_SECONDS_BETWEEN_READS = 0.2  # of a request that is not streamed; only statistics want its tokens earlier
_SECONDS_BETWEEN_STATS = 0.1  # as often as they are exported
_KV_CACHE_SHARE_OF_MEMORY = 0.5  # of what is free when the engine loads; the rest is for weights and activations

_FINISH_REASONS: Mapping[openvino_genai.GenerationFinishReason, FinishReason] = {
    openvino_genai.GenerationFinishReason.NONE: "",
    openvino_genai.GenerationFinishReason.STOP: "stop",
    openvino_genai.GenerationFinishReason.LENGTH: "length",
}


def main(file_descriptor: int, folder: Path) -> None:
    # Should this process hang, or be stopped, the kernel ends it with its model's.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Signals are for the server; this process ends when its socket does, so that requests can finish first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = Connection(file_descriptor)
    try:
        worker = Worker(connection, folder, read_manifest(folder))
        connection.send(("ready", worker.stats()))
        worker.run()
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the server is gone, or wants us to go
        pass
    except Exception as error:
        connection.send(("failed", _last_line(error)))


@dataclass(slots=True)
class _Running:
    request: GenerationRequest
    handle: object  # dropping it drops the request
    has_begun: bool = False  # its first token is out
    next_read: float = 0.0  # monotonic seconds


def load_pipeline(
    folder: Path, manifest: EngineManifest, num_kv_blocks: int
) -> openvino_genai.ContinuousBatchingPipeline:
    """As it is served, and warm."""
    max_batch_size = manifest.limits["max_batch_size"]
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = num_kv_blocks
    scheduler.max_num_seqs = max_batch_size
    scheduler.max_num_batched_tokens = max(256, max_batch_size)
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = True
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", _precision(manifest.dtype))
    _warm_up(pipeline)
    return pipeline


def _warm_up(pipeline: openvino_genai.ContinuousBatchingPipeline) -> None:
    """The CPU plugin finishes compiling in its first steps; no client should wait for that (seen: a second)."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = 2
    config.ignore_eos = True
    handle = pipeline.add_request(0, openvino.Tensor(np.zeros((1, 1), np.int64)), config)
    while pipeline.has_non_finished_requests():
        pipeline.step()
    handle.read_all()


class Worker:
    def __init__(self, connection: Connection, folder: Path, manifest: EngineManifest):
        self._connection = connection
        self._running: dict[int, _Running] = {}
        self._pace = 0.0
        self._last_stats: EngineStats | None = None
        self._next_stats = 0.0
        self._num_kv_blocks = num_kv_blocks(manifest)
        self._pipeline = load_pipeline(folder, manifest, self._num_kv_blocks)

    def run(self) -> None:
        """Until the socket ends."""
        while True:
            news = self._take_messages()
            if self._running:
                self._pipeline.step()
                now = time.monotonic()
                for running in list(self._running.values()):
                    if self._is_to_be_read(running, now):
                        news += self._news_of(running, now)
            if news or not self._running or time.monotonic() >= self._next_stats:
                self._tell(news)

    def _tell(self, news: list) -> None:
        stats = self.stats()
        if news or stats != self._last_stats:
            self._connection.send(("steps", news, stats))
        self._last_stats = stats
        self._next_stats = time.monotonic() + _SECONDS_BETWEEN_STATS

    def _is_to_be_read(self, running: _Running, now: float) -> bool:
        if now >= running.next_read or running.request.is_watched:
            return True
        if not running.has_begun and running.handle.can_read():
            return True
        return running.handle.get_status() != openvino_genai.GenerationStatus.RUNNING

    def _take_messages(self) -> list[tuple[int, RequestError, bool]]:
        """All that have come; waits for one when there is nothing to compute. Returns what was refused."""
        refused = []
        wait = None if not self._running else 0
        while self._connection.poll(wait):
            wait = 0
            match self._connection.recv():
                case ("submit", GenerationRequest() as request):
                    try:
                        self._start(request)
                    except RuntimeError as error:
                        sentence = f"OpenVINO GenAI refuses the request: {_last_line(error)}"
                        refused.append((request.key, RequestError(sentence), True))
                case ("pace", seconds):
                    self._pace = seconds
                case ("abort", key):
                    if running := self._running.pop(key, None):
                        running.handle.cancel()
                        if not self._running:
                            self._pipeline.step()  # the pipeline frees a cancelled request in its next step
        return refused

    def _start(self, request: GenerationRequest) -> None:
        ids = openvino.Tensor(np.asarray([request.prompt_ids], dtype=np.int64))
        handle = self._pipeline.add_request(request.key, ids, _generation_config(request))
        self._running[request.key] = _Running(request, handle)

    def _news_of(self, running: _Running, now: float) -> list[tuple[int, Step | RequestError, bool]]:
        request, handle = running.request, running.handle
        running.next_read = _next_multiple(self._pace if request.is_streamed else _SECONDS_BETWEEN_READS, now)
        if not handle.can_read():
            if handle.get_status() == openvino_genai.GenerationStatus.RUNNING:
                return []
            del self._running[request.key]
            sentence = "the engine dropped the request, since its KV cache has no room for it; send a shorter one"
            return [(request.key, RequestError(sentence), True)]
        running.has_begun = True
        steps = _read(request, handle)
        is_over = all(step.finish_reason for step in steps)
        if is_over:
            del self._running[request.key]
        return [(request.key, step, is_over and step is steps[-1]) for step in steps]

    def stats(self) -> EngineStats:
        metrics = self._pipeline.get_metrics()
        busy = bool(self._running)  # the pipeline's own numbers stay what they were at the last step
        return EngineStats(
            num_active_requests=len(self._running),
            num_scheduled_requests=metrics.scheduled_requests if busy else 0,
            num_context_requests=sum(not running.has_begun for running in self._running.values()),
            kv_blocks_max=self._num_kv_blocks,
            kv_blocks_used=round(metrics.cache_usage / 100 * self._num_kv_blocks) if busy else 0,
            kv_tokens_per_block=TOKENS_PER_BLOCK,
        )


def _next_multiple(period: float, now: float) -> float:
    """So that all requests of one pace are read together, and the rest of the machine is woken once for all."""
    return now - now % period + period if period else now


def _read(request: GenerationRequest, handle: object) -> list[Step]:
    """Everything that can be read: a step for each beam, or one."""
    if request.sampling.beam_width > 1:  # all beams come together, when all are done: best first
        outputs = sorted(handle.read().values(), key=lambda output: output.score, reverse=True)
        return [_step(request, [output], beam) for beam, output in enumerate(outputs)]
    outputs = []
    while handle.can_read():  # each has the token of one step of the pipeline
        outputs += handle.read().values()
    return [_step(request, outputs, 0)]


def _step(request: GenerationRequest, outputs: Sequence[openvino_genai.GenerationOutput], beam: int) -> Step:
    ids = [token_id for output in outputs for token_id in output.generated_ids]
    log_probs = [log_prob for output in outputs for log_prob in output.generated_log_probs]
    finish_reason = _FINISH_REASONS[outputs[-1].finish_reason]
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
    """float32 engines compute what the checkpoint says; the plugin's own defaults are bf16 and an 8-bit cache."""
    if dtype == "float32":
        return {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    return {}


def num_kv_blocks(manifest: EngineManifest) -> int:
    """Enough for every slot at its longest, unless that is more than this machine can spare.

    Raises EngineError when it has too little memory for one.
    """
    bytes_per_block = manifest.kv_bytes_per_token * TOKENS_PER_BLOCK
    max_seq_len = manifest.limits["max_seq_len"]
    blocks_per_sequence = -(-max_seq_len // TOKENS_PER_BLOCK) + 1
    wanted = manifest.limits["max_batch_size"] * blocks_per_sequence
    affordable = int(psutil.virtual_memory().available * _KV_CACHE_SHARE_OF_MEMORY / bytes_per_block)
    if affordable < blocks_per_sequence:
        raise EngineError(
            f"the KV cache of one sequence of {max_seq_len} tokens needs "
            f"{blocks_per_sequence * bytes_per_block >> 20} MiB, more than half of the free memory; "
            "build with a smaller --max-seq-len"
        )
    if affordable < wanted:
        print(f"openvino: KV cache of {affordable} blocks, memory is short of {wanted}", file=sys.stderr)
    return min(wanted, affordable)


def _last_line(error: Exception) -> str:
    """OpenVINO's messages put the reason last, below the C++ file names."""
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
