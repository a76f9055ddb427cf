"""engine.json: what is written is read, and every damage and every wrong machine is named."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import engine_manifest
import pytest
from engine_manifest import (
    ManifestError,
    check_files,
    check_machine,
    check_sizes,
    list_files,
    read_manifest,
    write_manifest,
)
from manifests import MANIFEST, PYTORCH, TENSORRT

A10G, H100 = ("NVIDIA-A10G", "8.6"), ("NVIDIA-H100-80GB-HBM3", "9.0")


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    (tmp_path / "rank0").mkdir()
    (tmp_path / "rank0/weights.bin").write_bytes(bytes(range(256)) * 40_000)  # more than two blocks
    (tmp_path / "tokenizer.json").write_text("{}")
    write_manifest(tmp_path, replace(MANIFEST, files=list_files(tmp_path)))
    return tmp_path


def edit(engine: Path, change: Callable[[dict], object]) -> None:
    fields = json.loads((engine / "engine.json").read_text())
    change(fields)
    (engine / "engine.json").write_text(json.dumps(fields))


def sentence(call: Callable, *args: object, **options: object) -> str:
    with pytest.raises(ManifestError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- reading and writing


def test_what_is_written_is_read(engine):
    assert replace(read_manifest(engine), files={}) == MANIFEST


@pytest.mark.parametrize("manifest", [MANIFEST, TENSORRT, replace(MANIFEST, revision=None, bos_token_id=None)])
def test_every_value_survives(tmp_path, manifest):
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


def test_the_file_is_indented_sorted_json(engine):
    lines = (engine / "engine.json").read_text().splitlines()
    names = [line.split('"')[1] for line in lines if line.startswith('  "')]
    assert names == sorted(names) and "schema" in names and len(names) == 22


def test_writing_leaves_only_the_manifest(tmp_path):
    write_manifest(tmp_path, MANIFEST)
    assert [path.name for path in tmp_path.iterdir()] == ["engine.json"]


def test_a_manifest_nobody_could_read_is_not_written(tmp_path):
    message = sentence(write_manifest, tmp_path, replace(MANIFEST, vocab_size="many"))
    assert "'many' in field 'vocab_size'" in message and not list(tmp_path.iterdir())


def test_the_module_needs_only_the_standard_library():
    source = Path(engine_manifest.__file__).resolve()
    subprocess.run([sys.executable, "-I", "-S", source], check=True)


def test_builder_and_server_share_one_file():
    assert (Path(__file__).parents[2] / "build/engine_manifest.py").readlink() == Path(
        "../model_repo/tensorrt_llm/1/engine_manifest.py"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged: it is not JSON"),
        (b'{"schema": 2, "key": "ab', "is damaged: it is not JSON"),
        (b"\x00\xff" * 100, "is damaged: it is not JSON"),
        (b"[" * 100_000, "is damaged: it is not JSON"),
        (b"[]", "is damaged: it is not a JSON object"),
        (b"{}", "lacks field 'architecture', 'bos_token_id', 'checkpoint_digest'"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, content, message):
    (tmp_path / "engine.json").write_bytes(content)
    assert f"{tmp_path}/engine.json {message}" in sentence(read_manifest, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.update(schema=3), "has schema 3, and this program knows schema 2"),
        (lambda fields: fields.pop("dtype"), "lacks field 'dtype'"),
        (lambda fields: fields.pop("schema"), "lacks field 'schema'"),
        (lambda fields: fields.update(colour="red"), "has the unknown field 'colour'"),
        (lambda fields: fields["limits"].pop("max_seq_len"), "lacks field 'limits.max_seq_len'"),
        (lambda fields: fields["limits"].update(max_draft=1), "has the unknown field 'limits.max_draft'"),
        (lambda fields: fields.update(limits=[1]), "unexpected value [1] in field 'limits'"),
        (lambda fields: fields.update(engine="onnx"), "unexpected value 'onnx' in field 'engine'"),
        (lambda fields: fields.update(engine=["openvino"]), "unexpected value ['openvino'] in field 'engine'"),
        (lambda fields: fields.update(vocab_size=True), "unexpected value True in field 'vocab_size'"),
        (lambda fields: fields.update(vocab_size=1.5), "unexpected value 1.5 in field 'vocab_size'"),
        (lambda fields: fields.update(eos_token_ids=5), "unexpected value 5 in field 'eos_token_ids'"),
        (lambda fields: fields.update(eos_token_ids=["a"]), "unexpected value 'a' in field 'eos_token_ids'"),
        (lambda fields: fields.update(gpu={"product": "A"}), "lacks field 'gpu.compute_capability'"),
        (
            lambda fields: fields["versions"].update(openvino=2026),
            "unexpected value 2026 in field 'versions.openvino'",
        ),
        (
            lambda fields: fields["files"]["tokenizer.json"].pop("sha256"),
            "lacks field 'files.tokenizer.json.sha256'",
        ),
        (lambda fields: fields["files"].update({"../x": {"bytes": 1, "sha256": ""}}), "names the file '../x'"),
        (lambda fields: fields["files"].update({"/etc/x": {"bytes": 1, "sha256": ""}}), "names the file '/etc/x'"),
    ],
)
def test_a_wrong_field_is_named(engine, change, message):
    edit(engine, change)
    assert message in sentence(read_manifest, engine)


def test_a_folder_without_manifest_is_not_an_engine(tmp_path):
    assert sentence(read_manifest, tmp_path) == (
        f"{tmp_path} has no engine.json: not an engine, or a build that did not finish; build it first"
    )


@pytest.mark.parametrize("name", ["absent", "file"])
def test_what_is_not_a_folder_is_not_an_engine(tmp_path, name):
    (tmp_path / "file").touch()
    assert f"{tmp_path / name} is not a folder" in sentence(read_manifest, tmp_path / name)


def test_a_manifest_that_cannot_be_read_says_why(tmp_path):
    (tmp_path / "engine.json").mkdir()
    assert "engine.json cannot be read: Is a directory" in sentence(read_manifest, tmp_path)


# ---- files


def test_files_are_listed_with_size_and_digest_but_not_the_manifest(engine):
    content = (engine / "rank0/weights.bin").read_bytes()
    assert list_files(engine) == {
        "rank0/weights.bin": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()},
        "tokenizer.json": {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()},
    }


def test_an_engine_json_further_down_is_a_file_like_others(engine):
    (engine / "rank0/engine.json").touch()
    assert "rank0/engine.json" in list_files(engine)


def test_a_link_is_no_part_of_an_engine(engine, tmp_path_factory):
    (engine / "vocab.json").symlink_to(tmp_path_factory.mktemp("elsewhere") / "vocab.json")
    assert "vocab.json is a link" in sentence(list_files, engine)


def test_an_engine_as_built_passes(engine):
    check_files(engine, read_manifest(engine))


def test_an_engine_of_links_to_the_right_files_passes(engine, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "tokenizer.json"
    (engine / "tokenizer.json").rename(elsewhere)
    (engine / "tokenizer.json").symlink_to(elsewhere)
    check_files(engine, read_manifest(engine))


def test_more_files_do_not_matter(engine):
    (engine / "README.md").touch()
    check_files(engine, read_manifest(engine))


def test_a_missing_file_is_named(engine):
    (engine / "rank0/weights.bin").unlink()
    assert sentence(check_files, engine, read_manifest(engine)) == (
        f"{engine}/rank0/weights.bin is missing; copy the engine again, or build it again with --force"
    )


def test_a_missing_folder_is_named_by_its_file(engine):
    (engine / "rank0/weights.bin").unlink()
    (engine / "rank0").rmdir()
    (engine / "rank0").touch()
    assert "rank0/weights.bin is missing" in sentence(check_files, engine, read_manifest(engine))


def test_a_truncated_file_is_named_with_both_sizes(engine):
    with (engine / "rank0/weights.bin").open("r+b") as file:
        file.truncate(1000)
    message = sentence(check_files, engine, read_manifest(engine))
    assert message.startswith(
        f"{engine}/rank0/weights.bin has 1000 bytes, and engine.json says 10240000: it is damaged"
    )


@pytest.mark.parametrize("position", [0, 5_000_000, 10_239_999])
def test_a_flipped_bit_is_found_wherever_it_is(engine, position):
    with (engine / "rank0/weights.bin").open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    message = sentence(check_files, engine, read_manifest(engine))
    assert message.startswith(f"{engine}/rank0/weights.bin has SHA-256 ") and "--force" in message


def test_a_changed_byte_is_not_looked_for_by_check_sizes(engine):
    (engine / "tokenizer.json").write_text("[]")
    check_sizes(engine, read_manifest(engine))


def test_a_file_that_cannot_be_read_is_named(engine):
    manifest = read_manifest(engine)
    path = engine / "tokenizer.json"
    path.unlink()
    path.mkdir()
    manifest.files["tokenizer.json"]["bytes"] = path.stat().st_size
    assert f"{path} cannot be read: Is a directory" in sentence(check_files, engine, manifest)


# ---- machines


@pytest.mark.parametrize("version", ["2026.4.1", "2026.4.0", "2026.5.0", "2027.0.0", "2026.4.1-22982-e213a147257"])
def test_openvino_reads_what_the_same_or_an_older_release_wrote(version):
    check_machine(MANIFEST, gpu=None, versions={"openvino": version}, world_size=1)


@pytest.mark.parametrize(
    ("versions", "here"),
    [
        ({"openvino": "2026.3.2-100-releases"}, "OpenVINO 2026.3.2"),
        ({"openvino": "2025.9.0"}, "OpenVINO 2025.9.0"),
        ({}, "no OpenVINO"),
    ],
)
def test_an_older_openvino_is_refused(versions, here):
    assert sentence(check_machine, MANIFEST, gpu=None, versions=versions, world_size=1) == (
        f"the engine was built with OpenVINO 2026.4.1; this machine has {here}; "
        "install openvino>=2026.4 to serve it, or rebuild with the release that serves"
    )


def test_an_openvino_engine_without_its_version_is_refused():
    manifest = replace(MANIFEST, versions={})
    message = sentence(check_machine, manifest, gpu=None, versions={"openvino": "2026.4.1"}, world_size=1)
    assert "built with no OpenVINO; this machine has OpenVINO 2026.4.1; rebuild" in message


def test_tensorrt_runs_on_what_it_was_built_for():
    check_machine(TENSORRT, gpu=A10G, versions=TENSORRT.versions, world_size=1)


def test_another_gpu_is_refused_naming_both():
    assert sentence(check_machine, TENSORRT, gpu=H100, versions=TENSORRT.versions, world_size=1) == (
        "the engine was built for NVIDIA-A10G (8.6) with TensorRT-LLM 1.2.1; "
        "this machine has NVIDIA-H100-80GB-HBM3 (9.0); rebuild with --gpu NVIDIA-H100-80GB-HBM3"
    )


def test_another_compute_capability_is_refused():
    message = sentence(check_machine, TENSORRT, gpu=("NVIDIA-A10G", "8.7"), versions=TENSORRT.versions, world_size=1)
    assert "NVIDIA-A10G (8.6)" in message and "NVIDIA-A10G (8.7)" in message


def test_no_gpu_is_refused():
    message = sentence(check_machine, TENSORRT, gpu=None, versions=TENSORRT.versions, world_size=1)
    assert "this machine has no GPU; serve it on that GPU, or rebuild with --engine openvino" in message


@pytest.mark.parametrize("gpu", [None, A10G])
def test_a_tensorrt_engine_that_records_no_gpu_is_refused(gpu):
    message = sentence(check_machine, replace(TENSORRT, gpu=None), gpu=gpu, versions=TENSORRT.versions, world_size=1)
    assert "built for no GPU" in message


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tensorrt_llm": "1.2.0"}, "built with TensorRT-LLM 1.2.1; this machine has TensorRT-LLM 1.2.0; rebuild"),
        ({"tensorrt": "10.15"}, "built with TensorRT 10.14.1.48; this machine has TensorRT 10.15; rebuild"),
    ],
)
def test_another_tensorrt_is_refused_naming_both(changed, message):
    versions = TENSORRT.versions | changed
    assert message in sentence(check_machine, TENSORRT, gpu=A10G, versions=versions, world_size=1)


def test_a_machine_without_tensorrt_llm_is_refused():
    message = sentence(check_machine, TENSORRT, gpu=A10G, versions={}, world_size=1)
    assert "built with TensorRT-LLM 1.2.1; this machine has no TensorRT-LLM" in message


def test_too_few_gpus_are_refused():
    manifest = replace(MANIFEST, engine="pytorch", tensor_parallel=2, pipeline_parallel=2)
    assert sentence(check_machine, manifest, gpu=H100, versions={}, world_size=2) == (
        "the engine was built for 4 GPUs (--tp 2 --pp 2); this machine has 2; "
        "give it more GPUs, or rebuild with a smaller --tp or --pp"
    )


@pytest.mark.parametrize("gpu", [A10G, H100])
def test_pytorch_runs_on_any_gpu_and_version(gpu):
    check_machine(PYTORCH, gpu=gpu, versions={}, world_size=8)


def test_pytorch_does_not_run_without_a_gpu():
    message = sentence(check_machine, PYTORCH, gpu=None, versions={}, world_size=0)
    assert "runs on 1 NVIDIA GPUs; this machine has none that nvidia-smi names; start the container with its" in message
