"""Token ids to text, piece by piece, so that the pieces joined are exactly the text of all ids at once.

Decoding each token alone breaks multi-byte characters and loses the spaces that SentencePiece tokenizers put
between words. `TextStream` feeds ids in order to `tokenizers.decoders.DecodeStream` and holds back a character
until all of its bytes have come. The same class serves streams and single responses, so both give the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

# Prompt tokens that give the first generated token its surroundings (leading space or not). A character has at
# most 4 bytes, hence at most 4 tokens; a few more let the window begin at a whole character.
CONTEXT_TOKENS = 8

# A character is complete after 4 bytes, so a tail that still ends in U+FFFD after this many tokens is invalid UTF-8
# (or a model that writes U+FFFD ten times in a row) and is passed on as it is: without a bound its cost is quadratic.
MAX_HELD_TOKENS = 32


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
        self._restart(list(context)[-CONTEXT_TOKENS:])

    def _restart(self, context: list[int]) -> None:
        # `_shown` are ids whose text is out, `_held` those whose text is not: together the window of the tail.
        self._shown, self._held = context, []
        self._stream = DecodeStream(ids=context, skip_special_tokens=self._skip_special_tokens)

    def feed(self, ids: Sequence[int]) -> str:
        """Text that became certain with `ids`; "" while a character is incomplete."""
        return "".join(map(self._feed_one, ids))

    def _feed_one(self, token_id: int) -> str:
        self._held.append(token_id)
        try:
            text = self._stream.step(self._tokenizer, token_id)
        except Exception:  # DecodeStream gives up on decoders whose text is not a prefix of the longer one's
            return self.flush()
        if text is None:
            return self.flush() if len(self._held) >= MAX_HELD_TOKENS else ""
        self._shown, self._held = (self._shown + self._held)[-CONTEXT_TOKENS:], []
        return text

    def flush(self) -> str:
        """What is held back, as the tokenizer decodes it now: U+FFFD for a character that never became whole."""
        if not self._held:
            return ""
        shown, window = self._shown, self._shown + self._held
        text = self._decode(window)[len(self._decode(shown)) :]
        self._restart(window[-CONTEXT_TOKENS:])
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)
