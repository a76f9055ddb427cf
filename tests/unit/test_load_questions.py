"""What the load client asks: lengths, prompts, traces."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from random import Random

import pytest
from failures import UsageError
from lengths import parse_lengths
from questions import Prompts, Question, read_prompts, words
from traces import TracedRequest, read_trace

DRAWS = 20_000


def draws(text: str) -> list[int]:
    lengths, random = parse_lengths(text), Random(1)
    return [lengths.draw(random) for _ in range(DRAWS)]


# ---- lengths ---------------------------------------------------------------------------------------------------------


def test_a_number_is_always_itself():
    assert set(draws("128")) == {128}


def test_uniform_takes_every_length_between_its_ends():
    found = draws("uniform:16:20")
    assert set(found) == {16, 17, 18, 19, 20}
    assert statistics.mean(found) == pytest.approx(18, abs=0.05)


def test_choice_takes_each_as_often():
    found = draws("choice:64,128,64")
    assert set(found) == {64, 128}
    assert found.count(64) / DRAWS == pytest.approx(2 / 3, abs=0.02)


@pytest.mark.parametrize("kind", ["normal", "lognormal"])
def test_mean_and_deviation_are_those_of_the_length(kind: str):
    found = draws(f"{kind}:200:50")
    assert statistics.mean(found) == pytest.approx(200, rel=0.01)
    assert statistics.stdev(found) == pytest.approx(50, rel=0.03)


@pytest.mark.parametrize("text", ["normal:10:100:40", "lognormal:10:100:40"])
def test_a_length_is_at_least_one_and_at_most_the_third_number(text: str):
    found = draws(text)
    assert min(found) == 1
    assert max(found) == 40


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "'' is not a length; write 128"),
        ("many", "'many' is not a length; write 128"),
        ("0", "'0' has a length below 1"),
        ("3e9", "'3e9' has a length above 2147483647, the largest that the service can be asked for"),
        ("1.5", "'1.5' has a length that is no whole number; write 128"),
        ("nan", "'nan' has a length that is no number"),
        ("unifrom:1:2", "'unifrom:1:2' is no distribution of lengths; perhaps you meant uniform:LOWEST:HIGHEST"),
        ("zipf:2", "'zipf:2' is no distribution of lengths; write 128, uniform:LOWEST:HIGHEST, normal:"),
        ("uniform:5", "'uniform:5' has 1 numbers; write uniform:LOWEST:HIGHEST"),
        ("uniform:9:5", "'uniform:9:5' begins above its end; write uniform:5:9"),
        ("uniform:0:5", "'uniform:0:5' has a length below 1"),
        ("normal:128", "'normal:128' has 1 numbers; write normal:MEAN:DEVIATION or normal:MEAN:DEVIATION:HIGHEST"),
        ("normal:128:-1", "'normal:128:-1' has the standard deviation -1; it must be at least 0"),
        ("lognormal:0:1", "'lognormal:0:1' has a length below 1"),
        ("choice:", "'choice:' is not a length; write choice:64,128,256"),
        ("choice:64,x", "'choice:64,x' is not a length; write choice:64,128,256"),
    ],
)
def test_what_is_no_length_is_refused(text: str, sentence: str):
    with pytest.raises(UsageError) as refusal:
        parse_lengths(text)
    assert sentence in str(refusal.value)


# ---- prompts ---------------------------------------------------------------------------------------------------------


def prompts(**options: object) -> Prompts:
    return Prompts(**{"input_tokens": parse_lengths("8"), "output_tokens": parse_lengths("32"), **options})


def take(source: Prompts, number: int, seed: int = 1) -> list[Question]:
    return list(itertools.islice(source.questions(Random(seed)), number))


def test_random_prompts_have_as_many_words_as_asked_and_repeat_with_their_seed():
    found = take(prompts(input_tokens=parse_lengths("uniform:5:9")), 200)
    assert {len(question.prompt.split()) for question in found} == {5, 6, 7, 8, 9}
    assert found == take(prompts(input_tokens=parse_lengths("uniform:5:9")), 200)
    assert len({question.prompt for question in found}) == 200


def test_given_prompts_are_all_asked():
    found = take(prompts(texts=("a", "b", "c")), 100)
    assert {question.prompt for question in found} == {"a", "b", "c"}
    assert {question.output_tokens for question in found} == {32}


def test_the_asked_share_of_streams_is_cancelled_before_its_end():
    found = take(prompts(cancel_ratio=0.25), 10_000)
    cancelled = [question.cancel_after_tokens for question in found if question.cancel_after_tokens is not None]
    assert len(cancelled) / len(found) == pytest.approx(0.25, abs=0.02)
    assert set(cancelled) == set(range(1, 32))
    assert all(question.cancel_after_tokens is None for question in take(prompts(), 100))


def test_a_prompts_file_has_one_a_line(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text('first\n\n  {"prompt": "second"}\n')
    assert read_prompts(path) == ("first", '  {"prompt": "second"}')


def test_a_jsonl_file_has_prompts_and_may_have_more(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "first", "answer": 1}\n{"prompt": "zwöi\\n"}\n')
    assert read_prompts(path) == ("first", "zwöi\n")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "has no prompts; write one a line"),
        (b"\n\n", "has no prompts; write one a line"),
        (b'{"prompt": "a"}\n{"text": "b"}', 'line 2: it has no prompt; a line is like {"prompt": "Hello"}'),
        (b'{"prompt": 5}', "line 1: prompt is 5; it must be a text"),
        (b'{"prompt": "\\udfff"}', "line 1: prompt has half a character at 0, which UTF-8 cannot hold"),
        (b"hello", "line 1: not JSON: Expecting value at character 1"),
        (b"[1]", "line 1: [1] is no JSON object"),
        (b"\xff\xfe", "is no UTF-8 text: byte 0 is wrong"),
    ],
)
def test_a_wrong_prompts_file_is_refused_with_its_line(tmp_path: Path, content: bytes, sentence: str):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError) as refusal:
        read_prompts(path)
    assert str(refusal.value).startswith(str(path))
    assert sentence in str(refusal.value)


# ---- traces ----------------------------------------------------------------------------------------------------------


def test_a_trace_has_times_and_prompts_or_lengths(tmp_path: Path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"time": 0, "prompt": "a", "output_tokens": 3}\n\n{"time": 0.5, "input_tokens": 7}\n')
    assert read_trace(path) == (
        TracedRequest(seconds=0.0, prompt="a", input_tokens=None, output_tokens=3),
        TracedRequest(seconds=0.5, prompt=None, input_tokens=7, output_tokens=None),
    )


def test_a_traced_request_is_asked_as_it_was_or_as_the_options_say():
    as_it_was = TracedRequest(seconds=0, prompt="a", input_tokens=None, output_tokens=3)
    assert prompts().traced(as_it_was, Random(1)) == Question("a", 3)
    with_lengths = TracedRequest(seconds=0, prompt=None, input_tokens=7, output_tokens=None)
    question = prompts().traced(with_lengths, Random(1))
    assert len(question.prompt.split()) == 7
    assert question.output_tokens == 32


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes at character 2"),
        ("5", "5 is no JSON object"),
        ({"prompt": "a"}, "it has no time; give seconds from the start"),
        ({"time": 1}, "it must have either prompt or input_tokens"),
        ({"time": 1, "prompt": "a", "input_tokens": 5}, "it must have either prompt or input_tokens"),
        ({"tiem": 1, "prompt": "a"}, "'tiem' is no key of a trace; perhaps you meant 'time'"),
        ({"time": 1, "prompt": "a", "max_tokens": 1}, "'max_tokens' is no key of a trace; perhaps you meant 'out"),
        ({"time": 1, "prompt": "a", "x": 1}, "'x' is no key of a trace; the keys are time, prompt, input_tokens"),
        ({"time": -1, "prompt": "a"}, "time is -1; it must be a number of seconds, at least 0"),
        ({"time": "1", "prompt": "a"}, "time is '1'; it must be a number of seconds"),
        ({"time": True, "prompt": "a"}, "time is True; it must be a number of seconds"),
        ('{"time": NaN, "prompt": "a"}', "time is nan; it must be a number of seconds"),
        ({"time": 1, "prompt": 5}, "prompt is 5; it must be a text"),
        ({"time": 1, "input_tokens": 0}, "input_tokens is 0; it must be a whole number from 1 to 2147483647"),
        ('{"time": 1, "prompt": "a\\ud800"}', "prompt has half a character at 1, which UTF-8 cannot hold"),
        ({"time": 1, "input_tokens": 1.5}, "input_tokens is 1.5; it must be a whole number"),
        ({"time": 1, "prompt": "a", "output_tokens": None}, "output_tokens is None; it must be a whole number"),
        ({"time": 0.5, "prompt": "a"}, "time 0.5 is before 0.75, the time of the line before; sort the lines by time"),
    ],
)
def test_a_wrong_line_of_a_trace_is_refused(tmp_path: Path, line: str | dict, sentence: str):
    path = tmp_path / "trace.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text('{"time": 0.75, "prompt": "good"}\n' + text + "\n")
    with pytest.raises(UsageError) as refusal:
        read_trace(path)
    assert f"{path} line 2: {sentence}" in str(refusal.value)


def test_an_empty_or_missing_trace_is_refused(tmp_path: Path):
    path = tmp_path / "trace.jsonl"
    with pytest.raises(UsageError, match="cannot be read: No such file or directory"):
        read_trace(path)
    path.write_text("\n")
    with pytest.raises(UsageError, match="has no request; a line is like"):
        read_trace(path)


def test_random_words_are_frequent_english_ones():
    assert set(words(1000, Random(1)).split()) <= set(words(100_000, Random(2)).split())
