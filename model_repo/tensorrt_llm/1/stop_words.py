"""Stop words, matched on text: a word may begin inside one token and end inside another.

Works on whole tokens, because tokens are what `tensorrt_llm` hands on. Tokens whose text could still become a stop
word are held back; when one is complete, the tokens up to it are released together with the number of characters
that `postprocessing` must cut from the end. So a stop word never shows, not even half of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from text_decoding import TextStream


@dataclass(frozen=True, slots=True)
class Released:
    """Tokens that may go to the client now. `trim_characters` > 0, or `stopped`, only when a stop word is complete."""

    num_tokens: int  # how many of the tokens held so far, oldest first
    stopped: bool = False
    trim_characters: int = 0


class StopWordMatcher:
    """Watches one sequence. `text_stream` must begin with the same context that postprocessing's will have.

    `stop_ids` are stop words that `text_stream` cannot show: special tokens, where those are left out of the text.
    """

    def __init__(self, stop_words: Sequence[str], text_stream: TextStream, stop_ids: Collection[int] = ()):
        self._stop_words = tuple(stop_words)
        self._stop_ids = stop_ids
        self._text_stream = text_stream
        self._tail = ""  # text not yet released, plus nothing else
        self._tail_ends: deque[int] = deque()  # per held token: where its text ends in `_tail`

    def feed(self, token_id: int) -> Released:
        """Take one generated token. Tokens after a match must not be fed."""
        searched = len(self._tail)
        self._tail += self._text_stream.feed((token_id,))
        self._tail_ends.append(len(self._tail))
        start = self._first_match(searched)
        if start is not None:
            self._tail += self._text_stream.flush()
            return self._cut(start)
        if token_id in self._stop_ids:
            return self._end(stopped=True)
        return self._release(len(self._tail) - self._longest_beginning())

    def finish(self) -> Released:
        """The sequence ended: everything held may go, unless the last character completes a stop word."""
        return self._end(stopped=False)

    def _end(self, *, stopped: bool) -> Released:
        searched = len(self._tail)
        self._tail += self._text_stream.flush()
        start = self._first_match(searched)
        return Released(len(self._tail_ends), stopped) if start is None else self._cut(start)

    def _cut(self, start: int) -> Released:
        return Released(len(self._tail_ends), stopped=True, trim_characters=len(self._tail) - start)

    def _first_match(self, searched: int) -> int | None:
        """Where the stop word begins that is complete first, if characters came one by one; the longest of several."""
        matches = []
        for word in self._stop_words:
            start = self._tail.find(word, max(0, searched - len(word) + 1))
            if start >= 0:
                matches.append((start + len(word), start))
        return min(matches)[1] if matches else None

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
