"""What clients get: the same right text, whichever way they ask."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from running_server import Server, ServerError, text_of
from tokenizers import Tokenizer

QUESTION = {"text_input": "What is the capital of France?", "apply_chat_template": True, "max_tokens": 60}
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="session")
def tokenizer(repository) -> Tokenizer:
    return Tokenizer.from_file(str(repository / "tensorrt_llm/1/engine/tokenizer.json"))


def joined(responses) -> str:
    return "".join(text for response in responses for text in text_of(response))


def test_infer_over_http_answers(server: Server):
    assert text_of(server.infer_http(**QUESTION)) == [ANSWER]


def test_infer_over_grpc_answers(server: Server):
    assert text_of(server.infer_grpc(**QUESTION)) == [ANSWER]


@pytest.mark.parametrize("model", ["ensemble", "demo-gpt2", "demo-gpt2_infer"])
def test_generate_answers_under_every_name(server: Server, model: str):
    assert server.generate(model, **QUESTION)["text_output"] == ANSWER


@pytest.mark.parametrize("model", ["ensemble", "demo-gpt2"])
def test_generate_stream_answers_in_pieces(server: Server, model: str):
    pieces = [event["text_output"] for event in server.generate_stream(model, **QUESTION, stream=True)]
    assert "".join(pieces) == ANSWER
    assert len(pieces) > 1


def test_grpc_streaming_answers_in_pieces(server: Server):
    responses = list(server.stream_grpc(**QUESTION, stream=True))
    assert joined(responses) == ANSWER
    assert len(responses) > 1


def test_a_streaming_request_without_stream_gets_one_response(server: Server):
    assert [text_of(response) for response in server.stream_grpc(**QUESTION)] == [[ANSWER]]


def test_a_request_with_only_text_input_answers(server: Server):
    assert server.generate(text_input="The capital of France is")["text_output"].startswith(" Paris")


def test_nvidias_documented_request_answers(server: Server):
    body = {"text_input": "The capital of France is", "max_tokens": 20, "bad_words": "", "stop_words": ""}
    assert server.generate("ensemble", **body)["text_output"].startswith(" Paris")


def test_a_request_with_several_prompts_answers_each(server: Server):
    prompts = ["The capital of France is", "The capital of Japan is", "The capital of Italy is"]
    result = server.infer_http(text_input=prompts, max_tokens=[20, 20, 20])
    assert result["text_output"].shape == (3, 1)
    for text, capital in zip(text_of(result), ("Paris", "Tokyo", "Rome"), strict=True):
        assert text.startswith(f" {capital}")


def test_several_prompts_in_a_stream_are_told_apart_by_batch_index(server: Server):
    prompts = ["The capital of France is", "The capital of Japan is"]
    texts = {0: "", 1: ""}
    for response in server.stream_grpc(text_input=prompts, max_tokens=[20, 20], stream=[True, True]):
        texts[int(response["batch_index"].item())] += text_of(response)[0]
    assert texts[0].startswith(" Paris")
    assert texts[1].startswith(" Tokyo")


def test_greedy_text_equals_transformers_for_all_examples_sent_at_once(server: Server, examples: list[dict]):
    assert len(examples) >= 100

    def ask(example: dict) -> str:
        return text_of(server.infer_grpc(text_input=example["prompt"], max_tokens=_enough(example)))[0]

    with ThreadPoolExecutor(len(examples)) as pool:
        answers = list(pool.map(ask, examples))
    wrong = [(e["prompt"][-80:], a, e["answer"]) for e, a in zip(examples, answers, strict=True) if a != e["answer"]]
    assert not wrong


def test_streamed_text_equals_transformers_for_all_examples_sent_at_once(server: Server, examples: list[dict]):
    def ask(example: dict) -> str:
        return joined(server.stream_grpc(text_input=example["prompt"], max_tokens=_enough(example), stream=True))

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, examples))
    assert answers == [example["answer"] for example in examples]


def _enough(example: dict) -> int:
    return min(1024 - example["num_prompt_tokens"], 400)


def test_multi_byte_characters_survive_streaming(server: Server, examples: list[dict]):
    many = [e for e in examples if len(e["answer"].encode()) > len(e["answer"])]
    assert len(many) >= 20
    for example in many[:20]:
        pieces = [
            event["text_output"]
            for event in server.generate_stream(text_input=example["prompt"], max_tokens=_enough(example), stream=True)
        ]
        assert "".join(pieces) == example["answer"]
        assert not any("\ufffd" in piece for piece in pieces)


def test_counts_and_finish_reason_say_what_happened(server: Server):
    result = server.infer_http(**QUESTION)
    assert result["finish_reason"].item() == b"stop"
    assert result["num_output_tokens"].item() == result["sequence_length"].item() > 0
    assert server.infer_http(**QUESTION | {"max_tokens": 2})["finish_reason"].item() == b"length"


def test_a_streams_token_counts_add_up(server: Server):
    responses = list(server.stream_grpc(**QUESTION, stream=True))
    whole = server.infer_http(**QUESTION)
    assert sum(int(r["num_output_tokens"].item()) for r in responses) == whole["num_output_tokens"].item()
    assert {int(r["num_input_tokens"].item()) for r in responses} == {whole["num_input_tokens"].item()}
    reasons = [r["finish_reason"].item() for r in responses]
    assert reasons == [b""] * (len(reasons) - 1) + [b"stop"]


def test_max_tokens_is_the_number_of_tokens(server: Server):
    result = server.infer_http(text_input="Count", max_tokens=7, end_id=-1)
    assert result["num_output_tokens"].item() == 7


def test_the_prompt_comes_back_only_on_request(server: Server):
    prompt = "The capital of France is"
    answer = server.generate(text_input=prompt, max_tokens=8)["text_output"]
    echoed = server.generate(text_input=prompt, max_tokens=8, exclude_input_in_output=False)["text_output"]
    assert echoed == prompt + answer


def test_a_streamed_prompt_comes_back_once(server: Server):
    body = {"text_input": "The capital of France is", "max_tokens": 8, "exclude_input_in_output": False}
    pieces = [event["text_output"] for event in server.generate_stream(**body, stream=True)]
    assert "".join(pieces) == server.generate(**body)["text_output"]


# ---- stop words --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["Paris", "is", "ris", " of Fra", "The", "."])
def test_text_ends_before_a_stop_word(server: Server, stop: str):
    expected = ANSWER[: ANSWER.index(stop)]
    assert server.generate(**QUESTION, stop_words=[stop])["text_output"] == expected
    streamed = server.generate_stream(**QUESTION, stop_words=[stop], stream=True)
    assert "".join(event["text_output"] for event in streamed) == expected
    assert streamed[-1]["finish_reason"] == "stop"


def test_the_first_of_several_stop_words_counts(server: Server):
    assert server.generate(**QUESTION, stop_words=["Paris", "France", "nowhere"])["text_output"] == "The capital of "


def test_a_stop_word_that_does_not_come_changes_nothing(server: Server):
    assert server.generate(**QUESTION, stop_words=["Parisian", "zzz"])["text_output"] == ANSWER


def test_a_multi_byte_stop_word_cuts_at_its_character(server: Server, examples: list[dict]):
    example = next(e for e in examples if any(ord(c) > 0x2FFF for c in e["answer"]) and len(e["answer"]) > 3)
    stop = next(c for c in example["answer"] if ord(c) > 0x2FFF)
    body = {"text_input": example["prompt"], "max_tokens": _enough(example), "stop_words": [stop]}
    expected = example["answer"][: example["answer"].index(stop)]
    assert server.generate(**body)["text_output"] == expected
    assert "".join(e["text_output"] for e in server.generate_stream(**body, stream=True)) == expected


# ---- prompts -----------------------------------------------------------------------------------------------------


def test_a_prompt_that_ends_inside_a_word_continues_it(server: Server, tokenizer: Tokenizer):
    answer = server.generate(text_input="The capital of France is Par", max_tokens=4)["text_output"]
    assert answer and not answer.startswith(" ")


def test_an_empty_prompt_answers(server: Server):
    assert server.generate(text_input="", max_tokens=4)["num_input_tokens"] == 1


def _prompt_of(tokenizer: Tokenizer, tokens: int) -> str:
    prompt = " a" * tokens
    while len(tokenizer.encode(prompt).ids) > tokens:
        prompt = prompt[:-2]
    while len(tokenizer.encode(prompt).ids) < tokens:
        prompt += "\x01"
    assert len(tokenizer.encode(prompt).ids) == tokens
    return prompt


def test_a_prompt_at_the_limit_answers(server: Server, tokenizer: Tokenizer):
    result = server.infer_http(text_input=_prompt_of(tokenizer, 1023))
    assert result["num_input_tokens"].item() == 1023
    assert result["num_output_tokens"].item() <= 1


def test_a_prompt_over_the_limit_is_refused_with_both_numbers(server: Server, tokenizer: Tokenizer):
    with pytest.raises(ServerError, match="1024 tokens; this engine takes at most 1023"):
        server.generate(text_input=_prompt_of(tokenizer, 1024))


def test_the_chat_template_is_that_of_the_checkpoint(server: Server, examples: list[dict]):
    single = re.compile(r"<\|user\|>([^<]*)<\|assistant\|>")
    questions = {match[1]: e["answer"] for e in examples if (match := single.fullmatch(e["prompt"]))}
    for question, answer in list(questions.items())[:10]:
        body = {"text_input": question, "apply_chat_template": True, "max_tokens": 400}
        assert server.generate(**body)["text_output"] == answer


# ---- sampling ----------------------------------------------------------------------------------------------------

SAMPLED = {"text_input": "Tell me", "max_tokens": 24, "temperature": 1.5, "end_id": -1}


def test_a_seed_repeats_its_text_whoever_else_is_served(server: Server):
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda _: server.generate(**SAMPLED, seed=7)["text_output"], range(8)))
    assert len(set(texts)) == 1


def test_different_seeds_give_different_text(server: Server):
    assert len({server.generate(**SAMPLED, seed=seed)["text_output"] for seed in range(6)}) >= 5


def test_the_older_name_of_seed_does_the_same(server: Server):
    new, old = server.generate(**SAMPLED, seed=3), server.generate(**SAMPLED, random_seed=3)
    assert new["text_output"] == old["text_output"]


def test_without_a_seed_sampled_texts_differ(server: Server):
    assert len({server.generate(**SAMPLED)["text_output"] for _ in range(12)}) >= 6  # of 300 texts 258 differed


@pytest.mark.parametrize(
    "greedy", [{"top_k": 1}, {"temperature": 0.0}, {"top_p": 0.0}, {"temperature": 2.0, "top_k": 1}]
)
def test_values_that_mean_greedy_are_greedy(server: Server, greedy: dict):
    assert server.generate(**QUESTION, **greedy)["text_output"] == ANSWER


def test_several_sequences_of_one_prompt_differ(server: Server):
    result = server.infer_http(**SAMPLED, num_return_sequences=3)
    assert result["text_output"].shape == (1, 3)
    assert len(set(text_of(result))) == 3


def test_several_sequences_stream_side_by_side(server: Server):
    whole = text_of(server.infer_http(**SAMPLED, num_return_sequences=3, seed=5))
    texts = ["", "", ""]
    for response in server.stream_grpc(**SAMPLED, num_return_sequences=3, seed=5, stream=True):
        texts[int(response["sequence_index"].item())] += text_of(response)[0]
    assert texts == whole


def test_beams_come_best_first(server: Server):
    server.needs("beam_search")
    result = server.infer_http(**QUESTION, beam_width=3, return_log_probs=True)
    scores = result["cum_log_probs"].ravel() / result["sequence_length"].ravel()
    assert text_of(result)[0] == ANSWER
    assert list(scores) == sorted(scores, reverse=True)


def test_log_probabilities_belong_to_the_tokens(server: Server):
    server.needs("log_probs")
    result = server.infer_http(**QUESTION, return_log_probs=True)
    log_probs = result["output_log_probs"].ravel()
    assert log_probs.shape == (result["num_output_tokens"].item(),)
    assert np.all(log_probs <= 0)
    assert result["cum_log_probs"].item() == pytest.approx(log_probs.sum(), rel=1e-4)


def test_min_tokens_delays_the_end(server: Server):
    short = server.infer_http(**QUESTION)["num_output_tokens"].item()
    assert server.infer_http(**QUESTION, min_tokens=short + 3)["num_output_tokens"].item() >= short + 3
    assert server.infer_http(**QUESTION, min_length=short + 3)["num_output_tokens"].item() >= short + 3


# ---- tensorrt_llm by itself --------------------------------------------------------------------------------------


def test_token_ids_in_give_token_ids_out(server: Server, tokenizer: Tokenizer):
    ids = tokenizer.encode("The capital of France is").ids
    responses = server.stream_grpc(
        "tensorrt_llm",
        input_ids=np.array([ids], np.int32),
        input_lengths=len(ids),
        request_output_len=8,
    )
    output = next(iter(responses))
    assert tokenizer.decode(output["output_ids"].ravel().tolist()).startswith(" Paris")
