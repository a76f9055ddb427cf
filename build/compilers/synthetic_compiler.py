"""Engines of the kind `synthetic`: no model, tokens at a set rate. A tool for benchmarks and stress tests.

What surrounds an engine (Triton, the models of the repository, clients, autoscaling) can be measured with it at speeds
that no engine reaches on the machine at hand, and with times that are known beforehand. The tokenizer is the
checkpoint's own, so the text is text; it has nothing to do with the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from checkpoint import Checkpoint
from errors import UnsupportedError, UsageError
from plan import BuildRequest, EnginePlan

from compilers import CompiledModel, tokenizer_files

# Several scripts, joined characters, digits: whatever a broken stream would break.
TEXT = (
    "The quick brown fox jumps over the lazy dog. 2 + 2 = 4, naïve café, Größe 42 µm. "
    "Быстрая лиса прыгает через ленивую собаку. 日本の首都は東京です。 人工智能的未来。 "
    "नमस्ते दुनिया, مرحبا بالعالم! 🙂 👩‍🚀 🇫🇷\n"
)


def versions() -> dict[str, str]:
    """Of the packages that decide the engine's bytes: those of its tokenizer."""
    return {name: metadata.version(name) for name in ("tokenizers", "transformers")}


def check_request(request: BuildRequest) -> None:
    """Raises UsageError unless the request says how fast, which is also how it says that this is meant."""
    if request.synthetic is None:
        raise UsageError(
            "--engine synthetic generates made-up tokens at a set rate, for benchmarks only; "
            "if that is what you want, say how fast, for instance with --synthetic tokens_per_second=50"
        )
    for option, is_given in (
        ("--tp and --pp", request.tensor_parallel * request.pipeline_parallel > 1),
        ("--gpu", request.gpu is not None),
        ("--quantization", request.quantization != "none"),
        ("--dtype", request.dtype != "auto"),
        ("--kv-cache-dtype", request.kv_cache_dtype != "auto"),
    ):
        if is_given:
            raise UsageError(f"{option} is about weights and GPUs, and a synthetic engine has none; leave it out")


def check(plan: EnginePlan, config: Mapping[str, Any]) -> None:
    """Every architecture will do: only the tokenizer is used."""


def compile(plan: EnginePlan, checkpoint: Checkpoint, folder: Path, kept: Path) -> CompiledModel:
    """Write the tokenizer's files and synthetic.json into the empty `folder`.

    synthetic.json: the rates that were asked for; `token_ids`, the text that is generated over and over; `starts`, the
    positions in it where a text may begin, each at a whole character.
    """
    assert plan.synthetic is not None
    special = tokenizer_files.write(checkpoint, folder, trust_remote_code=plan.trust_remote_code)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    if not token_ids:
        raise UnsupportedError(f"the tokenizer of '{plan.model}' has no token for any ordinary text")
    content = asdict(plan.synthetic) | {"token_ids": token_ids, "starts": _starts(tokenizer, token_ids)}
    (folder / "synthetic.json").write_text(json.dumps(content) + "\n")
    return CompiledModel(
        vocab_size=max(tokenizer.get_vocab_size(), max(token_ids) + 1),
        bos_token_id=special.bos_token_id,
        eos_token_ids=special.eos_token_ids,
        pad_token_id=special.pad_token_id,
        kv_bytes_per_token=0,
    )


def _starts(tokenizer, token_ids: list[int]) -> list[int]:
    """Positions before which the text is whole, so that what follows begins with a whole character."""
    whole = [n for n in range(len(token_ids)) if "\ufffd" not in tokenizer.decode(token_ids[:n])]
    return [n for n in whole if not tokenizer.decode(token_ids[n:]).startswith("\ufffd")]
