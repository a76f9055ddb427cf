"""The texts of all sequences in flight: told apart, in order, and gone when they are over."""

from __future__ import annotations

import pytest
import text_states
from chunk_header import ChunkHeader
from text_states import TextStates
from tokenizers import Tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def first(key: int, **fields) -> ChunkHeader:
    return ChunkHeader(key=key, **{"is_last": False, **fields})


def later(key: int, **fields) -> ChunkHeader:
    return ChunkHeader(key=key, is_first=False, **{"is_last": False, **fields})


def last(key: int, **fields) -> ChunkHeader:
    return later(key, is_last=True, **fields)


def test_a_sequence_in_one_chunk_leaves_no_state(tokenizer: Tokenizer):
    states, ids = TextStates(tokenizer), encode(tokenizer, "one two 日本")
    assert states.text_of(ChunkHeader(key=0), ids) == tokenizer.decode(ids)
    assert len(states) == 0


def test_chunks_joined_are_the_whole_text(tokenizer: Tokenizer):
    states, ids = TextStates(tokenizer), encode(tokenizer, "one two 日本 👩‍🚀 three")
    texts = [states.text_of(first(7), ids[:3])]
    texts += [states.text_of(later(7), [token_id]) for token_id in ids[3:-1]]
    texts += [states.text_of(last(7), ids[-1:])]
    assert "".join(texts) == tokenizer.decode(ids)
    assert len(states) == 0


def test_sequences_do_not_mix(byte_level: Tokenizer):
    states, texts = TextStates(byte_level), {1: "日本語", 2: "中文", 3: "one two"}
    shown = dict.fromkeys(texts, "")
    ids = {key: encode(byte_level, text) for key, text in texts.items()}
    for step in range(max(map(len, ids.values()))):
        for key in texts:
            if step < len(ids[key]):
                header = (first if step == 0 else later)(key)
                shown[key] += states.text_of(header, ids[key][step : step + 1])
    for key in texts:
        shown[key] += states.text_of(last(key), [])
    assert shown == texts


def test_the_context_is_not_shown_and_gives_the_first_word_its_space(sentencepiece: Tokenizer):
    ids = encode(sentencepiece, "France is Paris")
    prompt = sentencepiece.encode("France is").ids
    states = TextStates(sentencepiece)
    header = ChunkHeader(key=1, context=prompt[-8:])
    assert states.text_of(header, ids[len(prompt) - 1 :]) == " Paris"


def test_the_last_chunk_brings_what_was_held(byte_level: Tokenizer):
    states = TextStates(byte_level)
    assert states.text_of(first(1), encode(byte_level, "a€")[:2]) == "a"
    assert states.text_of(last(1), []) == "\ufffd"


def test_the_stop_word_is_cut_from_the_end(byte_level: Tokenizer):
    states = TextStates(byte_level)
    states.text_of(first(1), encode(byte_level, "one"))
    assert states.text_of(last(1, trim_characters=4), encode(byte_level, " two STOP")) == " two "


def test_more_to_cut_than_there_is_cuts_everything(byte_level: Tokenizer):
    assert TextStates(byte_level).text_of(ChunkHeader(key=1, trim_characters=5), encode(byte_level, "abc")) == ""


def test_special_tokens_are_shown_only_where_wanted(byte_level: Tokenizer):
    states, end = TextStates(byte_level), byte_level.token_to_id("<|endoftext|>")
    assert states.text_of(ChunkHeader(key=1), [end]) == ""
    assert states.text_of(ChunkHeader(key=1, keep_special_tokens=True), [end]) == "<|endoftext|>"
    states.text_of(first(2, keep_special_tokens=True), encode(byte_level, "a"))
    assert states.text_of(last(2, keep_special_tokens=True), [end]) == "<|endoftext|>"


def test_a_forgotten_sequence_has_no_state(byte_level: Tokenizer):
    states = TextStates(byte_level)
    states.text_of(first(1), encode(byte_level, "a"))
    states.forget(1)
    states.forget(2)
    assert len(states) == 0
    with pytest.raises(KeyError):
        states.text_of(last(1), [])


def test_states_without_an_end_are_bounded(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_states, "MAX_STATES", 10)
    states = TextStates(byte_level)
    for key in range(100):
        states.text_of(first(key), encode(byte_level, "a"))
    assert len(states) == 10


def test_a_stream_that_goes_on_outlives_those_that_do_not(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_states, "MAX_STATES", 10)
    states, ids = TextStates(byte_level), encode(byte_level, "a")
    states.text_of(first(-1), ids)
    for key in range(100):
        states.text_of(first(key), ids)
        assert states.text_of(later(-1), ids) == "a"


def test_a_state_that_nobody_uses_any_more_is_dropped(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    now = 1000.0
    monkeypatch.setattr(text_states.time, "monotonic", lambda: now)
    states, ids = TextStates(byte_level), encode(byte_level, "a")
    for key in range(5):
        states.text_of(first(key), ids)
    now += text_states.STALE_SECONDS - 1
    states.text_of(later(3), ids)
    now += 2
    states.text_of(first(9), ids)
    assert len(states) == 2
    assert states.text_of(later(3), ids) == "a"
