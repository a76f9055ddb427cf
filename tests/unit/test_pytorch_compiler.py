"""Engines for the PyTorch backend: the checkpoint itself, with the tokenizer's files and checked arguments."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints
import trtllm_installation
from checkpoint import Checkpoint, resolve
from compilers import CompiledModel, pytorch_compiler
from errors import UnsupportedError, UsageError
from plan import BuildRequest, EnginePlan, make_plan, read_config

MakeCheckpoint = Callable[..., Checkpoint]


@dataclass(frozen=True, kw_only=True)
class Built:
    folder: Path
    plan: EnginePlan
    compiled: CompiledModel

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    @property
    def llm_arguments(self) -> dict[str, Any]:
        return json.loads((self.folder / "llm_args.json").read_text())


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trtllm_installation, "versions", dict)
    monkeypatch.setattr(trtllm_installation, "pytorch_architectures", lambda: None)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoints.make("llama", tmp_path_factory.mktemp("checkpoint"), dtype="bfloat16")


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> Checkpoint:
    return resolve(str(llama_folder))


@pytest.fixture
def changed(llama_folder: Path, tmp_path: Path) -> MakeCheckpoint:
    """The checkpoint with fields of its config.json changed, and other files beside it."""

    def change(files: dict[str, Any] | None = None, trust_remote_code: bool = False, **config: Any) -> Checkpoint:
        folder = tmp_path / "changed"
        folder.mkdir()
        for path in llama_folder.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "config.json").unlink()
        content = json.loads((llama_folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(content))
        for name, more in (files or {}).items():
            (folder / name).write_text(more if isinstance(more, str) else json.dumps(more))
        return resolve(str(folder), trust_remote_code=trust_remote_code)

    return change


def plan_for(checkpoint: Checkpoint, **request: Any) -> EnginePlan:
    asked = BuildRequest(model=checkpoint.model, engine="pytorch", **request)
    pytorch_compiler.check_request(asked)
    return make_plan(asked, checkpoint, "pytorch", pytorch_compiler.versions())


def check(checkpoint: Checkpoint, **request: Any) -> None:
    pytorch_compiler.check(plan_for(checkpoint, **request), read_config(checkpoint))


def build(checkpoint: Checkpoint, parent: Path, **request: Any) -> Built:
    plan = plan_for(checkpoint, **request)
    pytorch_compiler.check(plan, read_config(checkpoint))
    folder = parent / "engine"
    folder.mkdir()
    return Built(folder=folder, plan=plan, compiled=pytorch_compiler.compile(plan, checkpoint, folder, parent / "kept"))


# --- what is made


def test_the_engine_is_the_checkpoint_with_its_tokenizer_and_arguments(llama: Checkpoint, tmp_path: Path):
    built = build(llama, tmp_path, max_seq_len=128)
    assert built.names == [
        "config.json",
        "generation_config.json",
        "llm_args.json",
        "model.safetensors",
        "special_tokens.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (built.folder / "model.safetensors").read_bytes() == (llama.path / "model.safetensors").read_bytes()
    assert (built.folder / "config.json").read_bytes() == (llama.path / "config.json").read_bytes()
    assert built.llm_arguments == {"max_num_tokens": 8192, "enable_chunked_prefill": True}
    assert (built.plan.dtype, built.plan.gpu, built.plan.limits.max_beam_width) == ("bfloat16", None, 1)
    assert built.compiled.gpu is None
    assert built.compiled.vocab_size == tiny_checkpoints.VOCABULARY_SIZE
    assert built.compiled.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2  # layers, key and value, heads, width, bytes
    assert (built.compiled.bos_token_id, built.compiled.eos_token_ids) == (1, (2,))


def test_every_end_token_is_where_the_library_looks_for_it(changed: MakeCheckpoint, tmp_path: Path):
    checkpoint = changed(files={"generation_config.json": {}}, eos_token_id=[5, 6])
    built = build(checkpoint, tmp_path)
    generation = json.loads((built.folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == list(built.compiled.eos_token_ids) == [5, 6, 2]


def test_the_users_own_files_are_copied(llama: Checkpoint, tmp_path: Path):
    built = build(llama, tmp_path)
    for path in built.folder.iterdir():
        assert not path.is_symlink()
        assert path.stat().st_nlink == 1


def test_files_of_the_hub_are_shared_with_its_cache(llama: Checkpoint, tmp_path: Path):
    cache = tmp_path / "cache"
    cache.mkdir()
    blobs, snapshot = tmp_path / "cache/blobs", tmp_path / "cache/snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for number, name in enumerate(llama.files):
        (blobs / str(number)).write_bytes((llama.path / name).read_bytes())
        (snapshot / name).symlink_to(f"../blobs/{number}")
    built = build(replace(llama, revision="ab" * 20, path=snapshot), tmp_path)
    weights = built.folder / "model.safetensors"
    assert weights.samefile(snapshot / "model.safetensors")
    assert not weights.is_symlink()


def test_another_disk_than_the_hubs_cache_gets_a_copy(llama: Checkpoint, tmp_path: Path, monkeypatch: Any):
    def fail(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", fail)
    built = build(replace(llama, revision="ab" * 20), tmp_path)
    assert (built.folder / "model.safetensors").stat().st_nlink == 1


def test_shards_and_what_says_how_they_are_quantized_are_taken_too(changed: MakeCheckpoint, tmp_path: Path):
    modelopt = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    built = build(changed(files={"hf_quant_config.json": modelopt}), tmp_path)
    assert json.loads((built.folder / "hf_quant_config.json").read_text()) == modelopt
    assert built.compiled.kv_bytes_per_token == 2 * 2 * 2 * 16  # it has scales for FP8, which the library then takes


CODE = {"auto_map": {"AutoConfig": "code.Config"}}


def test_code_that_nobody_trusted_is_not_named(changed: MakeCheckpoint, tmp_path: Path):
    checkpoint = changed(files={"code.py": "raise SystemExit"}, **CODE)
    built = build(checkpoint, tmp_path)
    assert "code.py" not in built.names
    assert "auto_map" not in json.loads((built.folder / "config.json").read_text())
    assert "trust_remote_code" not in built.llm_arguments
    assert "auto_map" in json.loads((checkpoint.path / "config.json").read_text())


def test_code_of_the_hub_is_not_taken_from_its_cache_either(changed: MakeCheckpoint, tmp_path: Path):
    checkpoint = replace(changed(files={"code.py": ""}, **CODE), revision="ab" * 20)
    before = (checkpoint.path / "config.json").read_text()
    build(checkpoint, tmp_path)
    assert (checkpoint.path / "config.json").read_text() == before


def test_the_users_arguments_are_written_over_ours(llama: Checkpoint, tmp_path: Path):
    arguments = {"max_num_tokens": 4096, "kv_cache_config": {"free_gpu_memory_fraction": 0.5}}
    built = build(llama, tmp_path, kv_cache_dtype="fp8", llm_arguments=arguments)
    assert built.llm_arguments == {
        "max_num_tokens": 4096,
        "enable_chunked_prefill": True,
        "kv_cache_config": {"dtype": "fp8", "free_gpu_memory_fraction": 0.5},
    }
    assert built.compiled.kv_bytes_per_token == 2 * 2 * 2 * 16


@pytest.mark.usefixtures("no_library")
def test_it_is_made_without_the_library(llama: Checkpoint, tmp_path: Path):
    built = build(llama, tmp_path, tensor_parallel=2)
    assert "tensorrt_llm" not in dict(built.plan.compiler_versions)


def test_the_librarys_version_is_recorded_where_it_is_installed(llama: Checkpoint, monkeypatch: Any):
    monkeypatch.setattr(trtllm_installation, "versions", lambda: {"tensorrt_llm": "1.2.1", "tensorrt": "10.14"})
    monkeypatch.setattr(trtllm_installation, "pytorch_architectures", lambda: None)
    versions = dict(plan_for(llama).compiler_versions)
    assert versions["tensorrt_llm"] == "1.2.1"
    assert "tensorrt" not in versions


# --- what is refused


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (
            {"quantization": "fp8"},
            r"--quantization fp8 is made by the TensorRT builder, .*; name a checkpoint that is quantized already .*, "
            "or build with --engine tensorrt",
        ),
        ({"kv_cache_dtype": "int8"}, r"--kv-cache-dtype int8 is for TensorRT engines, .*; use fp8 or auto"),
        ({"dtype": "float32"}, r"--dtype float32 is not computed by .*; use float16, bfloat16 or auto"),
        ({"gpu": "NVIDIA-L4"}, r"--gpu NVIDIA-L4 is for TensorRT engines and --plan, .*; leave it out"),
        (
            {"llm_arguments": {"atn_backend": "TRTLLM"}},
            r"atn_backend is no argument known here; perhaps .* attn_backend",
        ),
    ],
)
def test_options_that_this_kind_cannot_have(request_: dict[str, Any], sentence: str):
    with pytest.raises(UsageError, match=sentence):
        pytorch_compiler.check_request(BuildRequest(model="llama", **request_))


def test_prompts_that_are_not_split_must_fit_into_a_step(llama: Checkpoint):
    arguments = {"enable_chunked_prefill": False, "max_num_tokens": 100}
    check(llama, llm_arguments=arguments, max_input_len=100)
    with pytest.raises(
        UsageError, match=r"prompts may have 255 tokens, more than the 100 of a step; set max_num_tokens"
    ):
        check(llama, llm_arguments=arguments)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "fp8"},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    ],
)
def test_a_checkpoint_that_is_quantized_already_is_taken(changed: MakeCheckpoint, quantization: dict[str, Any]):
    check(changed(quantization_config=quantization))


def test_a_quantization_that_is_not_known_is_refused(changed: MakeCheckpoint):
    with pytest.raises(
        UnsupportedError, match=r"is quantized in a way \(bitsandbytes\) that .*; use a checkpoint in FP8"
    ):
        check(changed(quantization_config={"quant_method": "bitsandbytes"}))


def test_layouts_that_cannot_be_are_refused(llama: Checkpoint):
    with pytest.raises(UsageError, match=r"--tp 3 does not divide the 4 attention heads of '.*'; use 1, 2 or 4"):
        check(llama, tensor_parallel=3)


def test_encoders_are_refused(changed: MakeCheckpoint):
    with pytest.raises(UnsupportedError, match=r"is a BertModel, and engines are built from causal language models"):
        check(changed(architectures=["BertModel"]))


@pytest.mark.usefixtures("no_library")
def test_without_the_library_its_documentation_is_asked(changed: MakeCheckpoint, caplog: pytest.LogCaptureFixture):
    check(changed(architectures=["GemmaForCausalLM"], head_dim=16))
    assert "lists no GemmaForCausalLM for its PyTorch backend, which may refuse to load it; --engine te" in caplog.text


def test_an_architecture_that_the_library_does_not_register_is_refused(llama: Checkpoint, monkeypatch: Any):
    monkeypatch.setattr(trtllm_installation, "versions", lambda: {"tensorrt_llm": "1.2.1"})
    monkeypatch.setattr(trtllm_installation, "pytorch_architectures", lambda: frozenset(["Qwen3ForCausalLM"]))
    with pytest.raises(
        UnsupportedError, match=r"of TensorRT-LLM 1.2.1 does not have; use --engine tensorrt, or one of Qw"
    ):
        check(llama)


def test_tensors_that_are_not_known_are_not_checked(
    changed: MakeCheckpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trtllm_installation, "pytorch_architectures", lambda: frozenset(["DeepseekV3ForCausalLM"]))
    caplog.set_level(logging.INFO)
    built = build(changed(architectures=["DeepseekV3ForCausalLM"]), tmp_path, tensor_parallel=3)
    assert "the tensors of a DeepseekV3ForCausalLM are not known here, so --tp and --pp are not checked" in caplog.text
    assert built.compiled.kv_bytes_per_token == 0


@pytest.mark.parametrize("arguments", [{}, {"moe_expert_parallel_size": 2}, {"moe_tensor_parallel_size": 4}])
def test_experts_are_divided_among_the_ranks(llama: Checkpoint, arguments: dict[str, int]):
    check(llama, tensor_parallel=4, llm_arguments=arguments)


@pytest.mark.parametrize(
    "arguments", [{"moe_expert_parallel_size": 3}, {"moe_expert_parallel_size": 4, "moe_tensor_parallel_size": 2}]
)
def test_experts_that_cannot_be_divided_are_refused(llama: Checkpoint, arguments: dict[str, int]):
    with pytest.raises(
        UsageError, match=r"--llm-args: moe_tensor_parallel_size \d times .* \d is not --tp 4; choose two"
    ):
        check(llama, tensor_parallel=4, llm_arguments=arguments)


def test_a_config_without_a_vocabulary_is_refused(changed: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trtllm_installation, "pytorch_architectures", lambda: None)
    with pytest.raises(UnsupportedError, match=r"config.json of '.*' has no vocab_size, which the server needs; use"):
        check(changed(architectures=["NewForCausalLM"], vocab_size=None))
