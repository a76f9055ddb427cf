"""Stop words: what is shown ends before the first one, wherever tokens begin and end; nothing waits for nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from stop_words import Released, StopWordMatcher
from text_decoding import TextStream
from tokenizers import Tokenizer


class Reader:
    """Shows the released tokens as postprocessing does, from a text stream of its own."""

    def __init__(self, tokenizer: Tokenizer, stop_words: Sequence[str], context: Sequence[int] = ()):
        self.matcher = StopWordMatcher(stop_words, TextStream(tokenizer, context))
        self.stream = TextStream(tokenizer, context)
        self.held: list[int] = []
        self.shown = ""
        self.stopped = False

    def feed(self, token_id: int) -> str:
        """All text that is shown now."""
        self.held.append(token_id)
        return self._take(self.matcher.feed(token_id), is_last=False)

    def finish(self) -> str:
        return self.shown if self.stopped else self._take(self.matcher.finish(), is_last=True)

    def _take(self, released: Released, *, is_last: bool) -> str:
        assert released.stopped or not released.trim_characters
        text = self.stream.feed(self.held[: released.num_tokens])
        del self.held[: released.num_tokens]
        self.stopped = released.stopped
        if is_last or self.stopped:
            assert not self.held
            text += self.stream.flush()
            assert released.trim_characters <= len(text)
            text = text[: len(text) - released.trim_characters]
        self.shown += text
        return self.shown


def tokens(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    """The ids of every piece; for the tests below, a piece is mostly one token."""
    return [token_id for piece in pieces for token_id in tokenizer.encode(piece, add_special_tokens=False).ids]


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokens(tokenizer, *text)


def stop_at(text: str, words: Sequence[str]) -> int | None:
    """By definition: where the word begins that is complete first; of two that end together, the longer."""
    ends = [(text.find(word) + len(word), text.find(word)) for word in words if word in text]
    return min(ends)[1] if ends else None


# ---- examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["four"], "one two three"),
        ("one two three", ["three"], "one two "),
        ("one two three", ["one"], ""),
        ("one two three", ["o"], ""),
        ("one two three", ["two", "one"], ""),
        ("one two three", ["two", "three"], "one "),
        ("one two three", ["two three", "two"], "one "),
        ("one two three", ["one two three four"], "one two three"),
        ("one two thre", ["three"], "one two thre"),
        ("aaab", ["aab"], "a"),
        ("aabaac", ["aac"], "aab"),
        ("ababac", ["abac"], "ab"),
        ("abcd", ["bcx", "cd"], "ab"),
        ("abcd", ["abcd", "bcd"], ""),
        ("abcx", ["abcd", "bc"], "a"),
        ("abc", ["b", "abc"], "a"),
        ("a\n\nb", ["\n\n"], "a"),
        ("a \n\n b", ["\n"], "a "),
        ("caf\u00e9 noir", ["\u00e9"], "caf"),
        ("日本語と中文", ["と"], "日本語"),
        ("日本語と中文", ["語と中"], "日本"),
        ("go 👩‍🚀 now", ["\u200d"], "go 👩"),
        ("go 👩‍🚀 now", ["👩‍🚀"], "go "),
        ("a\ufffdb", ["\ufffd"], "a"),
        ("ab\ufffd", ["b\ufffd"], "a"),
        ("مرحبا بالعالم", ["بالعالم"], "مرحبا "),
    ],
)
def test_text_ends_before_the_stop_word(byte_level: Tokenizer, text: str, words: list[str], expected: str):
    for ids in (tokens(byte_level, text), letters(byte_level, text)):
        reader = Reader(byte_level, words)
        for token_id in ids:
            if not reader.stopped:
                assert expected.startswith(reader.feed(token_id))
        assert reader.finish() == expected
        assert reader.stopped == (expected != text)


def test_a_stop_word_straddles_tokens(byte_level: Tokenizer):
    reader = Reader(byte_level, ["brown fox"])
    ids = [*tokens(byte_level, "The qu", "ick br"), *tokens(byte_level, "own f", "ox jumps")]
    while not reader.stopped:
        reader.feed(ids.pop(0))
    assert reader.finish() == "The quick "


def test_text_after_the_stop_word_in_the_same_token_is_cut_too(byte_level: Tokenizer):
    the = byte_level.token_to_id("Ġthe")
    assert the is not None
    matcher = StopWordMatcher(["t"], TextStream(byte_level))
    assert matcher.feed(the) == Released(1, stopped=True, trim_characters=len("the"))


def test_a_token_is_held_while_it_could_become_a_stop_word(byte_level: Tokenizer):
    reader = Reader(byte_level, ["xyz"])
    assert [reader.feed(token_id) for token_id in letters(byte_level, "axybx")] == ["a", "a", "a", "axyb", "axyb"]


def test_the_end_shows_what_was_held(byte_level: Tokenizer):
    reader = Reader(byte_level, ["xyz"])
    for token_id in letters(byte_level, "axy"):
        reader.feed(token_id)
    assert reader.shown == "a"
    assert reader.finish() == "axy"


def test_text_that_cannot_become_a_stop_word_is_never_held(byte_level: Tokenizer):
    reader, so_far = Reader(byte_level, ["@@"]), ""
    for character in "The quick brown fox":
        so_far += character
        assert reader.feed(letters(byte_level, character)[0]) == so_far


def test_a_token_without_text_is_not_held(byte_level: Tokenizer):
    matcher = StopWordMatcher(["xyz"], TextStream(byte_level))
    assert matcher.feed(byte_level.token_to_id("<|endoftext|>")) == Released(1)
    first_byte = byte_level.encode("€", add_special_tokens=False).ids[0]
    assert matcher.feed(first_byte) == Released(1)


def test_the_space_before_the_first_word_belongs_to_the_text(sentencepiece: Tokenizer):
    prompt = sentencepiece.encode("The capital of France is").ids
    answer = sentencepiece.encode("is Paris", add_special_tokens=False).ids[1:]
    reader = Reader(sentencepiece, ["s P", " Par"], context=prompt)
    for token_id in answer:
        if not reader.stopped:
            reader.feed(token_id)
    assert reader.stopped
    assert reader.finish() == ""


def test_the_prompt_is_not_searched(byte_level: Tokenizer):
    reader = Reader(byte_level, ["one", "ex"], context=tokens(byte_level, "someone e"))
    for token_id in letters(byte_level, "x two"):
        reader.feed(token_id)
    assert reader.finish() == "x two"


def test_a_stop_word_that_is_a_special_token_stops_though_it_has_no_text(byte_level: Tokenizer):
    user = byte_level.token_to_id("<|user|>")
    matcher = StopWordMatcher(["<|user|>"], TextStream(byte_level), {user})
    held = letters(byte_level, "a<|")
    assert [matcher.feed(token_id).num_tokens for token_id in held] == [1, 0, 0]
    assert matcher.feed(user) == Released(3, stopped=True)


def test_a_special_token_that_is_shown_is_found_in_the_text(byte_level: Tokenizer):
    matcher = StopWordMatcher(["<|user|>"], TextStream(byte_level, skip_special_tokens=False))
    assert matcher.feed(byte_level.token_to_id("<|user|>")) == Released(1, stopped=True, trim_characters=8)


def test_the_last_characters_missing_bytes_can_complete_a_stop_word(byte_level: Tokenizer):
    matcher = StopWordMatcher(["b\ufffd"], TextStream(byte_level))
    assert matcher.feed(letters(byte_level, "b")[0]) == Released(0)
    assert matcher.feed(byte_level.encode("€", add_special_tokens=False).ids[0]) == Released(0)
    assert matcher.finish() == Released(2, stopped=True, trim_characters=2)


# ---- everything --------------------------------------------------------------------------------------------------

# Few characters, so that words are often half there; one, two, three and four bytes each.
ALPHABETS = ("ab", "ab ", "aé", "中日a", "😀a\ufffd", "ab\n\u0301")


def random_ids(chance: random.Random, tokenizer: Tokenizer, text: str) -> list[int]:
    """`text` in pieces of random length, each encoded for itself; sometimes byte by byte."""
    ids: list[int] = []
    while text:
        length = chance.randint(1, 4)
        piece, text = text[:length], text[length:]
        ids += tokenizer.encode(piece, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("alphabet", ALPHABETS, ids=ascii)
def test_any_text_ends_where_plain_search_says(byte_level: Tokenizer, alphabet: str):
    chance = random.Random(alphabet)
    for _ in range(400):
        text = "".join(chance.choices(alphabet, k=chance.randint(1, 25)))
        words = ["".join(chance.choices(alphabet, k=chance.randint(1, 5))) for _ in range(chance.randint(1, 4))]
        stop = stop_at(text, words)
        expected = text if stop is None else text[:stop]
        reader = Reader(byte_level, words)
        for token_id in random_ids(chance, byte_level, text):
            if not reader.stopped:
                assert expected.startswith(reader.feed(token_id)), (text, words)
        assert reader.finish() == expected, (text, words)
        assert reader.stopped == (stop is not None), (text, words)


@pytest.mark.parametrize("alphabet", ALPHABETS[:4], ids=ascii)
def test_only_tokens_that_hold_the_beginning_of_a_stop_word_wait(byte_level: Tokenizer, alphabet: str):
    chance = random.Random(alphabet)
    for _ in range(200):
        text = "".join(chance.choices(alphabet, k=25))
        words = ["".join(chance.choices(alphabet, k=chance.randint(3, 6))) for _ in range(2)]
        plain, reader, so_far = TextStream(byte_level), Reader(byte_level, words), ""
        for token_id in random_ids(chance, byte_level, text):
            added = plain.feed([token_id])
            so_far += added
            shown = reader.feed(token_id)
            if reader.stopped:
                break
            waiting = max(
                (n for n in range(1, len(so_far) + 1) if any(w.startswith(so_far[-n:]) for w in words)), default=0
            )
            assert len(shown) <= len(so_far) - waiting
            assert len(so_far) - len(shown) <= waiting + 3  # the rest of the token where the beginning is: 4 characters
