"""What is decided before anything long starts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint import Checkpoint
from errors import UnsupportedError, UsageError
from plan import BuildRequest, EngineLimits, EnginePlan, choose_engine, make_plan, read_config

CONFIG = {"architectures": ["GPT2LMHeadModel"], "n_positions": 1024}
REQUEST = BuildRequest(model="gpt2")
VERSIONS = {"openvino": "2", "nncf": "1"}


def checkpoint(folder: Path, **config: Any) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    return Checkpoint(model="gpt2", revision="ab" * 20, path=folder, digest="cd" * 32)


def plan_of(folder: Path, request: BuildRequest = REQUEST, **config: Any) -> EnginePlan:
    return make_plan(request, checkpoint(folder, **config), "openvino", VERSIONS)


def limits_of(folder: Path, request: BuildRequest = REQUEST, **config: Any) -> EngineLimits:
    return plan_of(folder, request, architectures=["LlamaForCausalLM"], **config).limits


def test_what_is_left_open_is_decided(tmp_path: Path):
    assert plan_of(tmp_path) == EnginePlan(
        engine="openvino",
        model="gpt2",
        revision="ab" * 20,
        checkpoint_digest="cd" * 32,
        architecture="GPT2LMHeadModel",
        dtype="float32",
        quantization="none",
        kv_cache_dtype="auto",
        tensor_parallel=1,
        pipeline_parallel=1,
        gpu=None,
        limits=EngineLimits(max_batch_size=16, max_input_len=1023, max_seq_len=1024, max_beam_width=4),
        trust_remote_code=False,
        compiler_versions=(("nncf", "1"), ("openvino", "2")),
    )


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_fewer_bits_are_computed_with_in_bfloat16_unless_asked_otherwise(tmp_path: Path, quantization: Any):
    request = replace(REQUEST, quantization=quantization)
    assert plan_of(tmp_path, request).dtype == "bfloat16"
    assert plan_of(tmp_path, replace(request, dtype="float32")).dtype == "float32"


def test_what_was_asked_for_is_kept(tmp_path: Path):
    request = BuildRequest(
        model="gpt2",
        dtype="bfloat16",
        quantization="int4",
        tensor_parallel=2,
        pipeline_parallel=3,
        gpu="NVIDIA-L4",
        max_batch_size=5,
        max_input_len=60,
        max_seq_len=100,
        trust_remote_code=True,
    )
    plan = plan_of(tmp_path, request)
    assert (plan.dtype, plan.quantization, plan.gpu, plan.trust_remote_code) == ("bfloat16", "int4", "NVIDIA-L4", True)
    assert (plan.tensor_parallel, plan.pipeline_parallel, plan.world_size) == (2, 3, 6)
    assert plan.limits == EngineLimits(max_batch_size=5, max_input_len=60, max_seq_len=100, max_beam_width=4)


@pytest.mark.parametrize(
    ("config", "max_seq_len"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"n_positions": 512}, 512),
        ({"max_position_embeddings": 131072}, 4096),  # whoever needs more asks for it
        ({}, 4096),  # a model without positions, such as one with ALiBi
        ({"text_config": {"max_position_embeddings": 300}}, 300),
        ({"text_config": None, "max_position_embeddings": 300}, 300),
    ],
)
def test_the_length_is_the_models_or_4096(tmp_path: Path, config: dict[str, Any], max_seq_len: int):
    assert limits_of(tmp_path, **config).max_seq_len == max_seq_len


def test_more_than_4096_is_had_by_asking(tmp_path: Path):
    request = replace(REQUEST, max_seq_len=131072)
    assert limits_of(tmp_path, request, max_position_embeddings=131072).max_seq_len == 131072


def test_the_longest_prompt_leaves_room_for_one_token(tmp_path: Path):
    assert limits_of(tmp_path, replace(REQUEST, max_seq_len=2)).max_input_len == 1


@pytest.mark.parametrize(
    ("lengths", "sentence"),
    [
        ({"max_seq_len": 1}, "--max-seq-len 1 leaves no room for a prompt and an answer; use at least 2"),
        ({"max_seq_len": 513}, "--max-seq-len 513 is more than the model's 512 positions; use at most 512"),
        (
            {"max_input_len": 512},
            "--max-input-len 512 leaves no room for an answer within --max-seq-len 512; use at most 511",
        ),
        (
            {"max_input_len": 64, "max_seq_len": 64},
            "--max-input-len 64 leaves no room for an answer within --max-seq-len 64; use at most 63",
        ),
    ],
)
def test_impossible_lengths_are_refused(tmp_path: Path, lengths: dict[str, int], sentence: str):
    with pytest.raises(UsageError) as caught:
        limits_of(tmp_path, replace(REQUEST, **lengths), max_position_embeddings=512)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(("architectures", "number"), [([], 0), (None, 0), (["A", "B"], 2)])
def test_a_checkpoint_names_one_architecture(tmp_path: Path, architectures: Any, number: int):
    with pytest.raises(
        UnsupportedError, match=rf"config\.json of 'gpt2' names {number} architectures; give a checkpoint"
    ):
        plan_of(tmp_path, architectures=architectures, n_positions=8)


@pytest.mark.parametrize("engine", ["tensorrt", "pytorch"])
@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({}, "float16"),
        ({"torch_dtype": "float32"}, "float16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16"}, "bfloat16"),  # as transformers writes it since 4.56
    ],
)
def test_on_a_gpu_the_dtype_is_the_checkpoints_of_16_bits(tmp_path: Path, engine: Any, config: Any, dtype: str):
    found = checkpoint(tmp_path, architectures=["LlamaForCausalLM"], **config)
    assert make_plan(REQUEST, found, engine, {}).dtype == dtype
    assert make_plan(replace(REQUEST, dtype="float32"), found, engine, {}).dtype == "float32"


def test_what_modelopt_says_beside_config_json_counts(tmp_path: Path):
    found = checkpoint(tmp_path)
    assert read_config(found) == CONFIG
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    assert read_config(found)["quantization_config"] == {"quant_method": "modelopt", "quant_algo": "FP8"}
    found = checkpoint(tmp_path, quantization_config={"quant_method": "awq"}, **CONFIG)
    assert read_config(found)["quantization_config"] == {"quant_method": "awq"}


def test_a_config_that_is_no_object_is_refused(tmp_path: Path):
    found = checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UnsupportedError, match=r"config\.json of 'gpt2' is not a JSON object"):
        make_plan(REQUEST, found, "openvino", {})


@pytest.mark.parametrize(
    ("choice", "products", "engine", "reason"),
    [
        ("auto", [], "openvino", "auto: no NVIDIA GPU here"),
        ("auto", ["NVIDIA-L4", "NVIDIA-T4"], "tensorrt", "auto: this machine has NVIDIA-L4"),
        ("openvino", ["NVIDIA-L4"], "openvino", "asked for"),
        ("pytorch", [], "pytorch", "asked for"),
    ],
)
def test_the_engine_kind_has_a_reason(choice: Any, products: list[str], engine: str, reason: str):
    assert choose_engine(choice, products) == (engine, reason)


def test_everything_but_names_of_what_has_a_digest_decides_the_key(tmp_path: Path):
    named = {field.name for field in fields(EnginePlan)}
    assert set(plan_of(tmp_path).key_fields()) == named - {"model", "calibration_data"}


@pytest.mark.parametrize(("engine", "most"), [("tensorrt", 1), ("pytorch", 1), ("openvino", 4), ("synthetic", 4)])
def test_engines_on_gpus_have_no_beams(tmp_path: Path, engine: Any, most: int):
    assert make_plan(REQUEST, checkpoint(tmp_path), engine, VERSIONS).limits.max_beam_width == most


def texts(folder: Path, content: str = "{}") -> Path:
    folder.mkdir()
    (folder / "train.jsonl").write_text(content)
    return folder


CALIBRATED = [{"quantization": name} for name in ("fp8", "int4_awq", "int8_sq")]
CALIBRATED += [{"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "int8", "quantization": "int8"}]


@pytest.mark.parametrize("formats", CALIBRATED)
def test_formats_with_scales_are_calibrated(tmp_path: Path, formats: dict[str, Any]):
    plan = make_plan(replace(REQUEST, **formats), checkpoint(tmp_path), "tensorrt", VERSIONS)
    assert (plan.calibration, plan.calibration_data) == ("cnn_dailymail", None)


@pytest.mark.parametrize("formats", [{}, {"quantization": "int8"}, {"quantization": "int4"}])
def test_other_formats_are_not(tmp_path: Path, formats: dict[str, Any]):
    request = replace(REQUEST, **formats)
    assert make_plan(request, checkpoint(tmp_path), "tensorrt", VERSIONS).calibration is None
    request = replace(request, calibration_data=texts(tmp_path / "texts"))
    with pytest.raises(UsageError, match=r"--calibration-data .* is for TensorRT engines with .*; leave it out"):
        make_plan(request, checkpoint(tmp_path), "tensorrt", VERSIONS)


def test_texts_count_by_what_they_hold(tmp_path: Path):
    def calibration(data: Path) -> str | None:
        request = replace(REQUEST, quantization="fp8", calibration_data=data)
        plan = make_plan(request, checkpoint(tmp_path), "tensorrt", VERSIONS)
        assert plan.calibration_data == str(data)
        return plan.calibration

    one, same, other = (
        calibration(texts(tmp_path / name, content)) for name, content in (("a", "1"), ("b", "1"), ("c", "2"))
    )
    assert one == same != other
    assert one is not None and re.fullmatch("sha256:[0-9a-f]{64}", one)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, r"--calibration-data .*/texts is no folder; give one that holds a data set"),
        (lambda path: path.write_text(""), r"--calibration-data .*/texts is no folder; give one that holds a data set"),
        (lambda path: path.mkdir(), r"--calibration-data .*/texts is empty; give a folder that holds a data set"),
    ],
)
def test_texts_that_are_not_there_are_refused(tmp_path: Path, make: Callable[[Path], Any], sentence: str):
    make(tmp_path / "texts")
    request = replace(REQUEST, quantization="fp8", calibration_data=tmp_path / "texts")
    with pytest.raises(UsageError, match=sentence):
        make_plan(request, checkpoint(tmp_path), "tensorrt", VERSIONS)


def test_arguments_of_the_library_decide_the_key(tmp_path: Path):
    arguments = {"kv_cache_config": {"max_tokens": 100}}
    plan = make_plan(replace(REQUEST, llm_arguments=arguments), checkpoint(tmp_path), "pytorch", VERSIONS)
    assert plan.key_fields()["llm_arguments"] == arguments
