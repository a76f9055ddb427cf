"""The bundled demo checkpoint: its files, its tokenizer, its training text and its recorded answers."""

import importlib
import json
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

FOLDER = Path(__file__).parents[2] / "scripts" / "demo_checkpoint"
CHECKPOINT = FOLDER / "demo-gpt2"
PROMPTS = [json.loads(line) for line in (FOLDER / "prompts.jsonl").read_text(encoding="utf-8").split("\n") if line]

UNICODE_TEXTS = (
    "",
    " ",
    "plain text, with  two spaces and a newline\n",
    "naïve café",
    unicodedata.normalize("NFD", "naïve café"),
    "こんにちは 你好 Привет नमस्ते 안녕하세요 مرحبا",
    "👩‍🚀 👨‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 👍🏿 1️⃣",
    "z̷̢̛a̶l̴g̵o̸",
    "\u0000\u007f\u0080\u2028\ufeff\uffff\U0010ffff",
    "<|user|>",
    "<|endoftext",
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")


@pytest.fixture(scope="module")
def fast_tokenizer():
    """What the Triton models use."""
    return tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@pytest.fixture(scope="module")
def auto_tokenizer():
    """What Hugging Face tools use."""
    return transformers.AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, local_files_only=True)
    return model.eval()


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """scripts/demo_checkpoint/corpus.py, imported as its own scripts import it and forgotten afterwards."""
    modules_before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("corpus")
    for name in set(sys.modules) - modules_before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == FOLDER:
            del sys.modules[name]


def is_multibyte(text: str) -> bool:
    return not text.isascii()


def is_plain(prompt: str) -> bool:
    return "<|user|>" not in prompt


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ],
)
def test_every_file_is_there(name):
    assert (CHECKPOINT / name).stat().st_size > 0


def test_the_checkpoint_stays_small():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 6_000_000


def test_the_config_suits_every_split_of_the_model():
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["model_type"] == "gpt2"
    assert config["dtype"] == "float16"
    assert config["n_positions"] == 1024
    assert config["vocab_size"] % 64 == 0
    assert config["n_head"] % 4 == 0  # tensor parallelism of 4
    assert config["n_layer"] % 4 == 0  # pipeline parallelism of 4
    assert config["n_embd"] // config["n_head"] >= 32
    assert config["bos_token_id"] == config["eos_token_id"] == 0


def test_weights_are_float16(model):
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(CHECKPOINT / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118


@pytest.mark.parametrize("text", UNICODE_TEXTS)
def test_any_text_survives_the_tokenizers(fast_tokenizer, auto_tokenizer, text):
    token_ids = fast_tokenizer.encode(text).ids
    assert fast_tokenizer.decode(token_ids, skip_special_tokens=False) == text
    assert auto_tokenizer.encode(text) == token_ids
    assert auto_tokenizer.decode(token_ids) == text


def test_all_token_ids_are_in_the_vocabulary_of_the_model(fast_tokenizer, model):
    assert fast_tokenizer.get_vocab_size() == model.config.vocab_size


@pytest.mark.parametrize("character", ["é", "你", "🐱"])
def test_a_multibyte_character_takes_several_tokens(fast_tokenizer, character):
    assert len(fast_tokenizer.encode(character).ids) == len(character.encode())


def test_special_tokens_are_single_tokens_and_left_out_of_decoded_text(fast_tokenizer):
    token_ids = fast_tokenizer.encode("<|user|>Hi<|assistant|>Hello<|endoftext|>").ids
    assert [token_id for token_id in token_ids if token_id < 4] == [1, 2, 0]
    assert fast_tokenizer.decode(token_ids) == "HiHello"


def test_token_type_ids_are_not_produced(auto_tokenizer):
    assert set(auto_tokenizer("Hello")) == {"input_ids", "attention_mask"}  # GPT-2 would add an embedding for each


def test_chat_template_renders_all_roles(auto_tokenizer):
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": " What is 2 + 3? "},
        {"role": "assistant", "content": "2 + 3 = 5"},
        {"role": "user", "content": "Thanks"},
    ]
    text = auto_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|system|>Answer briefly.<|endoftext|>"
        "<|user|>What is 2 + 3?<|assistant|>2 + 3 = 5<|endoftext|><|user|>Thanks<|assistant|>"
    )


def test_chat_template_closes_a_finished_conversation(auto_tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = auto_tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|user|>Hi<|assistant|>Hello<|endoftext|>"


def test_chat_template_refuses_an_unknown_role(auto_tokenizer):
    with pytest.raises(Exception, match="unknown role tool; use system, user or assistant"):
        auto_tokenizer.apply_chat_template([{"role": "tool", "content": "4"}], tokenize=False)


def test_recorded_prompts_cover_what_other_tests_rely_on():
    lengths = [prompt["num_prompt_tokens"] for prompt in PROMPTS]
    assert len(PROMPTS) >= 120
    assert sum(is_multibyte(prompt["answer"]) for prompt in PROMPTS) >= 25
    assert sum(is_plain(prompt["prompt"]) for prompt in PROMPTS) >= 20
    assert sum(length >= 500 for length in lengths) >= 10
    assert min(lengths) == 1
    assert 850 <= max(lengths) < 1024
    assert len({prompt["prompt"] for prompt in PROMPTS}) == len(PROMPTS)


def test_recorded_lengths_are_token_counts(fast_tokenizer):
    counted = [len(fast_tokenizer.encode(prompt["prompt"]).ids) for prompt in PROMPTS]
    assert counted == [prompt["num_prompt_tokens"] for prompt in PROMPTS]


def test_recorded_prompts_and_answers_fit_into_the_context(fast_tokenizer):
    for prompt in PROMPTS:
        assert prompt["num_prompt_tokens"] + len(fast_tokenizer.encode(prompt["answer"]).ids) < 1024


def test_corpus_is_the_same_at_every_call(corpus):
    assert corpus.exchanges() == corpus.exchanges()
    assert len(corpus.exchanges()) > 7000


def test_corpus_writes_turns_as_the_chat_template_does(corpus, auto_tokenizer):
    turns = [corpus.Exchange("sum", "2 + 3", "2 + 3 = 5"), corpus.Exchange("self", "Thanks", "You are welcome.")]
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "2 + 3"},
        {"role": "assistant", "content": "2 + 3 = 5"},
        {"role": "user", "content": "Thanks"},
    ]
    rendered = auto_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert corpus.conversation(turns, system="Answer briefly.") == rendered


def test_corpus_refuses_two_answers_to_one_prompt(corpus, monkeypatch):
    monkeypatch.setattr(corpus, "COLOURS", (("a lime", "green"), ("a lime", "blue")))
    with pytest.raises(ValueError, match="has two answers"):
        corpus.exchanges()


# One of each kind: the shortest, the longest, multi-byte, long answer, plain.
SAMPLED_PROMPTS = {
    "shortest": min(PROMPTS, key=lambda prompt: prompt["num_prompt_tokens"]),
    "longest": max(PROMPTS, key=lambda prompt: prompt["num_prompt_tokens"]),
    "multi-byte": max(PROMPTS, key=lambda prompt: len(prompt["answer"].encode()) - len(prompt["answer"])),
    "long answer": max(PROMPTS, key=lambda prompt: len(prompt["answer"])),
    "plain": next(prompt for prompt in PROMPTS if prompt["prompt"].startswith("The capital of")),
}


@pytest.mark.parametrize("kind", SAMPLED_PROMPTS)
def test_greedy_answer_is_the_recorded_one(model, auto_tokenizer, kind):
    prompt = SAMPLED_PROMPTS[kind]
    inputs = auto_tokenizer(prompt["prompt"], return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=300)[0]
    answer_ids = output[prompt["num_prompt_tokens"] :]
    assert answer_ids[-1] == auto_tokenizer.eos_token_id
    assert auto_tokenizer.decode(answer_ids, skip_special_tokens=True) == prompt["answer"]
