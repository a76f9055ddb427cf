"""Token ids to text, piece by piece, so that the pieces joined are exactly the text of all ids at once.

Decoding each token alone breaks multi-byte characters and loses the spaces that SentencePiece tokenizers put
between words. `TextStream` decodes new ids behind those it decoded last and returns what that adds; a character is
held back until all of its bytes have come. The same class serves streams and single responses, so both give the
same text.

What is not covered: where a tokenizer with byte fallback writes invalid UTF-8, `decode` makes U+FFFD of every byte of
the run, also of the good characters before the bad byte. Those were shown by then, and stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from pathlib import Path

from tokenizers import Tokenizer

# Prompt tokens that give the first generated token its surroundings (leading space or not). A character has at
# most 4 bytes, hence at most 4 tokens; a few more let the window begin at a whole character.
CONTEXT_TOKENS = 8

# A character is complete after 4 bytes, so a tail that still ends in U+FFFD after this many tokens is invalid UTF-8
# (or a model that writes U+FFFD ten times in a row) and is passed on as it is: without a bound its cost is quadratic.
MAX_HELD_TOKENS = 32

_INCOMPLETE = "\ufffd"  # how decoders write a character whose last bytes are missing: at most 3, hence at most 3 tokens


def load_tokenizer(engine_folder: Path) -> Tokenizer:
    """The tokenizer that the build put beside the engine, with padding and truncation off."""
    tokenizer = Tokenizer.from_file(str(engine_folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class TextStream:
    """The text of one sequence. Not thread-safe: one owner feeds it, in order."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = (), *, skip_special_tokens: bool = True):
        """`context`: the last prompt ids (may be empty); their text is never returned."""
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # `_shown` are the last ids whose text is out, and `_held` those after them, whose text is not.
        self._shown: list[int] = []
        self._shown_text = ""
        context = list(context)[-CONTEXT_TOKENS:]
        start, end = self._whole_characters(context)
        self._shown, self._held = context[start:end], context[end:]
        self._shown_text = self._decode(self._shown)
        self._context_text = self._text_of(self._held)  # what the prompt itself already says of `_held`

    def feed(self, ids: Sequence[int]) -> str:
        """Text that became certain with `ids`; "" while a character is incomplete."""
        if len(ids) > 1 and self._decode(
            list(ids[-1:])
        ):  # an id without text, as special tokens are, would be held back
            together = [*self._held, *ids]
            text = self._text_of(together)
            if text and _INCOMPLETE not in text:  # otherwise it matters at which id a character is given up
                self._held = together[-self._length_of_last_character(together) :]
                return self._show(len(self._held), text)
        return "".join(map(self._feed_one, ids))

    def flush(self) -> str:
        """The end: what is held back, with U+FFFD for a character that never became whole."""
        return self._show(len(self._held), self._text_of(self._held)) if self._held else ""

    def _feed_one(self, token_id: int) -> str:
        self._held.append(token_id)
        text = self._text_of(self._held)
        if text and not text.endswith(_INCOMPLETE):
            return self._show(len(self._held), text)
        if len(self._held) < MAX_HELD_TOKENS:
            return ""
        if not text:  # special tokens; kept so far because the text of a first id can be another one
            self._held.clear()
            return ""
        count = self._num_certain(self._held, text)
        return self._show(count, self._text_of(self._held[:count]))

    def _show(self, count: int, text: str) -> str:
        """`text` is that of the first `count` held ids, which from now on are what the next ids are decoded behind."""
        self._shown, self._held = self._held[:count], self._held[count:]
        self._shown_text = self._decode(self._shown)
        known = len(commonprefix((text, self._context_text)))  # noqa: RUF071 - of characters, not of paths
        self._context_text = ""
        return text[known:]

    def _text_of(self, ids: list[int]) -> str:
        """What `ids` add to the text that is shown."""
        text = self._decode(self._shown + ids)
        if text.startswith(self._shown_text):
            return text[len(self._shown_text) :]
        return self._decode(ids)  # byte fallback: a bad byte undoes its whole run, also the part that is shown

    def _length_of_last_character(self, ids: list[int]) -> int:
        """How many ids, one by one, would have been held back together at the end of this whole text."""
        for length in range(1, min(MAX_HELD_TOKENS, len(ids))):
            if not self._decode(ids[-length - CONTEXT_TOKENS : -length]).endswith(_INCOMPLETE):
                return length
        return len(ids)

    def _whole_characters(self, ids: list[int]) -> tuple[int, int]:
        """Where the text of `ids` begins and ends with a whole character: the first slice that does."""
        for start in range(min(4, len(ids))):
            for end in range(len(ids), max(start, len(ids) - 3) - 1, -1):
                text = self._decode(ids[start:end])
                if not text.startswith(_INCOMPLETE) and not text.endswith(_INCOMPLETE):
                    return start, end
        return 0, self._num_certain(ids, self._decode(ids))

    def _num_certain(self, ids: list[int], text: str) -> int:
        """How many of `ids`, whose `text` ends in U+FFFD, no later id can change."""
        for rest in range(3, 7):  # more than 3 where that would cut a character in two
            if text.startswith(self._text_of(ids[:-rest])):
                return len(ids) - rest
        return len(ids)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)
