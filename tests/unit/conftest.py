"""Tiny real tokenizers of the two families: bytes as characters (GPT-2), and U+2581 with byte fallback (Llama)."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import tiny_checkpoints
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# What a tokenizer may have merges for, so that tokens begin and end inside characters.
MANY_SCRIPTS = """
日本語と中文の漢字は、中国語と日本語で使われます。中中中中 日日日日 中日中日
👩‍🚀👨‍👩‍👧‍👦🇫🇷🇯🇵👍🏽❤️ 👩‍🚀👨‍👩‍👧‍👦🇫🇷 😀😁😂😀😁😂😀😀😀
مرحبا بالعالم السلام عليكم مرحبا بالعالم
नमस्ते दुनिया हिन्दी भाषा नमस्ते
cafe\u0301 n\u0303 a\u0308o\u0308 e\u0301e\u0301e\u0301 naïve Größe señor
Привет, мир! Привет, мир! Ελλάδα ελληνικά
"""


@functools.cache
def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|endoftext|>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((MANY_SCRIPTS * 4 + tiny_checkpoints.TEXT).splitlines(), trainer)
    return tokenizer


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return _byte_level()


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Llama 2's: a space before the text, `<s>` before that; what is not in its vocabulary becomes bytes."""
    return _of_recipe("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def metaspace(sentencepiece: Tokenizer) -> Tokenizer:
    """The same with the Metaspace decoder, which some files on the hub have."""
    tokenizer = Tokenizer.from_str(sentencepiece.to_str())
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte fallback without a space before the text."""
    return _of_recipe("gemma", tmp_path_factory.mktemp("gemma"))


def _of_recipe(name: str, folder: Path) -> Tokenizer:
    tiny_checkpoints.RECIPES[name].write_tokenizer(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(params=["byte_level", "sentencepiece", "metaspace", "gemma"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each of them."""
    return request.getfixturevalue(request.param)
