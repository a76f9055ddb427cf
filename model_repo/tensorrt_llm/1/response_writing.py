"""Chunks to Triton responses. The only module beside model.py that touches Triton's types."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import triton_python_backend_utils as pb_utils
from dispatcher import Chunk, RequestCancelled
from generation import EngineError, RequestError

# Declared by NVIDIA's repository, and Triton before 24.11 needs every declared output in every response of an
# ensemble. No engine here knows these, so they are the same constants each time: -1 means "not reported".
_NOT_REPORTED_INT32 = (
    "kv_cache_alloc_new_blocks",
    "kv_cache_reused_blocks",
    "kv_cache_alloc_total_blocks",
    "total_accepted_draft_tokens",
    "total_draft_tokens",
)


class ResponseWriter:
    """Makes the response of a chunk; one per model, since the constant tensors are made once."""

    def __init__(self) -> None:
        no_logits = {"context_logits": (1, 1, 1), "generation_logits": (1, 1, 1, 1)}
        self._constants = [pb_utils.Tensor(name, np.full((1, 1), -1, np.int32)) for name in _NOT_REPORTED_INT32]
        self._constants += [pb_utils.Tensor(name, np.zeros(shape, np.float32)) for name, shape in no_logits.items()]
        self._constants.append(pb_utils.Tensor("acceptance_rate", np.full((1, 1), -1, np.float32)))

    def write(self, chunk: Chunk) -> pb_utils.InferenceResponse:
        """Shapes, for s sequences and t tokens: output_ids [1, s, t], per sequence [1, s], per response [1, 1]."""
        sequences = chunk.sequences
        arrival, scheduled, first_token, last_token = chunk.times_ns
        tensors = {
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
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, array) for name, array in tensors.items()] + self._constants
        )


class TritonResponder:
    """The way back to one Triton request (`dispatcher.Responder`)."""

    def __init__(self, request, writer: ResponseWriter):
        self.request_id: str = request.request_id()
        self._sender = request.get_response_sender()
        self._writer = writer

    def send(self, chunk: Chunk, *, final: bool) -> None:
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        self._sender.send(self._writer.write(chunk), flags)

    def fail(self, error: Exception) -> None:
        if isinstance(error, RequestCancelled):
            # Nobody reads it, and an error while a chunk is still on its way through the ensemble would leave that
            # request in flight for ever (Triton before 26.03).
            self.finish()
            return
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), _code(error)))
        self._sender.send(response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finish(self) -> None:
        """A final response with nothing in it."""
        self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        return self._sender.is_cancelled()


def _code(error: Exception) -> int:
    match error:
        case RequestError():
            return pb_utils.TritonError.INVALID_ARG
        case EngineError():
            return pb_utils.TritonError.UNAVAILABLE
        case _:
            return pb_utils.TritonError.INTERNAL


def _padded(rows: Iterable, dtype) -> np.ndarray:
    """[1, rows, longest row], filled with 0: `sequence_length` says what counts. At least one column, for Triton."""
    rows = list(rows)
    array = np.zeros((1, len(rows), max(1, *map(len, rows))), dtype)
    for index, row in enumerate(rows):
        array[0, index, : len(row)] = row
    return array
