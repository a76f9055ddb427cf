"""The engine `synthetic`: tokens at a set rate and no model, to measure and stress what surrounds an engine.

Sequences advance together, one token each per tick, as they do in a batch on a GPU. Ticks are the clock's: where this
process comes late, a sequence gets the tokens of the ticks that were missed in one step, so the rate holds.
"""

from __future__ import annotations

import json
import math
import threading
import time
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from engine_manifest import EngineManifest
from generation import Capability, Deliver, EngineError, EngineLimits, EngineStats, GenerationRequest, Step

TOKENS_PER_BLOCK = 32


def runtime_versions() -> dict[str, str]:
    return {}


@dataclass(slots=True)
class _Sequence:
    request: GenerationRequest
    deliver: Deliver
    start: int  # where in the text it begins
    blocks: int  # of the KV cache, for prompt and answer
    first_tick: int = 0  # that it gets a token at
    num_tokens: int = 0  # generated so far


class SyntheticEngine:
    """See `generation.Engine`."""

    capabilities: frozenset[Capability] = frozenset({"min_tokens", "no_end_id", "penalties", "seed"})

    computes_on_cpu = False  # it stands for those that do not

    def __init__(self, folder: Path, manifest: EngineManifest):
        limits = manifest.limits
        self.limits = EngineLimits(**limits, vocab_size=manifest.vocab_size)
        rates = json.loads((folder / "synthetic.json").read_text())
        self._seconds_per_token = 1.0 / rates["tokens_per_second"]
        self._prefill_seconds = rates["prefill_seconds"]
        self._starts = rates["starts"]
        repeats = 2 + limits["max_seq_len"] // len(rates["token_ids"])
        self._text = rates["token_ids"] * repeats  # any answer is a slice of it
        kv_tokens = rates["kv_tokens"] or limits["max_batch_size"] * limits["max_seq_len"]
        self._kv_blocks_max = max(_blocks(limits["max_seq_len"]), kv_tokens // TOKENS_PER_BLOCK)
        self._changed = threading.Condition()  # for everything below
        self._waiting: OrderedDict[int, _Sequence] = OrderedDict()
        self._running: dict[int, _Sequence] = {}
        self._kv_blocks_used = 0
        self._is_shut_down = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        blocks = _blocks(len(request.prompt_ids) + request.max_tokens)
        seed = 0 if request.sampling.greedy else request.sampling.seed
        digest = zlib.crc32(repr((list(request.prompt_ids), seed)).encode())
        start = self._starts[digest % len(self._starts)]
        with self._changed:
            self._waiting[request.key] = _Sequence(request, deliver, start, blocks)
            self._changed.notify()

    def abort(self, key: int) -> None:
        with self._changed:
            if self._waiting.pop(key, None) is None:
                self._forget(key)

    def pace(self, seconds: float) -> None:
        """Every token by itself, as TensorRT-LLM hands them over: what that costs is to be measured here."""

    def stats(self) -> EngineStats:
        with self._changed:
            return EngineStats(
                num_active_requests=len(self._running) + len(self._waiting),
                num_scheduled_requests=len(self._running),
                num_context_requests=sum(not sequence.num_tokens for sequence in self._running.values()),
                kv_blocks_max=self._kv_blocks_max,
                kv_blocks_used=self._kv_blocks_used,
                kv_tokens_per_block=TOKENS_PER_BLOCK,
            )

    def shutdown(self) -> None:
        with self._changed:
            self._is_shut_down = True
            sequences = [*self._running.values(), *self._waiting.values()]
            self._running.clear()
            self._waiting.clear()
            self._changed.notify()
        self._thread.join()
        for sequence in sequences:
            sequence.deliver(EngineError("the engine was shut down; send the request again"))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._running or self._waiting or self._is_shut_down)
                if self._is_shut_down:
                    return
                now = time.monotonic()
                self._begin_waiting(now)
                tick = self._tick_at(now)
                for sequence in list(self._running.values()):
                    self._advance(sequence, tick)
            time.sleep(self._seconds_per_token - time.monotonic() % self._seconds_per_token)

    def _tick_at(self, now: float) -> int:
        """They are at whole multiples, so that sequences which began at different times advance together."""
        return int(now / self._seconds_per_token)

    def _begin_waiting(self, now: float) -> None:
        """First come, first served: a request that does not fit keeps those behind it waiting, as real engines do."""
        while self._waiting and len(self._running) < self.limits.max_batch_size:
            key, sequence = next(iter(self._waiting.items()))
            if self._kv_blocks_used + sequence.blocks > self._kv_blocks_max:
                return
            del self._waiting[key]
            sequence.first_tick = self._tick_at(now)  # which is now
            if self._prefill_seconds:
                sequence.first_tick = math.ceil((now + self._prefill_seconds) / self._seconds_per_token)
            self._kv_blocks_used += sequence.blocks
            self._running[key] = sequence

    def _advance(self, sequence: _Sequence, tick: int) -> None:
        request = sequence.request
        due = min(1 + tick - sequence.first_tick, request.max_tokens)
        if due <= sequence.num_tokens:
            return
        token_ids = self._text[sequence.start + sequence.num_tokens : sequence.start + due]
        sequence.num_tokens = due
        is_over = due == request.max_tokens
        if is_over:
            self._forget(request.key)
        sequence.deliver(Step(token_ids, finish_reason="length" if is_over else ""))

    def _forget(self, key: int) -> None:
        if sequence := self._running.pop(key, None):
            self._kv_blocks_used -= sequence.blocks


def _blocks(tokens: int) -> int:
    return -(-tokens // TOKENS_PER_BLOCK)
