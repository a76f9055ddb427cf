"""The text of every sequence in flight: chunks of token ids in, text deltas out. Knows nothing of Triton."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from chunk_header import ChunkHeader
from text_decoding import TextStream
from tokenizers import Tokenizer

# A sequence whose last chunk never comes (its request failed, or the client went) leaves its state behind. Those that
# got no chunk for longest are dropped beyond this many, far above any number of slots.
MAX_STATES = 4096


class TextStates:
    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._states: OrderedDict[int, TextStream] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def text_of(self, header: ChunkHeader, ids: Sequence[int]) -> str:
        """The text that this chunk adds to its sequence."""
        if header.is_first:
            stream = TextStream(self._tokenizer, header.context, skip_special_tokens=not header.keep_special_tokens)
        else:
            stream = self._states.pop(header.key)
        if not header.is_last:
            self._states[header.key] = stream  # behind all others
            if len(self._states) > MAX_STATES:
                self._states.popitem(last=False)
        text = stream.feed(ids)
        if header.is_last:
            text += stream.flush()
            text = text[: max(0, len(text) - header.trim_characters)]
        return text

    def forget(self, key: int) -> None:
        self._states.pop(key, None)
