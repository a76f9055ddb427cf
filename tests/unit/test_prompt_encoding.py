"""Prompts become the token ids that transformers makes of them, or one sentence that says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import prompt_encoding
import pytest
import tiny_checkpoints
from google.protobuf import text_format
from prompt_encoding import (
    CLIENT_INPUTS,
    PromptEncoder,
    PromptError,
    decode_utf8,
    word_list_array,
)
from prompt_tensors import encode_prompts
from transformers import AutoTokenizer
from tritonclient.grpc.model_config_pb2 import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
MODELS = {  # recipe -> model type
    "gpt2": "gpt2",
    "llama": "llama",
    "llama3": "llama",
    "mistral": "mistral",
    "gemma": "gemma",
    "qwen2": "qwen2",
    "phi3": "llama",
}
TEXTS = [
    "Hello world",
    " leading and trailing ",
    "  two  spaces\n\nand\tlines\r\n",
    "don't 3.14 x=[1,2]; // ok?",
    "日本語 مرحبا नमस्ते e\u0301",
    "👩‍🚀🇫🇷",
    "\u00a0\u200b\ufeff\x00",
    "say <|im_end|> or </s>, <|eot_id|> or <|endoftext|> here",
]

Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tokenizer files as they are on the hub."""
    parent = tmp_path_factory.mktemp("checkpoints")

    def make(name: str) -> Path:
        folder = parent / name
        if not folder.exists():
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps({"model_type": MODELS[name]}))
            tiny_checkpoints.RECIPES[name].write_tokenizer(folder)
        return folder

    return make


@pytest.fixture
def engine(checkpoints: Callable[[str], Path], tmp_path: Path) -> Folder:
    """Makes an engine folder: `engine("llama", chat_template="...", max_input_len=5)`."""

    def make(name: str, chat_template: str | None = None, max_input_len: int = 1000, max_seq_len: int = 1020) -> Path:
        transformers = AutoTokenizer.from_pretrained(checkpoints(name))
        transformers.chat_template = chat_template or transformers.chat_template
        transformers.save_pretrained(tmp_path)
        manifest = {
            "bos_token_id": transformers.bos_token_id,
            "limits": {"max_input_len": max_input_len, "max_seq_len": max_seq_len},
        }
        (tmp_path / "engine.json").write_text(json.dumps(manifest))
        return tmp_path

    return make


def load(folder: Path) -> PromptEncoder:
    return PromptEncoder.load(folder, default_max_tokens=16)


# ---- ids ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_transformers(engine: Folder, name: str):
    folder = engine(name)
    encoder, transformers = load(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert encoder.encode(text) == transformers(text).input_ids, text


def test_padding_and_truncation_of_the_file_are_off(engine: Folder):
    folder = engine("gpt2")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len(load(folder).encode("one two three four")) > 2


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama3"])
def test_an_empty_prompt_is_the_token_that_begins_a_text(engine: Folder, name: str):
    encoder = load(engine(name))
    assert encoder.encode("") == [encoder.bos_token_id]


def test_an_empty_prompt_without_such_a_token_is_refused(engine: Folder):
    with pytest.raises(PromptError, match="text_input is empty and this model has no token to begin with"):
        load(engine("qwen2")).encode("")


@pytest.mark.parametrize(("name", "begin"), [("llama", "<s>"), ("llama3", "<|begin_of_text|>"), ("gemma", "<bos>")])
def test_a_begin_token_in_the_text_is_not_doubled(engine: Folder, name: str, begin: str):
    folder = engine(name)
    ids = load(folder).encode(f"{begin}Hello")
    assert ids == AutoTokenizer.from_pretrained(folder)(f"{begin}Hello", add_special_tokens=False).input_ids
    assert ids.count(ids[0]) == 1


def test_begin_tokens_that_only_the_client_wrote_are_kept(engine: Folder):
    folder = engine("gpt2")
    text = "<|endoftext|><|endoftext|>Hello"
    assert load(folder).encode(text) == AutoTokenizer.from_pretrained(folder)(text).input_ids


# ---- limits ------------------------------------------------------------------------------------------------------


def test_a_prompt_at_the_limit_is_taken_and_one_over_it_refused_with_both_numbers(engine: Folder):
    encoder = load(engine("gpt2", max_input_len=5))
    assert len(encoder.encode("\x01" * 5)) == 5
    with pytest.raises(PromptError, match=r"text_input has 6 tokens; this engine takes at most 5 .*max-input-len"):
        encoder.encode("\x01" * 6)


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens"), [(1, 16), (1004, 16), (1005, 15), (1019, 1), (1020, 1), (1021, 1)]
)
def test_a_request_that_does_not_say_gets_the_default_or_what_is_left(
    engine: Folder, prompt_tokens: int, max_tokens: int
):
    assert load(engine("gpt2")).max_tokens_by_default([1] * prompt_tokens) == max_tokens


@pytest.mark.parametrize(
    ("value", "text"), [(b"", ""), ("日本".encode(), "日本"), (b"\x00", "\x00"), ("\ufffd".encode(), "\ufffd")]
)
def test_utf8_is_text(value: bytes, text: str):
    assert decode_utf8(value, "text_input") == text


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (b"a\xff", "text_input is not UTF-8: byte 1 is 0xff"),
        (b"\xe4\xb8", "text_input is not UTF-8: byte 0 is 0xe4"),
        (b"abc\xed\xa0\x80", "text_input is not UTF-8: byte 3 is 0xed"),
    ],
)
def test_what_is_not_utf8_is_refused_with_its_place(value: bytes, sentence: str):
    with pytest.raises(PromptError, match=sentence):
        decode_utf8(value, "text_input")


# ---- chat templates ----------------------------------------------------------------------------------------------

TEMPLATES = {
    "chatml": tiny_checkpoints.CHAT_TEMPLATE,
    "mistral": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral with tools": (
        "{%- if tools is not none %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) }}{%- endif %}"
        "{%- if documents is not none %}{{- 'DOCUMENTS' }}{%- endif %}"
        "{{- bos_token }}{%- for message in messages %}{{- '[INST]' + message.content + '[/INST]' }}{%- endfor %}"
    ),
    "llama 3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        " + message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "zephyr, on several lines": (
        "{% for message in messages %}\n    {% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\n' + message['content'] + eos_token }}\n    {% endif %}\n"
        "    {% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n    {% endif %}\n{% endfor %}\n"
    ),
    "loop controls": (
        "{% for message in messages %}{% if message.role != 'user' %}{% continue %}{% endif %}"
        "{{ message.content }}{% break %}{% endfor %}{{ eos_token }}"
    ),
    "namespace": (
        "{% set ns = namespace(seen=false) %}{% for m in messages %}{% set ns.seen = true %}{{ m.content }}{% endfor %}"
        "{{ ns.seen }}"
    ),
    "marked for training": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}!{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ {'ü': '<'} | tojson(ensure_ascii=True) }}",
    "today": "{{ strftime_now('%Y') }} {{ messages[0]['content'] }}",
    "tokens that there may not be": (
        "{{ pad_token }}{{ unk_token }}{% if cls_token is defined %}cls{% endif %}{{ messages[0].content }}"
    ),
    "a macro": "{% macro say(text) %}{{ bos_token }}{{ text }}{% endmacro %}{{ say(messages[0].content) }}",
    "without a begin token": "### {{ messages[0]['content'] }}\n### ",
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_chat_has_the_ids_of_transformers(engine: Folder, name: str, template: str):
    folder = engine(name, chat_template=template)
    encoder, transformers = load(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("Hello, world!", "  <b>\n\"quoted\" & 'é' 日本 {{ x }} </b>  "):
        messages = [{"role": "user", "content": text}]
        try:
            expected = transformers.apply_chat_template(messages, add_generation_prompt=True)
        except jinja2.UndefinedError as error:  # the template joins a token that this tokenizer has not
            with pytest.raises(PromptError, match=str(error)):
                encoder.encode(text, as_chat=True)
        else:
            assert encoder.encode(text, as_chat=True) == expected


def test_a_template_that_refuses_says_why(engine: Folder):
    encoder = load(engine("gpt2", chat_template="{{ raise_exception('Only odd numbers, please!') }}"))
    with pytest.raises(PromptError, match="the model's chat template refuses this prompt: Only odd numbers, please!"):
        encoder.encode("Hello", as_chat=True)


def test_a_template_cannot_reach_python(engine: Folder):
    encoder = load(engine("gpt2", chat_template="{{ messages.__class__.__mro__ }}"))
    with pytest.raises(PromptError, match="refuses this prompt: access to attribute '__class__'"):
        encoder.encode("Hello", as_chat=True)


def test_a_model_without_a_template_says_so(engine: Folder):
    with pytest.raises(PromptError, match="this model's tokenizer has no chat template; leave it out"):
        load(engine("gpt2")).encode("Hello", as_chat=True)


def test_the_limit_counts_the_template(engine: Folder):
    encoder = load(engine("gpt2", chat_template="\x01\x01{{ messages[0].content }}", max_input_len=5))
    assert len(encoder.encode("\x01" * 3, as_chat=True)) == 5
    with pytest.raises(PromptError, match="has 6 tokens"):
        encoder.encode("\x01" * 4, as_chat=True)


# ---- words -------------------------------------------------------------------------------------------------------


def test_a_word_is_encoded_alone_and_after_a_space(engine: Folder):
    encoder = load(engine("gpt2"))
    alone, after_a_space = (encoder.tokenizer.encode(text).ids for text in ("dog", " dog"))
    assert encoder.encode_words(["dog"]) == [alone, after_a_space]


def test_the_same_ids_are_not_listed_twice(engine: Folder):
    encoder = load(engine("gpt2"))
    words = encoder.encode_words(["dog", "dog", " dog"])
    assert len(words) == len({tuple(word) for word in words}) == 3  # "dog", " dog" and "  dog"


@pytest.mark.parametrize("words", [[], [""], ["", ""]])
def test_no_words_have_no_ids(engine: Folder, words: list[str]):
    assert load(engine("gpt2")).encode_words(words) == []


def test_words_get_no_begin_token(engine: Folder):
    encoder = load(engine("llama"))
    assert all(encoder.bos_token_id not in word for word in encoder.encode_words(["dog"]))


@pytest.mark.parametrize(
    ("words", "array"),
    [
        ([], [[], []]),
        ([[5]], [[5], [1]]),
        ([[5, 6], [7]], [[5, 6, 7], [2, 3, -1]]),
        ([[5], [6], [7]], [[5, 6, 7], [1, 2, 3]]),
    ],
)
def test_words_take_nvidias_form(words: list[list[int]], array: list[list[int]]):
    result = word_list_array(words)
    assert result.dtype == np.int32
    assert result.tolist() == array


# ---- a request's tensors -----------------------------------------------------------------------------------------


def strings(*rows: list[str]) -> np.ndarray:
    return np.array([[text.encode() for text in row] for row in rows], np.object_)


def test_prompts_are_padded_to_the_longest(engine: Folder):
    encoder = load(engine("gpt2"))
    short, long = encoder.encode("dog"), encoder.encode("The quick brown fox")
    arrays = encode_prompts(encoder, {"text_input": strings(["dog"], ["The quick brown fox"])})
    assert arrays["input_ids"].tolist() == [short + [0] * (len(long) - len(short)), long]
    assert arrays["input_lengths"].tolist() == [[len(short)], [len(long)]]
    assert arrays["request_output_len"].tolist() == [[16], [16]]


def test_what_the_client_says_of_the_length_is_left_to_the_engine(engine: Folder):
    tensors = {"text_input": strings(["dog"]), "max_tokens": np.array([[-5]], np.int32)}
    assert encode_prompts(load(engine("gpt2")), tensors)["request_output_len"].tolist() == [[-5]]


@pytest.mark.parametrize("empty", [strings([""]), np.zeros((1, 0), np.object_)], ids=["a string", "no value"])
def test_an_empty_text_is_an_empty_prompt(engine: Folder, empty: np.ndarray):
    encoder = load(engine("gpt2"))
    assert encode_prompts(encoder, {"text_input": empty})["input_ids"].tolist() == [[encoder.bos_token_id]]


def test_without_words_there_are_none(engine: Folder):
    arrays = encode_prompts(load(engine("gpt2")), {"text_input": strings(["a"], ["b"])})
    assert arrays["stop_words"].tolist() == [[b""], [b""]]
    assert arrays["bad_words_list"].shape == (2, 2, 0)


def test_every_prompt_has_its_words(engine: Folder):
    encoder = load(engine("gpt2"))
    words = strings(["dog", ""], ["日本", "b"])
    arrays = encode_prompts(encoder, {"text_input": strings(["a"], ["b"]), "stop_words": words, "bad_words": words})
    assert arrays["stop_words"].tolist() == words.tolist()
    for row, texts in zip(arrays["bad_words_list"], (["dog"], ["日本", "b"]), strict=True):
        ids, ends = row.tolist()
        expected = encoder.encode_words(texts)
        starts = [0, *ends][: len(expected)]
        assert [ids[start:end] for start, end in zip(starts, ends, strict=False)] == expected
        assert set(ends[len(expected) :]) <= {-1}


def test_each_prompt_is_a_chat_or_not(engine: Folder):
    encoder = load(engine("gpt2", chat_template="<{{ messages[0].content }}>"))
    tensors = {"text_input": strings(["dog"], ["dog"]), "apply_chat_template": np.array([[True], [False]])}
    ids, lengths = (encode_prompts(encoder, tensors)[name].tolist() for name in ("input_ids", "input_lengths"))
    assert ids[0][: lengths[0][0]] == encoder.tokenizer.encode("<dog>").ids
    assert ids[1][: lengths[1][0]] == encoder.tokenizer.encode("dog").ids


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({}, "text_input is missing; send the prompt as text"),
        ({"text_input": np.array([[b"\xff"]], np.object_)}, "text_input is not UTF-8: byte 0 is 0xff"),
        ({"text_input": strings(["a"]), "stop_words": np.array([[b"\xff"]], np.object_)}, "stop_words is not UTF-8"),
        ({"text_input": strings(["a"]), "bad_words": np.array([[b"a", b"\xe4"]], np.object_)}, "bad_words is not"),
    ],
    ids=["nothing", "text_input", "stop_words", "bad_words"],
)
def test_a_tensor_that_is_missing_or_broken_is_named(engine: Folder, tensors: dict, sentence: str):
    with pytest.raises(PromptError, match=sentence):
        encode_prompts(load(engine("gpt2")), tensors)


# ---- parameters --------------------------------------------------------------------------------------------------


def test_the_clients_inputs_are_those_of_the_ensemble():
    config = text_format.Parse((ROOT / "model_repo/ensemble/config.pbtxt").read_text(), ModelConfig())
    assert [tensor.name for tensor in config.input] == list(CLIENT_INPUTS)


def test_nothing_but_the_engines_own_files_is_read(engine: Folder, monkeypatch: pytest.MonkeyPatch):
    """An engine without tokenizer_config.json has a template without special tokens."""
    folder = engine("gpt2", chat_template="[{{ bos_token }}]{{ messages[0].content }}")
    (folder / "tokenizer_config.json").unlink()
    opened: list[Any] = []
    original = prompt_encoding.Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *args: opened.append(path.parent) or original(path, *args))
    encoder = load(folder)
    assert set(opened) == {folder}
    assert encoder.encode("x", as_chat=True) == encoder.tokenizer.encode("[]x").ids
