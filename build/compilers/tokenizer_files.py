"""The tokenizer's files of an engine, for a server that has `tokenizers` and not transformers.

    tokenizer.json          exactly what transformers uses, also where the checkpoint has only older files
    tokenizer_config.json   as transformers saves it
    special_tokens.json     {"bos": {"token": "<s>", "id": 1} or null, "eos": [...], "pad": ...}
    chat_template.jinja     if the checkpoint has one
    generation_config.json  the checkpoint's, with every end token in eos_token_id

What is not covered: of several chat templates only the one named "default" is kept.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint import Checkpoint
from errors import CheckpointError, UnsupportedError

log = logging.getLogger(__name__)

# Whatever a tokenizer may treat in a way of its own: white space, case, accents, scripts, joined emoji, control
# characters. The file must give the ids that transformers gives.
PROBES = (
    "",
    " ",
    "Hello world",
    " leading and trailing ",
    "two  spaces\n\nand\tmore\r\n",
    "don't  STOP 3.14159 x=[1,2]; // ok?",
    "naïve café Ünïcödé e\u0301",
    "日本語と中文, русский текст, नमस्ते, مرحبا",
    "🙂 👩‍🚀 🇫🇷",
    "\u0000\u00a0\u200b\ufeff",
)


TOKENIZER_PATTERNS = ("tokenizer*", "*.model", "*.tiktoken", "vocab*")


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # those of the generation config first, then the tokenizer's own
    pad_token_id: int | None


def write(checkpoint: Checkpoint, folder: Path, *, trust_remote_code: bool) -> SpecialTokens:
    """Write the files above into `folder`.

    Raises CheckpointError if there is no tokenizer, UnsupportedError if `tokenizers` cannot do what transformers does.
    """
    tokenizer = _load(checkpoint, trust_remote_code=trust_remote_code)
    _save(tokenizer, folder)
    _check_same_ids(tokenizer, folder / "tokenizer.json", checkpoint)
    generation = _generation_config(checkpoint)
    special = _special_tokens(tokenizer, generation)
    if special.eos_token_ids:
        generation["eos_token_id"] = list(special.eos_token_ids)
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "special_tokens.json", _by_name(tokenizer, special))
    template = tokenizer.chat_template
    if isinstance(template, dict):
        log.info("of the chat templates %s, only 'default' is kept", ", ".join(sorted(template)))
        template = template.get("default")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return special


def _load(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    if not any(any(checkpoint.path.glob(pattern)) for pattern in TOKENIZER_PATTERNS):
        raise CheckpointError(f"'{checkpoint.model}' has no tokenizer; put tokenizer.json beside its weights")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # whatever the tokenizer's own code raises
        raise UnsupportedError(_cannot_load(checkpoint, error)) from error
    if not tokenizer.is_fast:
        raise UnsupportedError(
            f"the tokenizer of '{checkpoint.model}', {type(tokenizer).__name__}, exists only as Python code, and the "
            "server reads tokenizer.json; use a checkpoint that has this file"
        )
    return tokenizer


def _cannot_load(checkpoint: Checkpoint, error: Exception) -> str:
    message = str(error)
    for package in ("sentencepiece", "tiktoken", "protobuf"):
        if re.search(rf"\b{package}\b", message, re.IGNORECASE):
            return (
                f"the tokenizer of '{checkpoint.model}' has no tokenizer.json, and converting its own format needs a "
                "package that is not installed; pip install sentencepiece tiktoken protobuf, or add tokenizer.json"
            )
    if "trust_remote_code" in message:
        return (
            f"the tokenizer of '{checkpoint.model}' is Python code that the checkpoint brings; "
            "read it, and allow it with --trust-remote-code"
        )
    reason = f"{type(error).__name__}: {(message.strip().splitlines() or [''])[0]}"
    return (
        f"transformers cannot load the tokenizer of '{checkpoint.model}' ({reason}); "
        "give a checkpoint whose tokenizer.json is whole"
    )


def _save(tokenizer: Any, folder: Path) -> None:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # some files on the hub still have the settings of a training run;
    backend.no_padding()  # transformers sets both anew in every call
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer.") as scratch:
        tokenizer.save_pretrained(scratch)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (Path(scratch) / name).replace(folder / name)


def _check_same_ids(tokenizer: Any, path: Path, checkpoint: Checkpoint) -> None:
    from tokenizers import Tokenizer

    saved = Tokenizer.from_file(str(path))
    for probe in PROBES:
        if saved.encode(probe).ids != tokenizer(probe).input_ids:
            raise UnsupportedError(
                f"the tokenizer of '{checkpoint.model}' gives other ids for {probe!r} when saved as tokenizer.json: "
                f"{type(tokenizer).__name__} does more in Python than the file can hold"
            )


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The file, and config.json's token ids where it is silent. Not parsed by transformers, which refuses to save some
    of the files that are on the hub."""
    config = _read_json(checkpoint.path / "config.json")
    path = checkpoint.path / "generation_config.json"
    generation = _read_json(path) if path.exists() else {}
    token_ids = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return _without_none(token_ids) | _without_none(generation)


def _special_tokens(tokenizer: Any, generation: dict[str, Any]) -> SpecialTokens:
    ends = [*_as_list(generation.get("eos_token_id")), *_as_list(tokenizer.eos_token_id)]
    begin, pad = (_first(generation.get(name), getattr(tokenizer, name)) for name in ("bos_token_id", "pad_token_id"))
    return SpecialTokens(bos_token_id=begin, eos_token_ids=tuple(dict.fromkeys(ends)), pad_token_id=pad)


def _by_name(tokenizer: Any, special: SpecialTokens) -> dict[str, Any]:
    def named(token_id: int | None) -> dict[str, Any] | None:
        return None if token_id is None else {"token": tokenizer.convert_ids_to_tokens(token_id), "id": token_id}

    return {
        "bos": named(special.bos_token_id),
        "eos": [named(token_id) for token_id in special.eos_token_ids],
        "pad": named(special.pad_token_id),
    }


def _as_list(token_ids: int | Sequence[int] | None) -> list[int]:
    if token_ids is None:
        return []
    return [token_ids] if isinstance(token_ids, int) else list(token_ids)


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
