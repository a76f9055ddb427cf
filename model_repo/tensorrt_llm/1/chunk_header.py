"""What `tensorrt_llm` tells `postprocessing` beside the tokens, in one INT64 tensor `CHUNK_HEADER`, a row per sequence.

One small tensor, because every tensor of a response costs time and an ensemble's response parameters do not reach
the next step (Triton drops them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_FIRST, _LAST, _KEEP_SPECIAL_TOKENS = 1, 2, 4
_NUM_FIELDS = 5


class ChunkHeaderError(Exception):
    """This is no header of `tensorrt_llm`: one sentence for whoever sent it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkHeader:
    """`key` names the sequence's text state; a chunk with `is_first` opens it and one with `is_last` closes it."""

    key: int
    is_first: bool = True
    is_last: bool = True
    keep_special_tokens: bool = False
    trim_characters: int = 0  # cut from the end of the last chunk: the stop word
    listener_pid: int = 0  # whom to tell, see feedback_channel.py
    number: int = 0  # of the response, rising from 1; 0: nobody wants to know when it is decoded
    context: Sequence[int] = ()  # with the first chunk: the prompt's last ids

    def to_row(self) -> list[int]:
        """5 + len(context) numbers; the rows of one response have equal lengths, since they share their prompt."""
        flags = _FIRST * self.is_first | _LAST * self.is_last | _KEEP_SPECIAL_TOKENS * self.keep_special_tokens
        return [self.key, flags, self.trim_characters, self.listener_pid, self.number, *self.context]

    @classmethod
    def from_row(cls, row: Sequence[int]) -> ChunkHeader:
        key, flags, trim_characters, listener_pid, number, *context = row
        return cls(
            key=key,
            is_first=bool(flags & _FIRST),
            is_last=bool(flags & _LAST),
            keep_special_tokens=bool(flags & _KEEP_SPECIAL_TOKENS),
            trim_characters=trim_characters,
            listener_pid=listener_pid,
            number=number,
            context=context,
        )


def read_headers(array: np.ndarray) -> list[ChunkHeader]:
    """From the tensor, INT64 [1, sequences, 5 or more]. Raises ChunkHeaderError."""
    if array.ndim != 3 or array.shape[0] != 1 or not array.shape[1] or array.shape[2] < _NUM_FIELDS:
        raise ChunkHeaderError(
            f"CHUNK_HEADER has shape {list(array.shape)}; leave it out, only the model tensorrt_llm sends it"
        )
    return [ChunkHeader.from_row(row) for row in array[0].tolist()]
