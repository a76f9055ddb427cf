"""The classes of fields that live on, whatever happens to the engine backend. Exported where the library has them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .contract import Record, ValidationError, enumeration

BatchingType = enumeration("BatchingType")
CapacitySchedulerPolicy = enumeration("CapacitySchedulerPolicy")
ContextChunkingPolicy = enumeration("ContextChunkingPolicy")
KVCacheType = enumeration("KVCacheType")
QuantAlgo = enumeration("QuantAlgo")
SpeculativeDecodingMode = enumeration("SpeculativeDecodingMode")


class QuantConfig(Record):
    """A plain dataclass in 1.2.1: it takes anything."""


class LoraConfig(Record):
    pass


class DynamicBatchConfig(Record):
    pass


class SchedulerConfig(Record):
    pass


class PeftCacheConfig(Record):
    pass


class AttentionDpConfig(Record):
    pass


class LookaheadDecodingConfig(Record):
    pass


class MedusaDecodingConfig(Record):
    pass


class EagleDecodingConfig(Record):
    pass


class NGramDecodingConfig(Record):
    pass


class MTPDecodingConfig(Record):
    pass


class DraftTargetDecodingConfig(Record):
    pass


class GuidedDecodingParams(Record):
    def _validate(self) -> None:
        if sum(bool(value) for value in vars(self).values()) > 1:
            raise ValueError("Only one guide can be used for a request")


class CudaGraphConfig(Record):
    def _validate(self) -> None:
        if self.batch_sizes and self.max_batch_size not in (0, max(self.batch_sizes)):
            raise ValidationError("CudaGraphConfig.max_batch_size is inconsistent with max(batch_sizes)")


class KvCacheConfig(Record):
    def _validate(self) -> None:
        # The library compares a None with 0 and fails, too.
        if self.free_gpu_memory_fraction is None or not 0 <= self.free_gpu_memory_fraction <= 1:
            raise ValidationError("kv_cache_config.free_gpu_memory_fraction must be a float between 0 and 1")
        if self.max_gpu_total_bytes < 0:
            raise ValidationError("kv_cache_config.max_gpu_total_bytes must be non-negative")
        windows = self.max_attention_window
        if windows is not None and not (windows and min(windows) > 0):
            raise ValidationError("kv_cache_config.max_attention_window must be a non-empty list of positive integers")


class LoRARequest(Record):
    def _validate(self) -> None:
        if not Path(self.lora_path).exists() or not self.lora_path:
            raise ValueError(f"lora_path ({self.lora_path}) does not exist.")


class SamplingParams(Record):
    """The library changes an instance when it is submitted, so one serves one request."""

    def _validate(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else int(value))
        object.__setattr__(self, "pad_id", self.end_id if self.pad_id is None else self.pad_id)
        object.__setattr__(self, "best_of", self.best_of or self.n)
        object.__setattr__(self, "_used", False)
        for wrong, rule in (
            (self.best_of < self.n, f"best_of ({self.best_of}) cannot be less than n ({self.n})"),
            (self.top_p is not None and not 0 <= self.top_p <= 1, f"require 0 <= top_p <= 1, got top_p={self.top_p}"),
            (self.top_k is not None and self.top_k < 0, f"require top_k >= 0, got top_k={self.top_k}"),
            ((self.temperature or 0) < 0, f"require temperature >= 0, got temperature={self.temperature}"),
            (
                self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens < 1,
                f"truncate_prompt_tokens must be >= 1, got {self.truncate_prompt_tokens}",
            ),
            (
                self.best_of > 1 and self._greedy_decoding and not os.environ.get("TLLM_ALLOW_N_GREEDY_DECODING"),
                f"Greedy decoding in the LLM API does not allow multiple returns. Got best_of={self.best_of}",
            ),
        ):
            if wrong:
                raise ValueError(rule)

    @property
    def _greedy_decoding(self) -> bool:
        chosen: tuple[Any, ...] = (self.temperature, self.top_p, self.top_k)
        is_default = all(value is None for value in chosen)
        return not self.use_beam_search and (is_default or self.top_k == 1 or 0 in (self.top_p, self.temperature))
