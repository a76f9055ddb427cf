"""Text in pieces: joined, it is the text of all ids at once, however the ids were cut."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from os.path import commonprefix
from pathlib import Path

import pytest
from text_decoding import CONTEXT_TOKENS, MAX_HELD_TOKENS, TextStream, load_tokenizer
from tokenizers import Tokenizer

TEXTS = {
    "english": "The quick brown fox, 12 tokens (of 4096); don't ask.",
    "spaces": "  two  leading, three   inside, and trailing   ",
    "lines": "one\n\n\ttwo\r\n    three\n",
    "emoji": "go 👩‍🚀👨‍👩‍👧‍👦 now 🇫🇷🇯🇵 👍🏽❤️!",
    "cjk": "日本語と中文: 漢字カタカナ한국어",
    "combining": "cafe\u0301 n\u0303o a\u0308\u0323x",
    "arabic": "مرحبا بالعالم، كيف الحال؟",
    "hindi": "नमस्ते दुनिया",
    "rare": "\U0001f9a3\u16a0\u16a2 \U00020bb7 \u200b\u00a0\ufeff",
    "control": "a\x00b\x1fc",
    "replacement": "a\ufffdb \ufffd\ufffd c",
    "replacements at both ends": "\ufffd\ufffdx\ufffd",
}


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def at_once(tokenizer: Tokenizer, context: Sequence[int], ids: Sequence[int]) -> str:
    stream = TextStream(tokenizer, context)
    return stream.feed(ids) + stream.flush()


def in_pieces(tokenizer: Tokenizer, context: Sequence[int], ids: Sequence[int], sizes: Iterator[int]) -> str:
    stream, pieces, rest = TextStream(tokenizer, context), [], list(ids)
    while rest:
        size = next(sizes)
        pieces.append(stream.feed(rest[:size]))
        rest = rest[size:]
    return "".join(pieces) + stream.flush()


def random_sizes(seed: int) -> Iterator[int]:
    chance = random.Random(seed)
    while True:
        yield chance.randint(1, 7)


def after(tokenizer: Tokenizer, context: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `context` and `ids`, less what the context alone already says."""
    text = tokenizer.decode([*context, *ids])
    # Not only of the whole context: with byte fallback the bytes of an incomplete character spoil those before them.
    beginnings = [tokenizer.decode(list(context[:end])) for end in range(max(0, len(context) - 12), len(context))]
    beginnings = [beginning for beginning in beginnings if not beginning.endswith("\ufffd")]
    beginnings.append(tokenizer.decode(list(context)))
    return text[max(len(commonprefix((text, beginning))) for beginning in beginnings) :]  # noqa: RUF071 - characters


def byte_ids(tokenizer: Tokenizer) -> list[int]:
    """The token of each single byte."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    if tokenizer.token_to_id(names[0]) is None:  # GPT-2's alphabet: printable bytes stand for themselves
        printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
        others = iter(range(0x100, 0x200))
        names = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    return [tokenizer.token_to_id(name) for name in names]


def cuts(tokenizer: Tokenizer, ids: Sequence[int]) -> Iterator[int]:
    """Everywhere but inside a U+FFFD that is written as bytes, which looks the same whole and broken."""
    replacement = [byte_ids(tokenizer)[byte] for byte in "\ufffd".encode()]
    for cut in range(len(ids) + 1):
        if not any(list(ids[start : start + 3]) == replacement for start in range(max(0, cut - 2), cut)):
            yield cut


# ---- the same text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_text_at_once_is_that_of_decode(tokenizer: Tokenizer, text: str):
    ids = encode(tokenizer, text)
    assert at_once(tokenizer, [], ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_pieces_joined_are_the_text_at_once(tokenizer: Tokenizer, text: str):
    ids = encode(tokenizer, text)
    for seed in range(10):
        assert in_pieces(tokenizer, [], ids, random_sizes(seed)) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_behind_every_prompt_only_the_answer_is_shown(tokenizer: Tokenizer, text: str):
    ids = encode(tokenizer, f"Once {text} and {text}")
    for cut in cuts(tokenizer, ids):
        assert at_once(tokenizer, ids[:cut], ids[cut:]) == after(tokenizer, ids[:cut], ids[cut:]), cut


def test_characters_made_of_single_bytes_are_shown_whole(tokenizer: Tokenizer):
    single = byte_ids(tokenizer)
    for text in TEXTS.values():
        ids = [single[byte] for byte in text.encode()]
        for cut in cuts(tokenizer, ids):
            assert at_once(tokenizer, ids[:cut], ids[cut:]) == after(tokenizer, ids[:cut], ids[cut:]), (text, cut)


def test_random_text_of_all_planes_is_that_of_decode(tokenizer: Tokenizer):
    chance = random.Random(1)
    ranges = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x600, 0x6FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)]
    for _ in range(150):
        text = "".join(chr(chance.randint(*chance.choice(ranges))) for _ in range(chance.randint(1, 30)))
        ids = encode(tokenizer, text)
        cut = chance.randint(0, len(ids))
        assert at_once(tokenizer, ids[:cut], ids[cut:]) == after(tokenizer, ids[:cut], ids[cut:]), text


@pytest.mark.parametrize("bytes_", [range(256), range(0x80, 0x100), (0x41, 0xE4, 0xB8, 0xAD, 0xF0, 0x9F)], ids=str)
def test_random_bytes_are_decoded_as_decode_does(byte_level: Tokenizer, bytes_: Sequence[int]):
    chance, single = random.Random(2), byte_ids(byte_level)
    for _ in range(300):
        ids = [single[chance.choice(bytes_)] for _ in range(chance.randint(1, 100))]
        cut = chance.randint(0, min(len(ids), CONTEXT_TOKENS))
        assert at_once(byte_level, ids[:cut], ids[cut:]) == after(byte_level, ids[:cut], ids[cut:])


def test_random_tokens_are_decoded_as_decode_does(byte_level: Tokenizer):
    chance = random.Random(3)
    odd = [i for i in range(byte_level.get_vocab_size()) if "\ufffd" in byte_level.decode([i])]
    assert len(odd) > 150
    for round_ in range(400):
        choices = odd if round_ % 2 else range(byte_level.get_vocab_size())
        ids = chance.choices(choices, k=chance.randint(1, 100))
        cut = chance.randint(0, min(len(ids), CONTEXT_TOKENS))
        assert at_once(byte_level, ids[:cut], ids[cut:]) == after(byte_level, ids[:cut], ids[cut:])


def test_random_tokens_in_pieces_are_the_text_at_once(tokenizer: Tokenizer):
    chance = random.Random(4)
    for seed in range(200):
        ids = chance.choices(range(tokenizer.get_vocab_size()), k=chance.randint(1, 60))
        context = chance.choices(range(tokenizer.get_vocab_size()), k=chance.randint(0, 12))
        pieces = in_pieces(tokenizer, context, ids, random_sizes(seed))
        assert pieces == at_once(tokenizer, context, ids)


def test_a_bad_byte_does_not_undo_the_characters_before_it(sentencepiece: Tokenizer):
    single = byte_ids(sentencepiece)
    ids = [*(single[byte] for byte in "中é".encode() + b"\xff"), sentencepiece.token_to_id("x")]
    assert at_once(sentencepiece, [], ids) == "中é\ufffdx"
    assert at_once(sentencepiece, ids[:3], ids[3:]) == "é\ufffdx"


# ---- what comes when ---------------------------------------------------------------------------------------------


def test_a_character_comes_with_its_last_byte(tokenizer: Tokenizer):
    single, stream = byte_ids(tokenizer), TextStream(tokenizer)
    assert [stream.feed([single[byte]]) for byte in "a中😀".encode()] == ["a", "", "", "中", "", "", "", "😀"]


def test_spaces_between_words_are_kept(tokenizer: Tokenizer):
    ids = encode(tokenizer, "of one another")
    stream = TextStream(tokenizer, ids[:1])
    assert [stream.feed([token_id]) for token_id in ids[1:]] == [
        tokenizer.decode(ids[: end + 1])[len(tokenizer.decode(ids[:end])) :] for end in range(1, len(ids))
    ]


def test_a_first_word_after_a_prompt_keeps_its_space(sentencepiece: Tokenizer):
    prompt = sentencepiece.encode("The capital of France is").ids
    ids = encode(sentencepiece, "The capital of France is Paris")[len(prompt) - 1 :]
    assert at_once(sentencepiece, prompt, ids) == " Paris"


def test_a_prompt_that_ends_inside_a_word_is_continued(tokenizer: Tokenizer):
    assert at_once(tokenizer, encode(tokenizer, "The capi"), encode(tokenizer, "of tal")[-3:]).endswith("tal")


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_prompt_that_ends_inside_a_character_lets_the_answer_complete_it(tokenizer: Tokenizer, missing: int):
    ids = [byte_ids(tokenizer)[byte] for byte in "ab中😀".encode()]
    assert at_once(tokenizer, ids[:-missing], [*ids[-missing:], *encode(tokenizer, "x")[-1:]]) == "😀x"


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_prompt_that_ends_inside_a_character_is_not_shown(tokenizer: Tokenizer, missing: int):
    ids = [byte_ids(tokenizer)[byte] for byte in "ab中😀".encode()]
    assert at_once(tokenizer, ids[:-missing], [tokenizer.token_to_id("x")]) == "x"


def test_a_prompt_that_ends_in_the_replacement_character_is_not_shown(tokenizer: Tokenizer):
    prompt = encode(tokenizer, "What is \ufffd")
    assert at_once(tokenizer, prompt, [tokenizer.token_to_id("x")]) == "x"


def test_a_long_run_of_rare_characters_before_the_answer_does_not_spoil_it(tokenizer: Tokenizer):
    single = byte_ids(tokenizer)
    for offset in range(4):  # the context's first id is then every byte of a character
        ids = [single[byte] for byte in ("a" * offset + "\u16a0\u16a2\U0001f9a3" * 5).encode()]
        assert at_once(tokenizer, ids, [single[byte] for byte in "\u16a0".encode()]) == "\u16a0"


def test_the_end_shows_what_is_left_of_a_character(tokenizer: Tokenizer):
    stream = TextStream(tokenizer)
    assert stream.feed([byte_ids(tokenizer)[byte] for byte in b"a\xe4\xb8"]) == "a"
    assert set(stream.flush()) == {"\ufffd"}
    assert stream.flush() == ""


def test_special_tokens_are_left_out_of_the_text(byte_level: Tokenizer):
    end = byte_level.token_to_id("<|endoftext|>")
    assert at_once(byte_level, [], [end, *encode(byte_level, "a"), end, end, *encode(byte_level, " b"), end]) == "a b"


def test_special_tokens_are_shown_where_wanted(byte_level: Tokenizer):
    stream = TextStream(byte_level, [byte_level.token_to_id("<|user|>")], skip_special_tokens=False)
    ids = [*encode(byte_level, "a"), byte_level.token_to_id("<|endoftext|>")]
    assert stream.feed(ids) + stream.flush() == "a<|endoftext|>"


def test_ids_without_a_token_have_no_text(tokenizer: Tokenizer):
    ids = encode(tokenizer, "one two")
    with_unknown = [number for token_id in ids for number in (token_id, tokenizer.get_vocab_size() + 5)]
    assert at_once(tokenizer, [], with_unknown) == tokenizer.decode(ids)


# ---- cost --------------------------------------------------------------------------------------------------------


class CountingTokenizer:
    """Counts the ids that are decoded."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.decoded_ids = 0

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        self.decoded_ids += len(ids)
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def _work(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Ids decoded for each thousand ids fed."""
    counting = CountingTokenizer(tokenizer)
    stream, work = TextStream(counting, ids[:20]), []
    for start in range(0, len(ids) - 999, 1000):
        before = counting.decoded_ids
        stream.feed(ids[start : start + 1000])
        work.append(counting.decoded_ids - before)
    return work


def test_a_token_costs_the_same_however_long_the_text_is(tokenizer: Tokenizer):
    ids = encode(tokenizer, TEXTS["english"] * 400)[:8000]
    work = _work(tokenizer, ids)
    assert max(work[1:]) <= 1.1 * min(work[1:])
    assert max(work) < 6 * 1000


@pytest.mark.parametrize("what", ["replacement character", "invalid bytes", "special tokens", "unknown ids"])
def test_a_token_without_certain_text_has_a_bounded_cost(byte_level: Tokenizer, what: str):
    token_ids = {
        "replacement character": encode(byte_level, "\ufffd"),
        "invalid bytes": [byte_ids(byte_level)[0x80]],
        "special tokens": [byte_level.token_to_id("<|endoftext|>")],
        "unknown ids": [5000],
    }[what]
    work = _work(byte_level, (token_ids * 5000)[:5000])
    assert max(work) <= 1000 * 2 * (MAX_HELD_TOKENS + CONTEXT_TOKENS)
    assert max(work[1:]) <= 1.1 * min(work[1:])


def test_a_replacement_character_written_out_for_long_is_shown_as_often(byte_level: Tokenizer):
    assert at_once(byte_level, [], encode(byte_level, "\ufffd") * 100) == "\ufffd" * 100


# ---- loading -----------------------------------------------------------------------------------------------------


def test_padding_and_truncation_of_the_file_are_off(byte_level: Tokenizer, tmp_path: Path):
    trained = Tokenizer.from_str(byte_level.to_str())
    trained.enable_truncation(2)
    trained.enable_padding(length=10)
    trained.save(str(tmp_path / "tokenizer.json"))
    text = "one two three four five"
    assert load_tokenizer(tmp_path).encode(text).ids == byte_level.encode(text).ids
