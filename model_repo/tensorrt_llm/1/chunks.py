"""What the dispatcher answers with, and the same as arrays by output name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from chunk_header import ChunkHeader
from generation import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceChunk:
    """What one response says about one sequence."""

    header: ChunkHeader
    token_ids: Sequence[int]  # with the prompt before them when the request wants it back
    num_output_tokens: int  # generated tokens in this chunk
    log_probs: Sequence[float]
    cumulative_log_prob: float
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One response: one sequence of a stream, or all sequences of a prompt that is answered at once."""

    batch_index: int
    sequence_index: int
    num_input_tokens: int
    sequences: Sequence[SequenceChunk]
    times_ns: tuple[int, int, int, int]  # Unix time of arrival, first scheduled, first token, last token; 0: not yet


# Declared by NVIDIA's repository, and Triton before 24.11 needs every declared output in every response of an
# ensemble. No engine here knows these, so they are the same constants each time: -1 means "not reported".
CONSTANT_ARRAYS: dict[str, np.ndarray] = {
    "kv_cache_alloc_new_blocks": np.full((1, 1), -1, np.int32),
    "kv_cache_reused_blocks": np.full((1, 1), -1, np.int32),
    "kv_cache_alloc_total_blocks": np.full((1, 1), -1, np.int32),
    "total_accepted_draft_tokens": np.full((1, 1), -1, np.int32),
    "total_draft_tokens": np.full((1, 1), -1, np.int32),
    "acceptance_rate": np.full((1, 1), -1, np.float32),
    "context_logits": np.zeros((1, 1, 1), np.float32),
    "generation_logits": np.zeros((1, 1, 1, 1), np.float32),
}


def chunk_arrays(chunk: Chunk) -> dict[str, np.ndarray]:
    """Shapes, for s sequences and t tokens: output_ids [1, s, t], per sequence [1, s], per response [1, 1]."""
    sequences = chunk.sequences
    arrival, scheduled, first_token, last_token = chunk.times_ns
    return {
        "output_ids": _padded((s.token_ids for s in sequences), np.int32),
        "sequence_length": np.array([[len(s.token_ids) for s in sequences]], np.int32),
        "CHUNK_HEADER": np.array([[s.header.to_row() for s in sequences]], np.int64),
        "finish_reason": np.array([[s.finish_reason for s in sequences]], np.object_),
        "cum_log_probs": np.array([[s.cumulative_log_prob for s in sequences]], np.float32),
        "output_log_probs": _padded((s.log_probs for s in sequences), np.float32),
        "batch_index": np.array([[chunk.batch_index]], np.int32),
        "sequence_index": np.array([[chunk.sequence_index]], np.int32),
        "num_input_tokens": np.array([[chunk.num_input_tokens]], np.int32),
        "num_output_tokens": np.array([[sum(s.num_output_tokens for s in sequences)]], np.int32),
        "arrival_time_ns": np.array([[arrival]], np.int64),
        "first_scheduled_time_ns": np.array([[scheduled]], np.int64),
        "first_token_time_ns": np.array([[first_token]], np.int64),
        "last_token_time_ns": np.array([[last_token]], np.int64),
    }


def _padded(rows: Iterable[Sequence], dtype: type) -> np.ndarray:
    """[1, rows, longest row], filled with 0: `sequence_length` says what counts. At least one column, for Triton."""
    rows = list(rows)
    array = np.zeros((1, len(rows), max(1, *map(len, rows))), dtype)
    for index, row in enumerate(rows):
        array[0, index, : len(row)] = row
    return array
