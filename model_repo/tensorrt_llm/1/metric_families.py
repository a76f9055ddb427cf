"""Every metric that the model `tensorrt_llm` exports: name, kind, labels, buckets, meaning, and what it is made of.

docs/metrics.md has the same table for people, and a test compares the two with what a server really exports. Names
that NVIDIA's TensorRT-LLM backend has are used with its labels and meanings.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from generation import EngineStats, Refusal
from measurements import INTER_TOKEN_BUCKETS, Outcome, Taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """`label` tells the family's metrics apart, beside `model` and `version`; its values are all there are."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    label: str = ""
    values: Sequence[str] = ("",)
    buckets: Sequence[float] = ()


# From a token of a small model on a fast GPU to a long answer on a busy server.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_LENGTHS = (10.0, 50.0, 100.0, 500.0, 1000.0)  # NVIDIA's

FAMILIES = (
    Family(
        name="nv_trt_llm_request_metrics",
        kind="gauge",
        description="Requests in tensorrt_llm",
        label="request_type",
        values=("active", "max", "scheduled", "context", "waiting"),
    ),
    Family(
        name="nv_trt_llm_kv_cache_block_metrics",
        kind="gauge",
        description="KV cache blocks of the engine",
        label="kv_cache_block_type",
        values=("max", "free", "used", "tokens_per", "fraction"),
    ),
    Family(
        name="nv_llm_input_token_len",
        kind="histogram",
        description="Tokens of a prompt",
        label="response_metric_type",
        values=("total_input_tokens",),
        buckets=_LENGTHS,
    ),
    Family(
        name="nv_llm_output_token_len",
        kind="histogram",
        description="Tokens of the answers to a prompt",
        label="response_metric_type",
        values=("total_output_tokens",),
        buckets=_LENGTHS,
    ),
    Family(
        name="triton_trtllm_requests_total",
        kind="counter",
        description="Requests that have ended, by how",
        label="finish_reason",
        values=get_args(Outcome),
    ),
    Family(
        name="triton_trtllm_admission_refusals_total",
        kind="counter",
        description="Requests that were not let in, since too many waited or they had waited too long",
        label="reason",
        values=get_args(Refusal),
    ),
    Family(
        name="triton_trtllm_prompt_tokens_total",
        kind="counter",
        description="Tokens of the prompts that came",
    ),
    Family(
        name="triton_trtllm_generated_tokens_total",
        kind="counter",
        description="Tokens that the engine generated",
    ),
    Family(
        name="triton_trtllm_compute_seconds_total",
        kind="counter",
        description="Time that sequences have spent in the slots of the engine, those still in them included",
    ),
    Family(
        name="triton_trtllm_waiting_seconds_total",
        kind="counter",
        description="Time that sequences have waited inside tensorrt_llm for a slot, those still waiting included",
    ),
    Family(
        name="triton_trtllm_queue_seconds",
        kind="histogram",
        description="From the arrival of a request to its first engine slot",
        buckets=_SECONDS,
    ),
    Family(
        name="triton_trtllm_time_to_first_token_seconds",
        kind="histogram",
        description="From the arrival of a prompt to its first token",
        buckets=_SECONDS,
    ),
    Family(
        name="triton_trtllm_request_seconds",
        kind="histogram",
        description="From the arrival of a request to its end",
        buckets=_SECONDS,
    ),
    # A histogram in three families of counters: pb_utils' histograms take one value at a time, and there is no time for
    # a round trip to Triton per token. Queries see no difference.
    Family(
        name="triton_trtllm_inter_token_seconds_bucket",
        kind="counter",
        description="Tokens, by the time since the token before them: at most `le` seconds",
        label="le",
        values=(*(f"{bound:g}" for bound in INTER_TOKEN_BUCKETS), "+Inf"),
    ),
    Family(
        name="triton_trtllm_inter_token_seconds_sum",
        kind="counter",
        description="Time between the tokens of triton_trtllm_inter_token_seconds_bucket",
    ),
    Family(
        name="triton_trtllm_inter_token_seconds_count",
        kind="counter",
        description="Tokens that came after another token of their sequence",
    ),
)

Key = tuple[str, str]  # a family's name, and one of its values


def gauges(stats: EngineStats, num_in_flight: int, max_in_engine: int) -> dict[Key, float]:
    """`num_in_flight` sequences have left Triton's queue, at most `max_in_engine` of them are in the engine."""
    used, most = stats.kv_blocks_used, stats.kv_blocks_max
    scheduled = min(stats.num_scheduled_requests, num_in_flight)
    requests = {
        "active": num_in_flight,
        "max": max_in_engine,
        "scheduled": scheduled,
        "context": min(stats.num_context_requests, scheduled),
        "waiting": num_in_flight - scheduled,
    }
    blocks = {
        "max": most,
        "free": most - used,
        "used": used,
        "tokens_per": stats.kv_tokens_per_block,
        "fraction": used / most if most else 0.0,
    }
    return {("nv_trt_llm_request_metrics", kind): value for kind, value in requests.items()} | {
        ("nv_trt_llm_kv_cache_block_metrics", kind): value for kind, value in blocks.items()
    }


def increments(taken: Taken) -> Iterator[tuple[Key, float]]:
    """What the counters grow by. Requests that have ended come last: who sees them shall see all that was theirs."""
    yield ("triton_trtllm_prompt_tokens_total", ""), taken.prompt_tokens
    yield ("triton_trtllm_generated_tokens_total", ""), taken.generated_tokens
    yield ("triton_trtllm_compute_seconds_total", ""), taken.compute_seconds
    yield ("triton_trtllm_waiting_seconds_total", ""), taken.waiting_seconds
    bounds = next(family.values for family in FAMILIES if family.name == "triton_trtllm_inter_token_seconds_bucket")
    for bound, number in zip(bounds, itertools.accumulate(taken.inter_token_counts), strict=True):
        yield ("triton_trtllm_inter_token_seconds_bucket", bound), number
    yield ("triton_trtllm_inter_token_seconds_sum", ""), taken.inter_token_seconds
    yield ("triton_trtllm_inter_token_seconds_count", ""), sum(taken.inter_token_counts)
    for reason, number in taken.refusals.items():
        yield ("triton_trtllm_admission_refusals_total", reason), number
    for outcome, number in taken.ended.items():
        yield ("triton_trtllm_requests_total", outcome), number


def observations(taken: Taken) -> Iterator[tuple[Key, float]]:
    """What the histograms see, value by value."""
    for key, values in (
        (("triton_trtllm_queue_seconds", ""), taken.queue_seconds),
        (("triton_trtllm_time_to_first_token_seconds", ""), taken.first_token_seconds),
        (("triton_trtllm_request_seconds", ""), taken.request_seconds),
        (("nv_llm_input_token_len", "total_input_tokens"), taken.input_lengths),
        (("nv_llm_output_token_len", "total_output_tokens"), taken.output_lengths),
    ):
        for value in values:
            yield key, value
