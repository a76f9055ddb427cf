"""Tiny random checkpoints of every architecture we build, saved as the real ones are on the hub.

    path = make("llama", tmp_path)                      # a folder: config, weights, tokenizer files
    path = make("llama", tmp_path, head_dim=12)         # the same with fields of its config changed

The weights are random but always the same: two layers, about 100 000 parameters, wide enough apart that the best two
tokens seldom tie. Sliding windows are short, so that a prompt of a line is longer. The tokenizers are real ones of the
right type, trained on `TEXT`: a script that is not in `TEXT` goes through byte fallback, as rare text does in a real
model.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEXT = """
The quick brown fox jumps over the lazy dog, and the dog doesn't mind. What is it that a server does all day?
It reads a prompt, it counts the tokens, it writes the next token, and then the next one, until somebody says stop.
In the beginning there were 12 tokens; at the end there were 4096. Nobody had asked for more than 100 of them.
"How long will it take?" she asked. "Not long," he said. "The queue is short and the cache is warm."
def greet(name):
    return f"Hello, {name}!"
for index in range(10):
    print(index, greet("world"))
El veloz zorro marrón salta sobre el perro perezoso. ¿Cuánto cuesta? Demasiado, señor.
Der schnelle braune Fuchs springt über den faulen Hund. Größe: 3,50 Meter. Übrigens: schön.
Le renard brun rapide saute par-dessus le chien paresseux. Où est la gare? Là-bas, à côté du café.
The capital of France is Paris. The capital of Spain is Madrid. The capital of Germany is Berlin.
One, two, three, four, five, six, seven, eight, nine, ten. Monday, Tuesday, Wednesday, Thursday, Friday.
"""
VOCABULARY_SIZE = 640
SPLIT = (  # Llama 3's and, but for the digits, Qwen's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WriteTokenizer = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one architecture is made: transformers' config class, the fields that matter, its tokenizer's files."""

    config_class: str
    write_tokenizer: WriteTokenizer
    config: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)  # of generation_config.json, beside the config's token ids
    damp_embedding: bool = False  # for scaled and tied embeddings, which else repeat the last token for ever


def make(name: str, parent: Path, *, dtype: str = "float32", seed: int = 0, **changes: Any) -> Path:
    """Write the checkpoint `name` (a key of `RECIPES`) to `parent/name` and return that folder.

    `dtype` is that of the weights' file; `changes` are fields of the config.
    """
    import torch
    import transformers

    recipe = RECIPES[name]
    folder = parent / name
    folder.mkdir(parents=True)
    config = getattr(transformers, recipe.config_class)(**{**recipe.config, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(name.encode()) + seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
    if recipe.damp_embedding:
        model.get_input_embeddings().weight.data.mul_(0.1)
        model.model.norm.weight.data.fill_(9.0)  # these norms multiply by 1 + weight
    token_ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = transformers.GenerationConfig(**{**token_ids, **recipe.generation})
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    recipe.write_tokenizer(folder)
    return folder


# --- tokenizers


def _byte_level(specials: list[str]) -> Any:
    """GPT-2's kind: every byte is a character of its own, so nothing is unknown. Special tokens come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(), trainer)
    return tokenizer


def _sentencepiece(specials: list[str]) -> Any:
    """Llama's kind: spaces are U+2581, and a character that is not in the vocabulary becomes its UTF-8 bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces = VOCABULARY_SIZE - len(specials) - len(bytes_)
    trained.train_from_iterator(_lines(), trainers.BpeTrainer(vocab_size=pieces, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    names = [*specials, *bytes_, *sorted(learned["vocab"], key=learned["vocab"].__getitem__)]
    model = models.BPE(
        vocab={name: index for index, name in enumerate(names)},
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _lines() -> Iterator[str]:
    yield from TEXT.splitlines()


def _write_gpt2(folder: Path) -> None:
    """As openai-community/gpt2: the tokenizer's class, not the files, knows the special token."""
    tokenizer = _byte_level(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    _write_json(folder / "tokenizer_config.json", {"model_max_length": 256})


def _write_opt(folder: Path) -> None:
    """As facebook/opt-125m: only the files of the slow tokenizer, and `</s>` goes before every prompt."""
    tokenizer = _byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.model.save(str(folder))
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    end = {"__type": "AddedToken", "content": "</s>", **flags}
    settings = {
        "errors": "replace",
        "unk_token": end,
        "bos_token": end,
        "eos_token": end,
        "pad_token": "<pad>",
        "add_prefix_space": False,
        "add_bos_token": True,
        "tokenizer_class": "GPT2Tokenizer",
    }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>"))


def _write_llama(folder: Path) -> None:
    """As Llama 2: a space goes before the text, and `<s>` before that."""
    tokenizer = _sentencepiece(["<unk>", "<s>", "</s>"])
    _put_space_first(tokenizer)
    _put_before(tokenizer, "<s>")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_mistral(folder: Path) -> None:
    """As Mistral 7B v0.1: Llama's, with a chat template in tokenizer_config.json."""
    _write_llama(folder)
    _change_json(folder / "tokenizer_config.json", legacy=True, chat_template="{{ bos_token }}" + CHAT_TEMPLATE)


def _write_phi3(folder: Path) -> None:
    """As Phi-3 mini: Llama's without `<s>`, with markers that swallow the white space after them."""
    from tokenizers import AddedToken, processors

    tokenizer = _sentencepiece(["<unk>", "<s>", "</s>"])
    _put_space_first(tokenizer)
    markers = ["<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>"]
    tokenizer.add_special_tokens([AddedToken(marker, rstrip=True, special=True) for marker in markers])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "legacy": False,
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_gemma(folder: Path) -> None:
    """As Gemma: no space before the text, `<bos>` before it, and runs of spaces are kept."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    tokenizer = _sentencepiece(["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    _put_before(tokenizer, "<bos>")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + CHAT_TEMPLATE)


def _write_qwen(folder: Path) -> None:
    """As Qwen2 and Qwen3: bytes with a split of their own, NFC, no begin token, and a chat template."""
    from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

    tokenizer = _byte_level([])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    markers = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(marker, special=True, normalized=False) for marker in markers])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_llama3(folder: Path) -> None:
    """As Llama 3: bytes, no tokenizer class of its own, and the begin token comes from the file alone."""
    from tokenizers import Regex, pre_tokenizers, processors

    tokenizer = _byte_level([])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B", special_tokens=[("<|begin_of_text|>", begin)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": True,
        "chat_template": "{{ bos_token }}" + CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _put_space_first(tokenizer: Any) -> None:
    from tokenizers import decoders, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


def _put_before(tokenizer: Any, begin: str) -> None:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin} $B",
        special_tokens=[(begin, tokenizer.token_to_id(begin))],
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _change_json(path: Path, **changes: Any) -> None:
    _write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


# --- models

_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
_QWEN = {**_LLAMA_LIKE, "bos_token_id": None, "eos_token_id": 642, "pad_token_id": 640, "vocab_size": 656}
_QWEN_GENERATION = {"eos_token_id": [642, 640], "do_sample": True, "top_k": 20, "top_p": 0.8}
_GEMMA_IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
_GEMMA = {**_LLAMA_LIKE, **_GEMMA_IDS, "head_dim": 16, "tie_word_embeddings": True}

RECIPES: dict[str, Recipe] = {
    "gpt2": Recipe(
        config_class="GPT2Config",
        write_tokenizer=_write_gpt2,
        config={
            **{"vocab_size": VOCABULARY_SIZE, "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4},
            **{"initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0},
        },
    ),
    "opt": Recipe(
        config_class="OPTConfig",
        write_tokenizer=_write_opt,
        config={
            **{"vocab_size": VOCABULARY_SIZE, "hidden_size": 64, "ffn_dim": 96, "word_embed_proj_dim": 64},
            **{"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256, "init_std": 0.2},
            **{"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1},
        },
    ),
    "llama": Recipe(
        config_class="LlamaConfig",
        write_tokenizer=_write_llama,
        config={**_LLAMA_LIKE, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "llama3": Recipe(
        config_class="LlamaConfig",
        write_tokenizer=_write_llama3,
        config={**_LLAMA_LIKE, "vocab_size": 656, "bos_token_id": 640, "eos_token_id": [641, 642], "rope_theta": 5e5},
    ),
    "mistral": Recipe(
        config_class="MistralConfig",
        write_tokenizer=_write_mistral,
        config={**_LLAMA_LIKE, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 16},
    ),
    "qwen2": Recipe(
        config_class="Qwen2Config",
        write_tokenizer=_write_qwen,
        config=_QWEN,
        generation={**_QWEN_GENERATION, "repetition_penalty": 1.05},
    ),
    "qwen3": Recipe(
        config_class="Qwen3Config",
        write_tokenizer=_write_qwen,
        config={**_QWEN, "head_dim": 16},
        generation=_QWEN_GENERATION,
    ),
    "gemma": Recipe(config_class="GemmaConfig", write_tokenizer=_write_gemma, config=_GEMMA, damp_embedding=True),
    "gemma2": Recipe(
        config_class="Gemma2Config",
        write_tokenizer=_write_gemma,
        config={**_GEMMA, "sliding_window": 16, "query_pre_attn_scalar": 16},
        damp_embedding=True,
    ),
    "gemma3": Recipe(
        config_class="Gemma3TextConfig",
        write_tokenizer=_write_gemma,
        config={
            **{**_GEMMA, "sliding_window": 16, "query_pre_attn_scalar": 16},
            "layer_types": ["sliding_attention", "full_attention"],  # each with a rotary base of its own
        },
        damp_embedding=True,
    ),
    "phi3": Recipe(
        config_class="Phi3Config",
        write_tokenizer=_write_phi3,
        config={**_LLAMA_LIKE, "vocab_size": 656, "bos_token_id": 1, "eos_token_id": 640, "pad_token_id": 640},
    ),
}
