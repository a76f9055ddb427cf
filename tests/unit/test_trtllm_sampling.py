"""Requests as SamplingParams, and outputs as steps; the library's objects are plain stand-ins with its attributes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from generation import GenerationRequest, RequestError, Sampling, Step
from trtllm_sampling import SequenceReader, sampling_arguments


def request(**changes: Any) -> GenerationRequest:
    fields: dict[str, Any] = {"key": 1, "prompt_ids": [5, 6], "max_tokens": 10, "end_ids": (2, 3)}
    return GenerationRequest(**(fields | changes))


def output(token_ids: list[int], finish_reason: str | None = None, logprobs: Any = None) -> SimpleNamespace:
    return SimpleNamespace(token_ids=token_ids, finish_reason=finish_reason, logprobs=logprobs)


# ---- sampling_arguments ------------------------------------------------------------------------------------------


def test_a_greedy_request_passes_nothing_that_makes_it_sample():
    assert sampling_arguments(request(sampling=Sampling(seed=7))) == {
        "max_tokens": 10,
        "end_id": 2,
        "stop_token_ids": [3],
        "ignore_eos": False,
        "seed": 7,
        "detokenize": False,
    }


def test_a_request_that_samples_always_passes_all_three():
    """The engines' decoder is greedy where top_p, which is 0 by default, is left out beside a temperature."""
    arguments = sampling_arguments(request(sampling=Sampling(greedy=False, temperature=0.7)))
    assert {name: arguments[name] for name in ("temperature", "top_k", "top_p")} == {
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 1.0,
    }


@pytest.mark.parametrize("greedy", [True, False])
def test_the_seed_is_always_passed(greedy: bool):
    """Without one the library uses 0, and every "random" answer is the same."""
    assert sampling_arguments(request(sampling=Sampling(greedy=greedy, seed=0)))["seed"] == 0
    assert sampling_arguments(request(sampling=Sampling(greedy=greedy, seed=2**64 - 1)))["seed"] == 2**64 - 1


def test_a_request_without_an_end_ignores_that_of_the_model():
    """An end_id is passed all the same: without one the library asks a tokenizer, and there is none."""
    arguments = sampling_arguments(request(end_ids=()))
    assert arguments["ignore_eos"] is True
    assert isinstance(arguments["end_id"], int)
    assert "stop_token_ids" not in arguments


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(repetition_penalty=1.2), {"repetition_penalty": 1.2}),
        (Sampling(presence_penalty=-0.5), {"presence_penalty": -0.5}),
        (Sampling(frequency_penalty=0.1), {"frequency_penalty": 0.1}),
        (Sampling(), {}),
    ],
)
def test_penalties_are_passed_where_they_change_something(sampling: Sampling, expected: dict):
    arguments = sampling_arguments(request(sampling=sampling))
    assert {name: value for name, value in arguments.items() if name.endswith("_penalty")} == expected


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, None), (1, None), (2, 2)])
def test_min_tokens(min_tokens: int, expected: int | None):
    assert sampling_arguments(request(min_tokens=min_tokens)).get("min_tokens") == expected


def test_bad_words_of_one_token_are_passed_and_others_refused():
    assert sampling_arguments(request(bad_words=[(7,), (8,)]))["bad_token_ids"] == [7, 8]
    with pytest.raises(RequestError, match=r"a word of 2 tokens \[7, 8\]; with TensorRT-LLM it must be one token"):
        sampling_arguments(request(bad_words=[(7, 8)]))


def test_words_are_never_left_to_the_library():
    """It matches stop words on tokens; and it reads no words at all of a request that has an end_id."""
    arguments = sampling_arguments(request(is_watched=True, bad_words=[(7,)]))
    assert not {"stop", "bad", "include_stop_str_in_output"} & arguments.keys()


def test_log_probs_are_asked_for():
    assert sampling_arguments(request(log_probs=True))["logprobs"] == 1
    assert "logprobs" not in sampling_arguments(request())


# ---- SequenceReader ----------------------------------------------------------------------------------------------


def test_each_step_has_what_is_new_in_the_one_object_that_grows():
    reader, growing = SequenceReader(request()), output([])
    steps = []
    for token_id in (11, 12, 13):
        growing.token_ids.append(token_id)
        steps.append(reader.read(growing, is_over=False))
    growing.finish_reason = "length"
    steps.append(reader.read(growing, is_over=True))
    assert steps == [Step([11]), Step([12]), Step([13]), Step([], finish_reason="length")]
    growing.token_ids.append(14)
    assert steps[0].token_ids == [11]  # a copy, not a view of the library's list


def test_several_tokens_may_come_at_once():
    reader = SequenceReader(request())
    assert reader.read(output([11, 12]), is_over=False) == Step([11, 12])
    assert reader.read(output([11, 12]), is_over=False) is None
    assert reader.read(output([11, 12, 13], "stop"), is_over=True) == Step([13], finish_reason="stop")


@pytest.mark.parametrize("last", [[11, 12], [11, 12, 2], [11, 12, 3]], ids=["left out", "end_id", "another end"])
def test_the_end_token_is_no_part_of_the_answer_whether_the_library_has_it_or_not(last: list[int]):
    reader = SequenceReader(request())
    assert reader.read(output([11]), is_over=False) == Step([11])
    assert reader.read(output(last, "stop"), is_over=True) == Step([12], finish_reason="stop")


def test_an_end_token_that_comes_before_the_end_is_told_of_is_held_back():
    reader = SequenceReader(request())
    assert reader.read(output([11, 2]), is_over=False) == Step([11])
    assert reader.read(output([11, 2], "stop"), is_over=True) == Step([], finish_reason="stop")


def test_an_end_token_in_the_middle_is_a_token():
    reader = SequenceReader(request())
    assert reader.read(output([11, 2]), is_over=False) == Step([11])
    assert reader.read(output([11, 2, 12]), is_over=False) == Step([2, 12])


def test_a_request_without_ends_keeps_every_token():
    reader = SequenceReader(request(end_ids=()))
    assert reader.read(output([11, 2], "length"), is_over=True) == Step([11, 2], finish_reason="length")


@pytest.mark.parametrize("reason", ["cancelled", "timeout"])
def test_what_the_library_ends_by_itself_is_an_error(reason: str):
    with pytest.raises(RequestError, match=rf"TensorRT-LLM ended the request \({reason}\); send it again"):
        SequenceReader(request()).read(output([11], reason), is_over=True)


@pytest.mark.parametrize(("num_tokens", "reason"), [(3, "stop"), (10, "length")])
def test_an_end_without_a_reason_gets_the_one_it_must_have(num_tokens: int, reason: str):
    step = SequenceReader(request()).read(output([11] * num_tokens), is_over=True)
    assert step is not None
    assert step.finish_reason == reason


def test_log_probs_are_numbers_or_tables_by_token():
    entry = SimpleNamespace(logprob=-0.5)
    other = SimpleNamespace(logprob=-9.0)
    reader = SequenceReader(request(log_probs=True))
    step = reader.read(output([11, 12], logprobs=[{11: entry, 99: other}, -0.25]), is_over=False)
    assert step == Step([11, 12], [-0.5, -0.25])
    step = reader.read(output([11, 12, 13], "length", logprobs=[{11: entry}, -0.25, -0.75]), is_over=True)
    assert step == Step([13], [-0.75], "length")


def test_log_probs_do_not_count_the_end_token():
    reader = SequenceReader(request(log_probs=True))
    assert reader.read(output([11, 2], "stop", [-0.5, -0.1]), is_over=True) == Step([11], [-0.5], "stop")


@pytest.mark.parametrize(
    ("logprobs", "says"),
    [
        (None, "0 log probabilities for 1 tokens"),
        ([{99: SimpleNamespace(logprob=0)}], "no log probability for token 11"),
    ],
)
def test_log_probs_that_are_missing_are_an_error(logprobs: Any, says: str):
    with pytest.raises(RequestError, match=says):
        SequenceReader(request(log_probs=True)).read(output([11], logprobs=logprobs), is_over=False)
