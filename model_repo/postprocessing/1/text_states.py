"""The text of every sequence in flight: chunks of token ids in, text deltas out. Knows nothing of Triton."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from chunk_header import ChunkHeader
from text_decoding import TextStream
from tokenizers import Tokenizer

# A sequence whose last chunk never comes (its request failed, or was stopped by its id) leaves its state behind. It is
# dropped when it has got no chunk for so long (a stream gets several in a second, and an engine that says nothing for
# two minutes is given up), and when there are more than this, far above any number of slots.
STALE_SECONDS = 600.0
MAX_STATES = 4096


@dataclass(slots=True)
class _State:
    stream: TextStream
    last_used: float  # monotonic seconds


class TextStates:
    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._states: OrderedDict[int, _State] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._states)

    def text_of(self, header: ChunkHeader, ids: Sequence[int]) -> str:
        """The text that this chunk adds to its sequence."""
        if header.is_first:
            stream = TextStream(self._tokenizer, header.context, skip_special_tokens=not header.keep_special_tokens)
        else:
            stream = self._states.pop(header.key).stream
        if not header.is_last:
            now = time.monotonic()
            self._drop_what_is_left_over(now)
            self._states[header.key] = _State(stream, now)  # behind all others
        text = stream.feed(ids)
        if header.is_last:
            text += stream.flush()
            text = text[: max(0, len(text) - header.trim_characters)]
        return text

    def forget(self, key: int) -> None:
        self._states.pop(key, None)

    def _drop_what_is_left_over(self, now: float) -> None:
        while self._states:
            oldest = next(iter(self._states.values()))
            if len(self._states) < MAX_STATES and now - oldest.last_used < STALE_SECONDS:
                return
            self._states.popitem(last=False)
