"""Stop words, matched on text: a word may begin inside one token and end inside another.

Works on whole tokens, because tokens are what `tensorrt_llm` hands on. Tokens whose text could still become a stop
word are held back; when one is complete, the tokens up to it are released together with the number of characters
that `postprocessing` must cut from the end. So a stop word never shows, not even half of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from text_decoding import TextStream


@dataclass(frozen=True, slots=True)
class Released:
    """Tokens that may go to the client now. `trim_characters` > 0, or `stopped`, only when a stop word is complete."""

    num_tokens: int  # how many of the tokens held so far, oldest first
    stopped: bool = False
    trim_characters: int = 0


class StopWordMatcher:
    """Watches one sequence. `text_stream` must begin with the same context that postprocessing's will have."""

    def __init__(self, stop_words: Sequence[str], text_stream: TextStream):
        self._stop_words = tuple(stop_words)
        self._text_stream = text_stream
        self._tail = ""  # text not yet released, plus nothing else
        self._tail_ends: deque[int] = deque()  # per held token: where its text ends in `_tail`

    def feed(self, token_id: int) -> Released:
        """Take one generated token. Tokens after a match must not be fed."""
        searched = len(self._tail)
        self._tail += self._text_stream.feed((token_id,))
        self._tail_ends.append(len(self._tail))
        found = [at for word in self._stop_words if (at := self._find(word, searched)) >= 0]
        if found:
            text = self._tail + self._text_stream.flush()
            return Released(len(self._tail_ends), stopped=True, trim_characters=len(text) - min(found))
        return self._release(len(self._tail) - self._longest_beginning())

    def finish(self) -> Released:
        """The sequence ended without a stop word: everything held may go."""
        return Released(len(self._tail_ends))

    def _find(self, word: str, searched: int) -> int:
        return self._tail.find(word, max(0, searched - len(word) + 1))

    def _longest_beginning(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop word."""
        longest = max(map(len, self._stop_words)) - 1
        for length in range(min(longest, len(self._tail)), 0, -1):
            end = self._tail[-length:]
            if any(word.startswith(end) for word in self._stop_words):
                return length
        return 0

    def _release(self, safe_characters: int) -> Released:
        num_tokens = released_characters = 0
        while self._tail_ends and self._tail_ends[0] <= safe_characters:
            released_characters = self._tail_ends.popleft()
            num_tokens += 1
        if released_characters:
            self._tail = self._tail[released_characters:]
            self._tail_ends = deque(end - released_characters for end in self._tail_ends)
        return Released(num_tokens)
