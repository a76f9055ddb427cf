"""One request's tensors: every value is checked, and every default is what the README says."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any, get_args

import numpy as np
import pytest
from generation import Capability, EngineLimits, RequestError, Sampling
from request_reading import Prompt, RequestReader
from tokenizers import Tokenizer

LIMITS = EngineLimits(max_batch_size=8, max_input_len=10, max_seq_len=16, max_beam_width=4, vocab_size=900)
ALL: frozenset[Capability] = frozenset(get_args(Capability))

DTYPES = {
    **dict.fromkeys(("seed", "random_seed"), np.uint64),
    **dict.fromkeys(("temperature", "runtime_top_p", "len_penalty", "repetition_penalty"), np.float32),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), np.float32),
    **dict.fromkeys(("streaming", "exclude_input_in_output", "skip_special_tokens", "return_log_probs"), np.bool_),
    **dict.fromkeys(("return_context_logits", "return_generation_logits"), np.bool_),
    "stop_words": np.object_,
}


def tensors(**values: Any) -> dict[str, np.ndarray]:
    """A request of one prompt of three tokens; a value becomes a tensor [1, 1], a list one row, an array stays."""
    made = {}
    for name, value in {"input_ids": [5, 6, 7], **values}.items():
        if value is None:
            continue
        if not isinstance(value, np.ndarray):
            value = np.array([value if isinstance(value, list) else [value]], DTYPES.get(name, np.int32))
        made[name] = value
    return made


def word_list(*words: list[int], n: int | None = None) -> np.ndarray:
    """NVIDIA's form for one prompt."""
    ids = [token_id for word in words for token_id in word]
    ends = list(np.cumsum([len(word) for word in words]))
    n = n or max(len(ids), len(ends))
    return np.array([[ids + [0] * (n - len(ids)), ends + [-1] * (n - len(ends))]], np.int32)


def make_reader(tokenizer: Tokenizer, **changes: Any) -> RequestReader:
    fields = {
        "limits": LIMITS,
        "capabilities": ALL,
        "engine_kind": "scripted",
        "tokenizer": tokenizer,
        "end_ids": (2, 3),
    }
    return RequestReader(**{**fields, **changes})


@pytest.fixture
def reader(byte_level: Tokenizer) -> RequestReader:
    return make_reader(byte_level)


def read(reader: RequestReader, **values: Any) -> Prompt:
    (prompt,) = reader.read(tensors(**values)).prompts
    return prompt


# ---- defaults ----------------------------------------------------------------------------------------------------


def test_ids_alone_are_a_request(reader: RequestReader):
    prompt = read(reader)
    (generation,) = prompt.generations
    assert (prompt.batch_index, prompt.streaming, prompt.echo, prompt.keep_special_tokens) == (0, False, False, False)
    assert prompt.stop_words == []
    assert list(prompt.prompt_ids) == [5, 6, 7]
    assert generation.max_tokens == 16 - 3
    assert (generation.min_tokens, generation.end_ids, generation.bad_words) == (0, (2, 3), [])
    assert (generation.num_beams_returned, generation.log_probs) == (1, False)


def test_the_default_changes_no_probability(reader: RequestReader):
    sampling = read(reader).generations[0].sampling
    assert sampling == Sampling(seed=sampling.seed)


def test_empty_tensors_are_as_good_as_none(reader: RequestReader):
    """A JSON "" or [] comes as a tensor without values."""
    empty = {
        name: np.zeros((1, 0), DTYPES.get(name, np.int32))
        for name in ("input_lengths", "request_output_len", "stop_words", "end_id", "seed", "temperature", "streaming")
    }
    empty |= {name: np.zeros((1, 2, 0), np.int32) for name in ("stop_words_list", "bad_words_list")}
    prompt, plain = read(reader, **empty), read(reader)
    assert prompt.generations[0].max_tokens == plain.generations[0].max_tokens
    assert prompt.generations[0].end_ids == plain.generations[0].end_ids
    assert prompt.generations[0].sampling.greedy
    assert (prompt.stop_words, prompt.streaming) == ([], False)


def test_what_nvidias_clients_always_send_is_taken(byte_level: Tokenizer):
    """The values of the official example clients, which stand for "no wish"; the least able engine takes them."""
    reader = make_reader(byte_level, capabilities=frozenset())
    values = {"beam_width": 1, "len_penalty": 1.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "min_length": 1}
    values |= {"frequency_penalty": 0.0, "runtime_top_k": 1, "runtime_top_p": 0.0, "temperature": 1.0, "random_seed": 0}
    values |= {"end_id": 2, "pad_id": 2, "stop_words": b"", "return_log_probs": False, "num_return_sequences": 1}
    sampling = read(reader, **values).generations[0].sampling
    assert sampling == Sampling(top_k=1, top_p=0.0, seed=0)


# ---- prompts -----------------------------------------------------------------------------------------------------


def test_padding_behind_the_length_is_not_part_of_the_prompt(reader: RequestReader):
    assert list(read(reader, input_ids=[5, 6, 0, 0], input_lengths=2).prompt_ids) == [5, 6]


def test_padding_may_be_no_token_at_all(reader: RequestReader):
    assert list(read(reader, input_ids=[5, -1, 10**6], input_lengths=1).prompt_ids) == [5]


def test_every_row_is_a_prompt_of_its_own(reader: RequestReader):
    rows = {"input_ids": [[5, 6], [7, 0]], "input_lengths": [[2], [1]], "request_output_len": [[3], [4]]}
    prompts = reader.read(
        {name: np.array(value, np.int32) for name, value in rows.items()}
        | {"streaming": np.array([[True], [False]]), "stop_words": np.array([[b"a", b"b"], [b"", b"c"]], np.object_)}
    ).prompts
    assert [prompt.batch_index for prompt in prompts] == [0, 1]
    assert [list(prompt.prompt_ids) for prompt in prompts] == [[5, 6], [7]]
    assert [prompt.generations[0].max_tokens for prompt in prompts] == [3, 4]
    assert [prompt.streaming for prompt in prompts] == [True, False]
    assert [prompt.stop_words for prompt in prompts] == [["a", "b"], ["c"]]


def test_an_engine_is_told_which_tokens_somebody_waits_for(reader: RequestReader):
    (plain,) = read(reader).generations
    (streamed,) = read(reader, streaming=True).generations
    (watched,) = read(reader, stop_words=[b"x"]).generations
    assert [plain.is_streamed, streamed.is_streamed, watched.is_streamed] == [False, True, False]
    assert [plain.is_watched, streamed.is_watched, watched.is_watched] == [False, False, True]


def test_a_request_says_when_it_arrived_and_where_it_goes(reader: RequestReader):
    request = reader.read(tensors(ARRIVAL=np.array([[1, 1234]], np.int64)), timeout_microseconds=2_500_000)
    assert (request.arrival_ns, request.from_ensemble, request.timeout_seconds) == (1234, True, 2.5)


def test_a_request_by_the_engine_channel_does_not_go_to_postprocessing(reader: RequestReader):
    request = reader.read(tensors(ARRIVAL=np.array([[0, 1234]], np.int64)))
    assert (request.arrival_ns, request.from_ensemble, request.timeout_seconds) == (1234, False, None)


def test_a_direct_request_arrives_when_it_is_read(reader: RequestReader):
    before = time.time_ns()
    request = reader.read(tensors())
    assert before <= request.arrival_ns <= time.time_ns()
    assert not request.from_ensemble


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2,), (1, 2, 1)])
def test_an_arrival_of_another_shape_is_refused(reader: RequestReader, shape: tuple[int, ...]):
    with pytest.raises(RequestError, match="ARRIVAL has shape"):
        reader.read(tensors(ARRIVAL=np.zeros(shape, np.int64)))


@pytest.mark.parametrize(("levels", "default"), [(0, 0), (1, 1), (2, 1), (3, 2), (10, 5)])
def test_without_a_priority_a_request_is_in_the_middle(byte_level: Tokenizer, levels: int, default: int):
    assert make_reader(byte_level, priority_levels=levels).read(tensors()).priority == default


def test_of_several_prompts_the_highest_priority_counts(byte_level: Tokenizer):
    rows = {"input_ids": np.full((3, 2), 5, np.int32), "priority": np.array([[3], [2], [3]], np.int32)}
    assert make_reader(byte_level, priority_levels=3).read(rows).priority == 2


@pytest.mark.parametrize(
    ("levels", "priority", "message"),
    [(0, 1, "this server has no priority levels"), (3, 0, "must be 1, the highest, to 3"), (3, 4, "to 3")],
)
def test_a_priority_that_is_not_there_is_refused(byte_level: Tokenizer, levels: int, priority: int, message: str):
    with pytest.raises(RequestError, match=message):
        make_reader(byte_level, priority_levels=levels).read(tensors(priority=priority))


def test_no_two_generations_have_the_same_key(reader: RequestReader):
    many = list(reader.read({"input_ids": np.full((5, 2), 5, np.int32)}).prompts)
    many += [read(reader, temperature=1.0, num_return_sequences=8)]
    keys = [generation.key for prompt in many for generation in prompt.generations]
    assert len(set(keys)) == len(keys) == 13


def test_threads_that_read_at_the_same_time_get_different_keys(reader: RequestReader):
    keys: list[int] = []
    go = threading.Barrier(4)

    def read_many() -> None:
        go.wait()
        keys.extend(read(reader).generations[0].key for _ in range(500))

    threads = [threading.Thread(target=read_many) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(set(keys)) == 4 * 500


def test_keys_leave_room_for_the_beam(byte_level: Tokenizer):
    for _ in range(100):
        assert 0 < read(make_reader(byte_level)).generations[0].key < 2**49


# ---- limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {"input_ids": [899] * 10},
        {"input_ids": [0] * 10, "request_output_len": 6},
        {"request_output_len": 13},
        {"request_output_len": 1, "min_tokens": 1},
        {"min_tokens": 13},
        {"end_id": 0},
        {"end_id": 899},
        {"end_id": -1},
        {"pad_id": -1},
        {"runtime_top_k": 0},
        {"runtime_top_k": 2**31 - 1},
        {"runtime_top_p": 0.0},
        {"runtime_top_p": 1.0},
        {"temperature": 0.0},
        {"temperature": 100.0},
        {"repetition_penalty": 0.01},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"beam_width": 4, "num_return_sequences": 4},
        {"beam_width": 4, "len_penalty": -1.5},
        {"temperature": 1.0, "num_return_sequences": 8},
        {"seed": 2**64 - 1},
        {"seed": 5, "random_seed": 5},
        {"stop_words": [b"a"] * 256},
        {"min_tokens": 2, "min_length": 2},
    ],
    ids=str,
)
def test_a_value_at_its_limit_is_taken(reader: RequestReader, values: dict):
    assert read(reader, **values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"input_ids": None},
            "input_ids is missing: the model tensorrt_llm takes token ids; send text to the ensemble",
        ),
        ({"input_ids": np.array([5, 6], np.int32)}, r"input_ids has shape \[2\]; it must be \[prompts, tokens\]"),
        ({"input_ids": np.zeros((0, 3), np.int32)}, r"input_ids has shape \[0, 3\]"),
        ({"input_ids": np.zeros((1, 2, 3), np.int32)}, r"input_ids has shape \[1, 2, 3\]"),
        ({"input_ids": np.zeros((1, 0), np.int32)}, "the prompt has no tokens; send at least one"),
        ({"input_lengths": 0}, "the prompt has no tokens"),
        ({"input_lengths": -1}, "input_lengths is -1, but input_ids has 3 values"),
        ({"input_lengths": 4}, "input_lengths is 4, but input_ids has 3 values"),
        ({"input_lengths": 2**31 - 1}, "input_lengths is 2147483647"),
        ({"input_lengths": [1, 2]}, "input_lengths has 2 values for one prompt; send one"),
        ({"input_ids": [5] * 11}, "the prompt has 11 tokens; this engine takes at most 10 .*max-input-len.*shorten"),
        ({"input_ids": [5, 900]}, "input_ids holds 900; token ids of this model are 0 to 899"),
        ({"input_ids": [-1, 5]}, "input_ids holds -1;"),
        ({"input_ids": [2**31 - 1]}, "input_ids holds 2147483647;"),
        ({"input_ids": np.array([[-(2**63)]])}, "input_ids holds -9223372036854775808;"),
        ({"request_output_len": 0}, r"max_tokens \(request_output_len\) is 0; with a prompt of 3 tokens .* 1 to 13"),
        ({"request_output_len": 14}, r"max_tokens \(request_output_len\) is 14;.* may have 16 tokens .*max-seq-len"),
        ({"request_output_len": -(2**31)}, r"max_tokens \(request_output_len\) is -2147483648;"),
        ({"request_output_len": np.array([[2**63 - 1]])}, "is 9223372036854775807;"),
        ({"request_output_len": [1, 2]}, r"max_tokens \(request_output_len\) has 2 values"),
        ({"min_tokens": -1}, "min_tokens is -1; it must be 0 to max_tokens, here 13"),
        ({"min_tokens": 5, "request_output_len": 4}, "min_tokens is 5; it must be 0 to max_tokens, here 4"),
        ({"min_length": 14}, "min_tokens is 14"),
        ({"min_tokens": 1, "min_length": 2}, "min_tokens is 1 and min_length is 2; they mean the same, so send one"),
        ({"end_id": -2}, "end_id is -2; it must be a token id, 0 to 899, or -1 for none"),
        ({"end_id": 900}, "end_id is 900"),
        ({"pad_id": 900}, "pad_id is 900"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be at least 0"),
        ({"temperature": float("nan")}, "temperature is nan; it must be a finite number"),
        ({"temperature": float("inf")}, "temperature is inf; it must be a finite number"),
        ({"temperature": float("-inf")}, "temperature is -inf"),
        ({"runtime_top_k": -1}, r"top_k \(runtime_top_k\) is -1; it must be 0 \(all tokens\) or more"),
        ({"runtime_top_p": -0.5}, r"top_p \(runtime_top_p\) is -0.5; it must be 0 to 1"),
        ({"runtime_top_p": 1.5}, r"top_p \(runtime_top_p\) is 1.5; it must be 0 to 1"),
        ({"runtime_top_p": float("nan")}, r"top_p \(runtime_top_p\) is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0; it must be above 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; it must be -2 to 2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty is -2.5; it must be -2 to 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"len_penalty": float("nan"), "beam_width": 2}, r"length_penalty \(len_penalty\) is nan"),
        ({"len_penalty": 0.5}, r"length_penalty \(len_penalty\) is 0.5 and beam_width is 1; it only ranks beams"),
        ({"beam_width": 0}, "beam_width is 0; this engine takes 1 to 4"),
        ({"beam_width": 5}, "beam_width is 5; this engine takes 1 to 4"),
        ({"beam_width": 2, "streaming": True}, "stream is true and beam_width is 2; beams are known only at the end"),
        ({"beam_width": 2, "num_return_sequences": 3}, r"num_return_sequences is 3; it must be 1 to 2 \(beam_width\)"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0; it must be 1 to 8"),
        ({"num_return_sequences": 9, "temperature": 1.0}, "num_return_sequences is 9; it must be 1 to 8 .*batch-size"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2, but greedy decoding gives the same sequence"),
        ({"num_return_sequences": 2, "temperature": 1.0, "runtime_top_k": 1}, "greedy decoding gives the same"),
        ({"return_context_logits": True}, "return_context_logits is true; this repository returns log probabilities"),
        ({"return_generation_logits": True}, "return_generation_logits is true"),
        ({"seed": 1, "random_seed": 2}, "seed is 1 and random_seed is 2; they mean the same, so send one of them"),
        ({"seed": [1, 2]}, "seed has 2 values for one prompt"),
        ({"streaming": [True, False]}, "streaming has 2 values for one prompt"),
        ({"stop_words": b"a\xff"}, "stop_words is not UTF-8: byte 1 is 0xff"),
        ({"stop_words": [b"a"] * 257}, "stop_words has 257 words; at most 256 can be watched for"),
        ({"stop_words": [b"a"] * 256, "stop_words_list": word_list([1])}, "stop_words has 257 words"),
        ({"stop_words": np.array(b"a", np.object_)}, r"stop_words has shape \[\]; it needs one row per prompt"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named_with_its_rule(reader: RequestReader, values: dict, sentence: str):
    with pytest.raises(RequestError, match=sentence):
        reader.read(tensors(**values))


def test_a_tensor_with_too_few_rows_is_named(reader: RequestReader):
    ids = np.full((2, 3), 5, np.int32)
    for name, value in (("input_lengths", 3), ("stop_words", b"a"), ("streaming", True)):
        with pytest.raises(RequestError, match=rf"{name} has shape \[1, 1\]; it needs one row per prompt"):
            reader.read(tensors(**{"input_ids": ids, name: value}))
    with pytest.raises(RequestError, match=r"bad_words_list has shape \[1, 2, 1\]; it must be \[prompts, 2, n\]"):
        reader.read(tensors(input_ids=ids, bad_words_list=word_list([1])))


def test_a_prompt_that_fills_the_engine_is_refused_with_the_limit(byte_level: Tokenizer):
    limits = EngineLimits(max_batch_size=8, max_input_len=16, max_seq_len=16, max_beam_width=1, vocab_size=900)
    with pytest.raises(RequestError, match=r"has 16 tokens and leaves no room .* may have 16"):
        read(make_reader(byte_level, limits=limits), input_ids=[5] * 16)


def test_the_first_wrong_row_fails_the_request(reader: RequestReader):
    with pytest.raises(RequestError, match="input_ids holds 900"):
        reader.read({"input_ids": np.array([[5], [900]], np.int32)})


# ---- what an engine cannot do ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "values", "what"),
    [
        ("beam_search", {"beam_width": 2}, "beam_width above 1"),
        ("log_probs", {"return_log_probs": True}, "return_log_probs"),
        ("bad_words", {"bad_words_list": word_list([1])}, "bad_words"),
        ("min_tokens", {"min_tokens": 2}, "min_tokens above 1"),
        ("min_tokens", {"min_length": 2}, "min_tokens above 1"),
        ("no_end_id", {"end_id": -1}, r"end_id -1 \(never end before max_tokens\)"),
        ("penalties", {"repetition_penalty": 1.1}, "a repetition_penalty, presence_penalty or frequency_penalty"),
        ("penalties", {"presence_penalty": 0.1}, "a repetition_penalty, presence_penalty or frequency_penalty"),
        ("penalties", {"frequency_penalty": -0.1}, "a repetition_penalty, presence_penalty or frequency_penalty"),
        ("seed", {"seed": 0, "temperature": 0.7}, "seed"),
        ("seed", {"random_seed": 5, "runtime_top_p": 0.7}, "seed"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(byte_level: Tokenizer, missing: Capability, values: dict, what: str):
    reader = make_reader(byte_level, capabilities=ALL - {missing})
    with pytest.raises(RequestError, match=f"{what} is not something the engine 'scripted' can do; leave it out"):
        read(reader, **values)
    assert read(make_reader(byte_level), **values)


@pytest.mark.parametrize("values", [{"repetition_penalty": 1.0, "presence_penalty": 0.0}, {"seed": 5}, {"seed": None}])
def test_what_changes_nothing_needs_no_capability(byte_level: Tokenizer, values: dict):
    assert read(make_reader(byte_level, capabilities=frozenset()), **values)


# ---- sampling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "greedy"),
    [
        ({}, True),
        ({"temperature": 1.0}, False),
        ({"runtime_top_k": 5}, False),
        ({"runtime_top_k": 0}, False),
        ({"runtime_top_p": 0.9}, False),
        ({"temperature": 0.0}, True),
        ({"temperature": 0.0, "runtime_top_p": 0.9}, True),
        ({"temperature": 1e-40}, True),
        ({"temperature": 0.01}, False),
        ({"runtime_top_k": 1, "temperature": 2.0}, True),
        ({"runtime_top_p": 0.0, "temperature": 2.0}, True),
        ({"beam_width": 2, "temperature": 2.0}, True),
        ({"seed": 5, "repetition_penalty": 1.2}, True),
    ],
    ids=str,
)
def test_sampling_is_greedy_unless_asked_for(reader: RequestReader, values: dict, greedy: bool):
    assert read(reader, **values).generations[0].sampling.greedy is greedy


def test_the_numbers_reach_the_engine(reader: RequestReader):
    values = {"temperature": 0.5, "runtime_top_k": 7, "runtime_top_p": 0.25, "repetition_penalty": 1.5}
    values |= {"presence_penalty": -0.5, "frequency_penalty": 0.75, "seed": 9}
    assert read(reader, **values).generations[0].sampling == Sampling(
        temperature=0.5,
        top_k=7,
        top_p=0.25,
        greedy=False,
        seed=9,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
    )


def test_more_top_k_than_tokens_means_all_tokens(reader: RequestReader):
    assert read(reader, runtime_top_k=2**31 - 1).generations[0].sampling.top_k == 900


@pytest.mark.parametrize("name", ["seed", "random_seed"])
def test_a_seed_has_two_names(reader: RequestReader, name: str):
    assert read(reader, **{name: 2**64 - 1}).generations[0].sampling.seed == 2**64 - 1


def test_without_a_seed_every_request_has_its_own(reader: RequestReader):
    assert len({read(reader).generations[0].sampling.seed for _ in range(50)}) == 50


def test_the_sequences_of_a_prompt_have_different_seeds(reader: RequestReader):
    generations = read(reader, temperature=1.0, num_return_sequences=3, seed=5).generations
    assert [generation.sampling.seed for generation in generations] == [5, 6, 7]


def test_seeds_stay_64_bits_wide(reader: RequestReader):
    generations = read(reader, temperature=1.0, num_return_sequences=3, seed=2**64 - 1).generations
    assert [generation.sampling.seed for generation in generations] == [2**64 - 1, 0, 1]


def test_beams_are_one_generation(reader: RequestReader):
    (generation,) = read(reader, beam_width=4, num_return_sequences=2, len_penalty=0.5).generations
    assert (generation.sampling.beam_width, generation.num_beams_returned) == (4, 2)
    assert generation.sampling.length_penalty == 0.5


def test_all_beams_come_back_unless_fewer_are_asked_for(reader: RequestReader):
    assert read(reader, beam_width=3).generations[0].num_beams_returned == 3


# ---- endings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("end_id", "end_ids"), [(None, (2, 3)), (5, (5,)), (0, (0,)), (-1, ())])
def test_end_id_takes_the_place_of_the_models_own(reader: RequestReader, end_id: int | None, end_ids: tuple):
    assert read(reader, end_id=end_id).generations[0].end_ids == end_ids


def test_pad_id_changes_nothing(reader: RequestReader):
    assert read(reader, pad_id=5).generations[0].end_ids == (2, 3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stop_words": [b"a", b"", b"\n\n"]}, ["a", "\n\n"]),
        ({"stop_words": ["日本".encode()]}, ["日本"]),
        ({"stop_words": b""}, []),
    ],
)
def test_stop_words_are_text(reader: RequestReader, values: dict, words: list[str]):
    assert read(reader, **values).stop_words == words


def test_stop_words_of_ids_are_found_as_their_text(reader: RequestReader, byte_level: Tokenizer):
    words = [byte_level.encode(word, add_special_tokens=False).ids for word in ("one two", "日本")]
    prompt = read(reader, stop_words=[b"x"], stop_words_list=word_list(*words))
    assert prompt.stop_words == ["x", "one two", "日本"]


def test_a_stop_word_of_a_special_token_is_its_name(reader: RequestReader, byte_level: Tokenizer):
    user = byte_level.token_to_id("<|user|>")
    assert read(reader, stop_words_list=word_list([user])).stop_words == ["<|user|>"]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (word_list([1]), [(1,)]),
        (word_list([1, 2], [3]), [(1, 2), (3,)]),
        (word_list([1, 2], [3], n=9), [(1, 2), (3,)]),
        (np.array([[[0, 0], [-1, -1]]], np.int32), []),
        (np.array([[[1, -1], [1, -1]]], np.int32), [(1,)]),
        (np.array([[[1, 2], [1, -1]]], np.int32), [(1,)]),
        (np.zeros((1, 2, 0), np.int32), []),
    ],
    ids=lambda value: str(value.tolist()) if isinstance(value, np.ndarray) else "",
)
def test_nvidias_word_lists_are_read(reader: RequestReader, array: np.ndarray, words: list):
    assert read(reader, bad_words_list=array).generations[0].bad_words == words


@pytest.mark.parametrize("name", ["stop_words_list", "bad_words_list"])
@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.array([[1, 2]], np.int32), r"has shape \[1, 2\]; it must be \[prompts, 2, n\]: ids, then word ends"),
        (np.zeros((1, 3, 2), np.int32), r"has shape \[1, 3, 2\]"),
        (np.zeros((2, 2), np.int32), r"has shape \[2, 2\]"),
        (np.array([[[1, 2], [0, -1]]], np.int32), "says a word ends at 0; ends must rise and be at most 2"),
        (np.array([[[1, 2], [3, -1]]], np.int32), "says a word ends at 3"),
        (np.array([[[1, 2], [2, 1]]], np.int32), "says a word ends at 1"),
        (np.array([[[1, 2], [1, 1]]], np.int32), "says a word ends at 1"),
        (np.array([[[1, 2], [-2, -1]]], np.int32), "says a word ends at -2"),
        (np.array([[[-1, 2], [2, -1]]], np.int32), "holds -1; token ids of this model are 0 to 899"),
        (np.array([[[900, 2], [2, -1]]], np.int32), "holds 900;"),
    ],
    ids=lambda value: str(value.tolist()) if isinstance(value, np.ndarray) else "",
)
def test_a_broken_word_list_is_named(reader: RequestReader, name: str, array: np.ndarray, sentence: str):
    with pytest.raises(RequestError, match=f"{name} {sentence}"):
        reader.read(tensors(**{name: array}))


# ---- the answer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by_default", "asked", "echo"),
    [(True, None, False), (False, None, True), (True, False, True), (False, True, False), (True, True, False)],
)
def test_the_prompt_comes_back_as_asked(byte_level: Tokenizer, by_default: bool, asked: bool | None, echo: bool):
    reader = make_reader(byte_level, exclude_input_in_output=by_default)
    assert read(reader, exclude_input_in_output=asked).echo is echo


@pytest.mark.parametrize(("asked", "keep"), [(None, False), (True, False), (False, True)])
def test_special_tokens_are_kept_as_asked(reader: RequestReader, asked: bool | None, keep: bool):
    assert read(reader, skip_special_tokens=asked).keep_special_tokens is keep


def test_log_probabilities_reach_the_engine(reader: RequestReader):
    assert read(reader, return_log_probs=True).generations[0].log_probs
