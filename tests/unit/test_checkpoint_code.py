"""Checkpoints that bring Python code (auto_map), from the folder to the engine, without --trust-remote-code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_checkpoints
import tiny_engines
from checkpoint import resolve
from errors import UnsupportedError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama whose config and tokenizer both name code, as Phi-3's and Qwen's do; running the code is an error."""
    folder = tiny_checkpoints.make("llama", tmp_path / "checkpoint")
    (folder / "own_code.py").write_text("raise AssertionError('the code was run')\n")
    classes = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    change(folder / "config.json", auto_map=classes)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own_code.OwnTokenizer", None]})
    return folder


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def build(folder: Path, tmp_path: Path) -> tiny_engines.TinyEngine:
    return tiny_engines.compile(resolve(str(folder)), tmp_path / "engine")


def test_a_model_that_transformers_knows_is_built_without_its_code(folder, tmp_path):
    engine = build(folder, tmp_path)
    assert "own_code.py" not in engine.checkpoint.files
    assert (engine.folder / "openvino_model.bin").stat().st_size > 0
    assert not list(engine.folder.rglob("*.py"))


def test_a_model_that_transformers_does_not_know_asks_for_trust(folder, tmp_path):
    change(folder / "config.json", model_type="own_model")
    with pytest.raises(UnsupportedError) as caught:
        build(folder, tmp_path)
    assert str(caught.value) == (
        f"'{folder}' is Python code that the checkpoint brings; read it, and allow it with --trust-remote-code"
    )


def test_a_tokenizer_that_transformers_does_not_know_asks_for_trust(folder, tmp_path):
    change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer")
    with pytest.raises(UnsupportedError) as caught:
        build(folder, tmp_path)
    assert str(caught.value) == (
        f"the tokenizer of '{folder}' is Python code that the checkpoint brings; "
        "read it, and allow it with --trust-remote-code"
    )
