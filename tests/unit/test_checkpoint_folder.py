"""Local folders as checkpoints: what is complete, what is damaged, and what the digest covers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import checkpoint
import checkpoint_files
import pytest
from checkpoint import Checkpoint, resolve
from errors import CheckpointError, UsageError
from hub_server import model_files, safetensors

BUILD = Path(checkpoint.__file__).parent
INDEX = json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}).encode()
SHARDED = {"model__safetensors": None, "model__safetensors__index__json": INDEX}
SHARDED_FILES = model_files(**SHARDED) | {f"model-{n}-of-2.safetensors": safetensors(n) for n in (1, 2)}


def write(folder: Path, files: dict[str, bytes], *, age_seconds: int = 60) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
        then = (folder / name).stat().st_mtime - age_seconds
        os.utime(folder / name, (then, then))
    return folder


def sentence(model: Path | str, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve(str(model), **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def no_hashing(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    def refuse(path: Path) -> None:
        raise AssertionError(f"{path} was hashed")

    monkeypatch.setattr(checkpoint, "sha256_of", refuse)
    return monkeypatch


def test_a_complete_folder_is_a_checkpoint_without_revision(tmp_path):
    folder = write(tmp_path / "tiny", model_files())
    found = resolve(str(folder))
    assert (found.model, found.revision, found.path, found.name) == (str(folder), None, folder, "tiny")
    assert len(bytes.fromhex(found.digest)) == 32


def test_a_relative_path_is_resolved(tmp_path, monkeypatch):
    write(tmp_path / "tiny", model_files())
    monkeypatch.chdir(tmp_path)
    assert resolve("./tiny").model == resolve("tiny/").model == str(tmp_path / "tiny")


def test_an_existing_folder_comes_before_a_hub_id(tmp_path, monkeypatch):
    write(tmp_path / "gpt2", model_files())
    monkeypatch.chdir(tmp_path)
    assert resolve("gpt2").path == tmp_path / "gpt2"


def test_only_files_that_matter_are_listed(tmp_path):
    extras = {
        "README.md": b"",
        "pytorch_model.bin": b"x",
        "flax_model.msgpack": b"x",
        "model.gguf": b"x",
        "code.py": b"",
    }
    assert resolve(str(write(tmp_path, model_files() | extras))).files == tuple(sorted(model_files()))


def test_code_matters_only_when_trusted(tmp_path):
    write(tmp_path, model_files(config__json=b'{"auto_map": {"AutoModel": "code.Model"}}') | {"code.py": b""})
    assert "code.py" not in resolve(str(tmp_path)).files
    assert "code.py" in resolve(str(tmp_path), trust_remote_code=True).files


def test_code_that_is_not_used_is_mentioned(tmp_path, caplog):
    caplog.set_level("INFO")
    resolve(str(write(tmp_path, model_files(tokenizer_config__json=b'{"auto_map": {"A": "code.T"}}'))))
    assert "brings Python code (auto_map in tokenizer_config.json), which is not used" in caplog.text


def test_shards_are_found_through_the_index(tmp_path):
    write(tmp_path, SHARDED_FILES | {"model-3-of-3.safetensors": b"of another index"})
    files = resolve(str(tmp_path)).files
    assert [name for name in files if name.startswith("model-")] == [
        "model-1-of-2.safetensors",
        "model-2-of-2.safetensors",
    ]


@pytest.mark.parametrize(
    "tokenizer", [{"tokenizer.model": b"x"}, {"vocab.json": b"{}", "merges.txt": b""}, {"qwen.tiktoken": b"x"}]
)
def test_other_tokenizers_than_tokenizer_json_will_do(tmp_path, tokenizer):
    write(tmp_path, model_files(tokenizer__json=None) | tokenizer)
    assert set(tokenizer) <= set(resolve(str(tmp_path)).files)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no config.json"),
        (model_files(config__json=None), "has no config.json"),
        (model_files(model__safetensors=None), "has no weights: neither model.safetensors nor pytorch_model.bin"),
        (model_files(tokenizer__json=None), "has no tokenizer: neither tokenizer.json nor"),
        (model_files(tokenizer__json=None) | {"vocab.json": b"{}"}, "nor vocab.json with merges.txt"),
        (model_files(model__safetensors=None) | {"m.gguf": b"x"}, "has its weights only as GGUF (m.gguf)"),
        (model_files(model__safetensors=None) | {"adapter_config.json": b"{}"}, "is an adapter without its base model"),
        (model_files(config__json=b"{"), "is damaged: config.json is not JSON"),
        (model_files(config__json=b"\xff"), "is damaged: config.json is not JSON"),
        (model_files(config__json=b"[]"), "is damaged: config.json is not a JSON object"),
        (model_files(tokenizer__json=b'{"model": {'), "is damaged: tokenizer.json is not JSON"),
        (model_files(model__safetensors=safetensors()[:-1]), "model.safetensors is cut off: it has"),
        (model_files(model__safetensors=safetensors()[:20]), "is cut off after 20 bytes, within its header"),
        (model_files(model__safetensors=safetensors()[:7]), "model.safetensors is not a safetensors file"),
        (model_files(model__safetensors=safetensors() + b"x"), "where its header says"),
        (model_files(model__safetensors=b"<!DOCTYPE html><html>"), "model.safetensors is not a safetensors file"),
        (
            model_files(model__safetensors=(2).to_bytes(8, "little") + b"[]"),
            "model.safetensors is not a safetensors file",
        ),
        (model_files(model__safetensors=b""), "model.safetensors is empty"),
        (model_files(model__safetensors=b"version https://git-lfs.example/spec/v1\noid"), "is a Git LFS pointer"),
        (
            model_files(tokenizer__json=b"version https://git-lfs.example/spec/v1\noid"),
            "tokenizer.json is a Git LFS pointer",
        ),
        (
            model_files(model__safetensors=None) | {"pytorch_model.bin": b"PK\3\4 cut off"},
            "pytorch_model.bin is cut off after",
        ),
        (model_files(**SHARDED), "names 2 weight files, and model-1-of-2.safetensors and 1 more are missing"),
        ({**SHARDED_FILES, "model-2-of-2.safetensors": safetensors(2)[:-1]}, "model-2-of-2.safetensors is cut off"),
        (model_files(**{**SHARDED, "model__safetensors__index__json": b"{}"}), "index.json has no weight_map"),
        (
            model_files(**{**SHARDED, "model__safetensors__index__json": b'{"weight_map": {"a": "../../etc/passwd"}}'}),
            "../../etc/passwd is missing",
        ),
    ],
)
def test_an_incomplete_or_damaged_folder_is_refused(tmp_path, files, message):
    folder = write(tmp_path / "m", files)
    said = sentence(folder)
    assert message in said
    assert repr(str(folder)) in said


def test_a_missing_shard_is_named(tmp_path):
    write(tmp_path, SHARDED_FILES)
    (tmp_path / "model-2-of-2.safetensors").unlink()
    assert "names 2 weight files, and model-2-of-2.safetensors is missing; copy or download" in sentence(tmp_path)


def test_a_dangling_link_counts_as_missing(tmp_path):
    write(tmp_path, model_files(model__safetensors=None))
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert "has no weights" in sentence(tmp_path)


def test_weights_are_judged_without_reading_them(tmp_path):
    header = json.dumps({"w": {"dtype": "U8", "shape": [10**13], "data_offsets": [0, 10**13]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 10**12)  # ten times too short, and far too large to read
    expected = f"is cut off: it has {8 + len(header) + 10**12} of {8 + len(header) + 10**13} bytes"
    assert checkpoint_files.damage(path) == expected


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("config.json", "'config.json' is a file; --model takes a Hugging Face id or a folder"),
        ("./none", "folder './none' does not exist"),
        ("/none/here", "folder '/none/here' does not exist"),
        ("~/none-here", "folder '~/none-here' does not exist"),
    ],
)
def test_a_path_that_is_no_folder_is_refused(tmp_path, monkeypatch, model, message):
    monkeypatch.chdir(write(tmp_path, model_files()))
    assert message in sentence(model)


def test_a_folder_has_no_revision(tmp_path):
    write(tmp_path, model_files())
    with pytest.raises(UsageError, match="--revision 'v1' is for hub ids"):
        resolve(str(tmp_path), revision="v1")


def test_remains_of_an_unfinished_download_are_mentioned(tmp_path, caplog):
    write(tmp_path, model_files())
    write(tmp_path / ".cache/huggingface/download", {"x.incomplete": b""})
    resolve(str(tmp_path))
    assert "remains of an unfinished `hf download`" in caplog.text


def test_equal_content_has_an_equal_digest(tmp_path):
    first, second = (resolve(str(write(tmp_path / name, model_files()))) for name in "ab")
    assert first.digest == second.digest


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({"model.safetensors": safetensors(fill=b"v")}, False),
        ({"tokenizer.json": b'{"model": []}'}, False),
        ({"chat_template.jinja": b""}, False),
        ({"README.md": b"new"}, True),
        ({"code.py": b"new"}, True),
    ],
)
def test_the_digest_covers_what_matters_and_nothing_else(tmp_path, change, is_same):
    before = resolve(str(write(tmp_path, model_files())), digest_cache=tmp_path / "cache").digest
    after = resolve(str(write(tmp_path, change)), digest_cache=tmp_path / "cache").digest
    assert (before == after) is is_same


def test_a_second_run_hashes_nothing(tmp_path, request):
    folder = write(tmp_path / "m", model_files())
    first = resolve(str(folder), digest_cache=tmp_path / "cache")
    request.getfixturevalue("no_hashing")
    assert resolve(str(folder), digest_cache=tmp_path / "cache") == first


def test_a_file_that_could_still_change_within_its_time_stamp_is_hashed_again(tmp_path, request):
    folder = write(tmp_path / "m", model_files(), age_seconds=0)
    resolve(str(folder), digest_cache=tmp_path / "cache")
    request.getfixturevalue("no_hashing")
    with pytest.raises(AssertionError, match="hashed"):
        resolve(str(folder), digest_cache=tmp_path / "cache")


@pytest.mark.parametrize("content", [b'{"half', b"[]", b""])
def test_a_damaged_digest_cache_is_made_anew(tmp_path, content):
    folder = write(tmp_path / "m", model_files())
    write(tmp_path / "cache", {"file-digests.json": content})
    assert resolve(str(folder), digest_cache=tmp_path / "cache") == resolve(str(folder))


def test_long_hashing_is_announced(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(checkpoint, "LONG_TO_HASH_BYTES", 100)
    resolve(str(write(tmp_path, model_files())))
    assert f"bytes of folder {str(tmp_path)!r}" in caplog.text


def test_a_folder_named_like_an_id_says_how_to_reach_the_hub(tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "or say 'gpt2@main' for the model on the hub" in sentence("gpt2")


def test_a_digest_cache_that_cannot_be_written_is_no_error(tmp_path):
    folder = write(tmp_path / "m", model_files())
    assert resolve(str(folder), digest_cache=folder / "config.json" / "cache") == resolve(str(folder))


def test_a_file_that_changes_while_it_is_hashed_is_refused(tmp_path, monkeypatch):
    folder = write(tmp_path, model_files())
    digest_of = checkpoint.sha256_of

    def append_and_hash(path):
        with path.open("ab") as file:
            file.write(b" ")
        return digest_of(path)

    monkeypatch.setattr(checkpoint, "sha256_of", append_and_hash)
    assert "changes while it is read (" in sentence(folder)


@pytest.mark.parametrize(("model", "name"), [("gpt2", "gpt2"), ("org/name", "name"), ("/models/tiny", "tiny")])
def test_the_name_is_the_last_part(model, name):
    assert Checkpoint(model=model, revision=None, path=Path(), digest="", files=()).name == name


def test_importing_the_module_loads_no_client_and_no_framework():
    heavy = ("huggingface_hub", "requests", "torch", "transformers")
    code = f"import checkpoint, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=BUILD, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_local_folder_needs_no_hub_client(tmp_path):
    folder = write(tmp_path, model_files())
    code = f"import checkpoint, sys; checkpoint.resolve({str(folder)!r}); print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=BUILD, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- a plan needs config.json only


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b"{}"},
        model_files(model__safetensors=None, tokenizer__json=None),
        model_files(**SHARDED),  # an index whose shards are elsewhere
        model_files(model__safetensors=b"version https://git-lfs.github.com/spec/v1"),
    ],
)
def test_a_plan_needs_no_weights(tmp_path, files, caplog):
    folder = write(tmp_path / "tiny", files)
    sentence(folder)
    with caplog.at_level("INFO", "checkpoint"):
        found = resolve(str(folder), is_plan=True)
    assert (found.path, found.digest, found.files) == (folder, "", ("config.json",))
    assert "planning from config.json alone: folder " in caplog.text


def test_a_plan_of_a_complete_folder_has_its_digest(tmp_path):
    folder = write(tmp_path / "tiny", model_files())
    assert resolve(str(folder), is_plan=True) == resolve(str(folder))


@pytest.mark.parametrize("files", [{}, model_files(config__json=None), model_files(config__json=b"{")])
def test_a_plan_needs_a_config(tmp_path, files):
    folder = write(tmp_path / "tiny", files)
    assert sentence(folder, is_plan=True) == sentence(folder)
