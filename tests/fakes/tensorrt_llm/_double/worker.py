"""The process of rank 0, where the double computes: `python -m tensorrt_llm._double.worker SETTINGS DESCRIPTOR`.

It talks with its LLM over a socket. Requests are batched in flight: in every step prompts are read as far as the
budget of tokens goes, and every other sequence gets a token. It ends when the socket does, however that happens;
PR_SET_PDEATHSIG would also end it when merely the thread that made the LLM ends.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ..mapping import Mapping
from . import checkpoints, machine, plan_file
from .gpt2 import Gpt2
from .kv_blocks import KvBlocks
from .sampling import Sampler, log_probabilities

# SamplingParams takes them, and TorchSampler of 1.2 does not look at them (TensorRT-LLM issue 9442, pull requests 16485
# and 17172); nor at the seed.
IGNORED_BY_TORCH_SAMPLER = {
    "repetition_penalty": None,
    "presence_penalty": None,
    "frequency_penalty": None,
    "bad_token_ids": None,
}


@dataclass(eq=False)
class Sequence:
    id: int
    prompt: list[int]
    params: dict[str, Any]
    is_streaming: bool
    max_tokens: int
    sampler: Sampler
    arrival: float
    slot: int = -1
    num_read: int = 0  # of the prompt
    num_cached: int = 0
    tokens: list[int] = field(default_factory=list)
    num_sent: int = 0
    log_probs: list[dict[int, tuple[float, int]]] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    is_aborted: bool = False

    @property
    def length(self) -> int:
        return self.num_read + len(self.tokens)


class Refused(Exception):
    """The runtime does not take the request."""


def main(settings: dict[str, Any], connection: Connection) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they are for the server, which then shuts down
    time.sleep(machine.faults().get("load_seconds", 0))
    if message := machine.faults().get("load_error"):
        fail(message)
    ranks, config = (load_engine if settings["is_engine"] else load_checkpoint)(settings)
    connection.send(("ready",))
    Worker(settings, connection, ranks, config).run()


def fail(message: str) -> None:
    """What goes wrong while loading, others only see in this process's log."""
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def load_engine(settings: dict[str, Any]) -> tuple[list[checkpoints.Weights], dict[str, Any]]:
    folder, gpus = Path(settings["folder"]), machine.visible_gpus()
    config = json.loads((folder / "config.json").read_text())["pretrained_config"]
    ranks = []
    for rank in range(settings["tp_size"] * settings["pp_size"]):
        gpu, tensorrt = gpus[rank % len(gpus)], machine.settings()["tensorrt"]
        try:
            header, weights = plan_file.from_bytes((folder / f"rank{rank}.engine").read_bytes())
        except (OSError, ValueError) as error:
            fail(f"[TRT] [E] {error}\n[TensorRT-LLM][ERROR] Assertion failed: Failed to deserialize cuda engine.")
        if header["tensorrt"] != tensorrt:
            fail(
                "[TRT] [E] The engine plan file is not compatible with this version of TensorRT, expecting library "
                f"version {tensorrt} got {header['tensorrt']}, please rebuild."
            )
        if header["sm"] != gpu.sm:
            built = f"{header['sm'] // 10}.{header['sm'] % 10}"
            fail(
                "[TRT] [E] The engine plan file is generated on an incompatible device, expecting compute "
                f"{gpu.compute_capability} got compute {built}, please rebuild."
            )
        allocate(checkpoints.num_bytes(weights), gpu)
        ranks.append(weights)
    return ranks, config


def load_checkpoint(settings: dict[str, Any]) -> tuple[list[checkpoints.Weights], dict[str, Any]]:
    """What the PyTorch backend does: any layout from the same files."""
    from types import SimpleNamespace

    hf_config = checkpoints.read_config(settings["folder"])
    config = checkpoints.describe(hf_config) | {"use_parallel_embedding": False, "embedding_sharding_dim": 0}
    dtype = hf_config.get("dtype") or "bfloat16"  # this backend keeps the checkpoint's
    weights = checkpoints.convert(checkpoints.read_weights(settings["folder"]), settings["dtype"] or dtype)
    tp_size, pp_size = settings["tp_size"], settings["pp_size"]
    ranks = []
    for rank in range(tp_size * pp_size):
        mapping = Mapping(tp_size * pp_size, rank, tp_size=tp_size, pp_size=pp_size)
        try:
            ranks.append(checkpoints.part_of_rank(weights, SimpleNamespace(**config), mapping))
        except AssertionError as error:
            fail(f"AssertionError: {error}")
        gpus = machine.visible_gpus()
        allocate(checkpoints.num_bytes(ranks[-1]), gpus[rank % len(gpus)])
    return ranks, config


def allocate(num_bytes: int, gpu: machine.Gpu) -> None:
    try:
        machine.allocate(num_bytes, gpu)
    except RuntimeError as error:
        fail(f"[TensorRT-LLM][ERROR] {error}")


class Worker:
    def __init__(
        self, settings: dict[str, Any], connection: Connection, ranks: list[checkpoints.Weights], config: dict[str, Any]
    ) -> None:
        self._settings, self._connection, self._vocab_size = settings, connection, config["vocab_size"]
        if config["architecture"] != "GPT2LMHeadModel":
            fail(f"the double: it runs GPT-2 only, not {config['architecture']}")
        self._model = Gpt2(config, ranks, settings["tp_size"], settings["max_seq_len"])
        self._blocks = KvBlocks(
            self._num_blocks(config), settings["tokens_per_block"], reuses=settings["reuses_blocks"]
        )
        self._commands: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._waiting: list[Sequence] = []
        self._active: list[Sequence] = []
        self._free_slots = list(range(settings["max_batch_size"]))
        self._num_steps = self._num_completed = self._num_new = 0
        self._random = np.random.default_rng(42)  # TorchSampler's, for all requests
        self._faults: dict[str, Any] = {}
        self._steps_since_fault = 0

    def run(self) -> None:
        threading.Thread(target=self._receive, daemon=True).start()
        while True:
            self._take_commands()
            if self._waiting or self._active:
                self._step()

    def _receive(self) -> None:
        try:
            while True:
                self._commands.put(self._connection.recv())
        except (EOFError, OSError):
            os._exit(0)

    def _take_commands(self) -> None:
        """All that have come; waits for one if there is nothing else to do."""
        while not self._commands.empty() or not (self._waiting or self._active):
            command, request, *rest = self._commands.get()
            if command == "submit":
                try:
                    self._waiting.append(self._accept(request, *rest))
                except Refused as error:
                    self._connection.send(("step", [{"id": request, "error": str(error)}], None))
            elif command == "abort" and not machine.faults().get("ignore_abort"):
                self._abort(request)

    def _accept(self, request: int, prompt: list[int], params: dict[str, Any], is_streaming: bool) -> Sequence:
        limits = self._settings
        longest = limits["max_input_len"]
        if len(prompt) > longest:
            raise Refused(
                f"Prompt length ({len(prompt)}) exceeds maximum input length ({longest}). Set log level to info and "
                "check TrtGptModel logs for how maximum input length is set"
            )
        if not all(0 <= token < self._vocab_size for token in prompt):
            raise Refused(f"Token id out of range: the vocabulary has {self._vocab_size} tokens")
        if not 0 <= (params["seed"] or 0) < 2**64 or (params["repetition_penalty"] or 1) <= 0:
            raise Refused("Invalid sampling parameters: the seed, or the repetition penalty, is out of range")
        banned = (*(params["bad_token_ids"] or ()), *(params["stop_token_ids"] or ()))
        if not all(0 <= token < self._vocab_size for token in banned):
            raise Refused(f"Stop or bad token id out of range: the vocabulary has {self._vocab_size} tokens")
        room = limits["max_seq_len"] - len(prompt)
        if room < 1:
            raise Refused(f"Prompt length ({len(prompt)}) leaves no room in max_seq_len ({limits['max_seq_len']})")
        asked = room if params["max_tokens"] is None else params["max_tokens"]
        if asked < 1:
            raise Refused(f"maxNewTokens must be positive, got {asked}")
        if asked > room:
            machine.log("W", f"max_tokens {asked} is clipped to {room}")
        max_tokens = min(asked, room)
        if self._blocks.needed(len(prompt) + max_tokens) > self._blocks.total:
            raise Refused(f"The request needs more KV cache than the {self._blocks.total} blocks that there are")
        if limits["has_torch_sampler"]:
            params = params | IGNORED_BY_TORCH_SAMPLER
        sampler = Sampler(params, prompt, self._vocab_size, is_engine=limits["is_engine"])
        if limits["has_torch_sampler"]:
            sampler.share(self._random)
        return Sequence(request, prompt, params, is_streaming, max_tokens, sampler, time.monotonic())

    def _abort(self, request: int) -> None:
        for sequence in (*self._waiting, *self._active):
            if sequence.id == request:
                if self._settings["is_engine"] and sequence.is_streaming and sequence.params["logprobs"]:
                    fail("terminate called after throwing an instance of 'c10::Error': negative dimension")
                sequence.is_aborted = True

    def _step(self) -> None:
        begin, allocated = time.perf_counter(), self._blocks.allocated
        self._num_completed = 0
        error = self._obey_faults()
        responses = [self._end(one, "cancelled") for one in self._active if one.is_aborted]
        for one in [one for one in self._waiting if one.is_aborted]:
            response = self._end(one, "cancelled")
            # The PyTorch backend's queue only forgets it (executor_request_queue.py, update_waiting_queue).
            responses += [response] if self._settings["is_engine"] else []
        self._admit()
        counts = {"context": 0, "context_tokens": 0, "generation": 0}
        for sequence, logits in self._compute(counts):
            if (response := self._advance(sequence, logits)) is not None:
                responses.append(response)
        self._num_steps += 1
        statistics = self._statistics(begin, allocated, counts) if self._settings["has_statistics"] else None
        if error is not None:
            self._connection.send(("background", error))
        self._connection.send(("step", responses, None if self._faults.get("no_stats") else statistics))
        if error is not None:
            threading.Event().wait()

    def _obey_faults(self) -> str | None:
        if (faults := machine.faults()) is not self._faults:
            self._faults, self._steps_since_fault = faults, 0
        self._steps_since_fault += 1
        time.sleep(faults.get("step_seconds", 0))
        if self._steps_since_fault == faults.get("hang_at_step"):
            threading.Event().wait()
        if self._steps_since_fault == faults.get("background_error_at_step"):
            return faults.get("background_error", "CUDA error: an illegal memory access was encountered")
        return None

    def _admit(self) -> None:
        self._num_new = 0
        while self._waiting and self._free_slots:
            sequence = self._waiting[0]
            cached = self._blocks.admit(sequence.id, sequence.prompt, sequence.max_tokens)
            if cached is None:
                break
            sequence.num_cached, sequence.slot = cached, self._free_slots.pop(0)
            sequence.times["first_scheduled_time"] = time.monotonic()
            self._active.append(self._waiting.pop(0))
            self._num_new += 1

    def _compute(self, counts: dict[str, int]) -> list[tuple[Sequence, np.ndarray]]:
        """Of every sequence that gets a token in this step, the logits."""
        generating = [one for one in self._active if one.tokens]
        budget = self._settings["max_num_tokens"] - len(generating)
        found = []
        for one in (one for one in self._active if not one.tokens):
            count = min(len(one.prompt) - one.num_read, budget)
            if count < 1 or (count < len(one.prompt) - one.num_read and not self._settings["chunks"]):
                break
            logits = self._model.prefill(one.slot, one.prompt[one.num_read : one.num_read + count], one.num_read)
            one.num_read, budget = one.num_read + count, budget - count
            self._blocks.grow(one.id, one.num_read)
            counts["context"] += 1
            counts["context_tokens"] += count
            if one.num_read == len(one.prompt):
                found.append((one, logits))
        if generating:
            counts["generation"] = len(generating)
            slots, last = [one.slot for one in generating], [one.tokens[-1] for one in generating]
            found += zip(
                generating, self._model.decode(slots, last, [one.length - 1 for one in generating]), strict=True
            )
        return found

    def _advance(self, sequence: Sequence, logits: np.ndarray) -> dict[str, Any] | None:
        """Give the sequence its next token. The response that this makes, if any."""
        sampler, params, count = sequence.sampler, sequence.params, len(sequence.tokens)
        token = int(logits.argmax()) if sampler.is_plain(count) else sampler.choose(logits, count)
        if count + 1 == self._faults.get("fail_request_at_token"):
            self._drop(sequence)
            return {"id": sequence.id, "error": self._faults.get("request_error", "an error of this request")}
        sequence.times["last_token_time"] = time.monotonic()
        sequence.times.setdefault("first_token_time", sequence.times["last_token_time"])
        is_end = token == sampler.end_id
        # The engine's runtime keeps the end token for itself, the PyTorch one hands it out.
        if not (is_end and self._settings["is_engine"]):
            sampler.note(token)
            sequence.tokens.append(token)
            self._blocks.grow(sequence.id, sequence.length)
            if params["logprobs"] is not None:
                sequence.log_probs.append(log_probabilities(logits, token, params["logprobs"]))
        if is_end:
            return self._end(sequence, "end_id")
        if token in (params["stop_token_ids"] or ()):
            return self._end(sequence, "stop_words")
        if len(sequence.tokens) >= sequence.max_tokens:
            return self._end(sequence, "length")
        interval = self._settings["stream_interval"]
        is_due = len(sequence.tokens) == 1 or len(sequence.tokens) % interval == 0
        return self._response(sequence) if sequence.is_streaming and is_due else None

    def _end(self, sequence: Sequence, reason: str) -> dict[str, Any]:
        self._drop(sequence)
        self._num_completed += 1
        return self._response(sequence) | {
            "finish_reason": reason,
            "num_cached": sequence.num_cached,
            "times": {"arrival_time": sequence.arrival, **sequence.times},
        }

    def _response(self, sequence: Sequence) -> dict[str, Any]:
        first, sequence.num_sent = sequence.num_sent, len(sequence.tokens)
        has_log_probs = sequence.params["logprobs"] is not None
        return {
            "id": sequence.id,
            "tokens": sequence.tokens[first:],
            "log_probs": sequence.log_probs[first:] if has_log_probs else None,
            "step": self._num_steps,
        }

    def _drop(self, sequence: Sequence) -> None:
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            return
        self._active.remove(sequence)
        self._free_slots.append(sequence.slot)
        self._free_slots.sort()
        self._blocks.release(sequence.id)

    def _num_blocks(self, config: dict[str, Any]) -> int:
        settings = self._settings
        size = {"fp8": 1, "int8": 1}.get(settings["kv_dtype"], 2)
        per_layer = 2 * config["num_key_value_heads"] * config["head_size"] * size
        per_token = per_layer * config["num_hidden_layers"] / (settings["tp_size"] * settings["pp_size"])
        memory = min(gpu.memory_mib for gpu in machine.visible_gpus()) * 2**20 * settings["kv_fraction"]
        asked = settings["kv_max_tokens"]
        num_tokens = memory / per_token if asked is None else min(asked, memory / per_token)
        return max(1, int(num_tokens) // settings["tokens_per_block"])

    def _statistics(self, begin: float, allocated: int, counts: dict[str, int]) -> str:
        limits, scheduled = self._settings, counts["context"] + counts["generation"]
        gpu = machine.visible_gpus()[0]
        return json.dumps(
            {
                "timestamp": time.strftime("%m-%d-%Y %H:%M:%S"),
                "iter": self._num_steps,
                "iterLatencyMS": (time.perf_counter() - begin) * 1000,
                "newActiveRequestsQueueLatencyMS": 0.0,
                "numNewActiveRequests": self._num_new,
                "numActiveRequests": len(self._active),
                "numQueuedRequests": len(self._waiting),
                "numCompletedRequests": self._num_completed,
                "maxNumActiveRequests": limits["max_batch_size"],
                "maxBatchSizeStatic": limits["max_batch_size"],
                "maxBatchSizeTunerRecommended": 0,
                "maxBatchSizeRuntime": limits["max_batch_size"],
                "maxNumTokensStatic": limits["max_num_tokens"],
                "maxNumTokensTunerRecommended": 0,
                "maxNumTokensRuntime": limits["max_num_tokens"],
                "gpuMemUsage": int(gpu.memory_mib * 2**20 * limits["kv_fraction"]),
                "cpuMemUsage": 0,
                "pinnedMemUsage": 0,
                "kvCacheStats": self._blocks.statistics(allocated),
                "staticBatchingStats": None,
                "inflightBatchingStats": {
                    "numScheduledRequests": scheduled,
                    "numContextRequests": counts["context"],
                    "numGenRequests": counts["generation"],
                    "numPausedRequests": 0,
                    "numCtxTokens": counts["context_tokens"],
                    "microBatchId": 0,
                    "avgNumDecodedTokensPerIter": 1.0,
                },
                "specDecodingStats": None,
            }
        )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Connection(int(sys.argv[2])))
