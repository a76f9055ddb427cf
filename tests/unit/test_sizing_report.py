"""What --plan says about sizes, to programs and to people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sizing_report
from errors import UnsupportedError, UsageError
from plan import EngineLimits, EnginePlan
from sizing_report import in_words, size_plan

LLAMA_3_70B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
GPT2 = {"architectures": ["GPT2LMHeadModel"]}


def plan_of(engine: Any = "tensorrt", **changes: Any) -> EnginePlan:
    decided = {
        "model": "a-model",
        "revision": None,
        "checkpoint_digest": "",
        "architecture": "LlamaForCausalLM",
        "dtype": "float16",
        "quantization": "none",
        "kv_cache_dtype": "auto",
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
        "gpu": None,
        "limits": EngineLimits(max_batch_size=16, max_input_len=4095, max_seq_len=4096),
        "trust_remote_code": False,
        "compiler_versions": (),
    }
    return EnginePlan(engine=engine, **decided | changes)


def words(config: dict[str, Any], **changes: Any) -> str:
    return "\n".join(in_words(size_plan(plan_of(**changes), config)))


def gpu_of(sizes: dict[str, Any], product: str) -> dict[str, Any]:
    return next(gpu for gpu in sizes["gpus"] if gpu["product"] == product)


# --- JSON


def test_the_report_is_plain_json():
    sizes = size_plan(plan_of(), LLAMA_3_70B)
    assert json.loads(json.dumps(sizes)) == sizes
    assert {"parameters", "shape", "lengths", "weights", "kv_cache", "legal", "asked", "gpus", "basis", "notes"} <= set(
        sizes
    )


def test_each_layout_has_all_its_numbers():
    found = gpu_of(size_plan(plan_of(), LLAMA_3_70B), "NVIDIA-A100-SXM4-80GB")
    assert (found["refused"], found["compute_capability"], found["memory_mib"]) == (None, "8.0", 81920)
    assert (found["recommended"]["tensor_parallel"], found["recommended"]["pipeline_parallel"]) == (2, 1)
    assert found["recommended"] in found["layouts"] and found["recommended_for_all"] in found["layouts"]
    assert set(found["recommended"]) == {
        *("tensor_parallel", "pipeline_parallel", "gpus", "weight_bytes", "activation_bytes", "reserve_bytes"),
        *("kv_bytes", "kv_bytes_per_token", "tokens", "sequences", "fits", "holds_all"),
    }
    assert not found["asked"]["fits"]


def test_legal_values_are_named():
    assert size_plan(plan_of(), GPT2 | {"n_layer": 10})["legal"] == {
        "tensor_parallel": [1, 2, 3, 4, 6, 12],
        "pipeline_parallel": [1, 2, 5, 10],
    }


def test_refused_products_say_why():
    sizes = size_plan(plan_of(), GPT2)
    refused = {gpu["product"] for gpu in sizes["gpus"] if gpu["refused"]}
    assert refused == {"Tesla-T4", "Tesla-V100-SXM2-16GB", "Tesla-V100-SXM2-32GB"}
    assert gpu_of(sizes, "Tesla-T4")["asked"] is None
    refused = {gpu["product"] for gpu in size_plan(plan_of(quantization="fp8"), GPT2)["gpus"] if gpu["refused"]}
    assert "NVIDIA-A100-SXM4-80GB" in refused and "NVIDIA-L4" not in refused


def test_the_kv_cache_may_have_half_the_bytes():
    wide = size_plan(plan_of(dtype="bfloat16"), LLAMA_3_70B)["kv_cache"]
    narrow = size_plan(plan_of(dtype="bfloat16", kv_cache_dtype="fp8"), LLAMA_3_70B)["kv_cache"]
    assert (wide["dtype"], wide["bytes_per_token"]) == ("bfloat16", 327_680)
    assert (narrow["dtype"], narrow["bytes_per_token"]) == ("fp8", 163_840)
    assert wide["bytes_per_sequence"] == 327_680 * 4096


def test_a_checkpoint_that_is_quantized_already_decides_the_format():
    config = LLAMA_3_70B | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    sizes = size_plan(plan_of("pytorch"), config)
    assert sizes["weights"]["format"] == "int4_awq"
    assert "the checkpoint is quantized already: int4_awq" in sizes["notes"]
    with pytest.raises(UsageError, match="--quantization fp8 is for full weights, and 'a-model' is quantized already"):
        size_plan(plan_of("pytorch", quantization="fp8"), config)


def test_an_unknown_quantization_is_said_and_counted_in_full():
    sizes = size_plan(plan_of("pytorch"), GPT2 | {"quantization_config": {"quant_method": "new"}})
    assert sizes["weights"]["bytes"] == 2 * 124_439_808
    assert "counted as float16, 2 bytes each, which is more than they take" in sizes["notes"][0]


def test_a_checkpoint_with_scales_for_its_kv_cache_has_one_of_8_bits():
    quantization = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    sizes = size_plan(plan_of("pytorch"), LLAMA_3_70B | {"quantization_config": quantization})
    assert (sizes["weights"]["format"], sizes["kv_cache"]["dtype"]) == ("fp8", "fp8")


# --- what is an estimate, and what is not counted


def test_the_basis_is_said():
    text = words(GPT2)
    for said in (
        "arithmetic on the shapes",
        "a fifth more; checked against",
        "256 MiB for NCCL",
        "90% of what is free",
    ):
        assert said in text


def test_layers_with_a_window_are_counted_in_full_and_said():
    config = {"architectures": ["Gemma2ForCausalLM"], "sliding_window": 1024}
    assert size_plan(plan_of(), config)["notes"] == [
        "13 of 26 layers look back 1024 tokens only; their KV cache is counted in full for all 4096, so there may be "
        "room for more"
    ]
    assert size_plan(plan_of(), config | {"sliding_window": 4096})["notes"] == []


def test_a_kv_cache_that_costs_features_is_said():
    note = "with a KV cache in fp8 and these weights an engine neither reuses KV blocks nor splits prefills into chunks"
    assert note in size_plan(plan_of(kv_cache_dtype="fp8"), GPT2)["notes"]
    assert note not in size_plan(plan_of(kv_cache_dtype="fp8", quantization="fp8"), GPT2)["notes"]
    assert note not in size_plan(plan_of("pytorch", kv_cache_dtype="fp8"), GPT2)["notes"]


# --- in words


def test_the_table_has_a_line_per_product_and_fits_a_wide_terminal():
    lines = words(LLAMA_3_70B).splitlines()
    header = next(index for index, line in enumerate(lines) if line.startswith("GPU "))
    rows = [line.split() for line in lines[header + 1 : header + 17]]
    assert {row[0] for row in rows} >= {"NVIDIA-A10G", "NVIDIA-L4", "NVIDIA-L40S", "NVIDIA-H200", "NVIDIA-B200"}
    assert next(row for row in rows if row[0] == "NVIDIA-L40S")[:4] == ["NVIDIA-L40S", "45.0", "8.9", "4x1"]
    assert max(len(line) for line in lines[header : header + 17]) <= 120
    assert sum(line.startswith("refused ") for line in lines) == 3


def test_columns_are_aligned():
    lines = words(LLAMA_3_70B).splitlines()
    header = next(index for index, line in enumerate(lines) if line.startswith("GPU "))
    end = lines[header].index("tokens") + len("tokens")
    assert all(line[end - 1].isdigit() for line in lines[header + 1 : header + 17])


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"gpu": "NVIDIA-B200"}, "--tp 1 --pp 1 fits on NVIDIA-B200, with room for "),
        ({"gpu": "NVIDIA-H200"}, " sequences of 4096 tokens; all 16 at their longest need --tp 2 --pp 1."),
        ({"gpu": "NVIDIA-B200", "tensor_parallel": 4}, "; fewer GPUs do: --tp 1 --pp 1."),
        (
            {"gpu": "NVIDIA-A10G"},
            "--tp 1 --pp 1 does not fit on NVIDIA-A10G: of 22.5 GiB, weights, activations and reserve",
        ),
        ({"gpu": "NVIDIA-A10G"}, "holds no sequence of 4096 tokens; use --tp 8 --pp 1."),
        (
            {"gpu": "NVIDIA-A10G", "dtype": "float32"},
            "; nor does any layout of up to 8 of them; use --quantization, or a",
        ),
    ],
)
def test_the_verdict_is_a_sentence(changes: dict[str, Any], verdict: str):
    assert verdict in words(LLAMA_3_70B, **changes)


def test_every_layout_of_a_named_gpu_is_shown():
    lines = words(LLAMA_3_70B, gpu="NVIDIA-A100-SXM4-80GB").splitlines()
    start = lines.index("Layouts on NVIDIA-A100-SXM4-80GB, TP by PP.")
    rows = [line.split() for line in lines[start + 2 : start + 13]]
    assert [row[0] for row in rows] == ["1x1", "2x1", "1x2", "4x1", "2x2", "1x4", "1x5", "8x1", "4x2", "2x4", "1x8"]
    assert [row[-1] for row in rows[:4]] == ["big", "recommended", "fits", "all"]


def test_a_named_gpu_that_cannot_is_refused():
    with pytest.raises(UnsupportedError, match=r"Tesla-T4 has compute capability 7\.5"):
        size_plan(plan_of(gpu="Tesla-T4"), GPT2)


# --- on a CPU


def cpu_sizes(**changes: Any) -> dict[str, Any]:
    return size_plan(plan_of("openvino", **changes), GPT2)


def test_a_float32_engine_has_a_float32_cache_and_others_one_of_16_bits():
    assert cpu_sizes(dtype="float32")["kv_cache"]["bytes_per_token"] == 73_728
    assert cpu_sizes(dtype="bfloat16", quantization="int8")["kv_cache"]["bytes_per_token"] == 36_864


def test_weights_of_8_and_4_bits_take_tables_too():
    full, eight, four = (cpu_sizes(quantization=name)["weights"]["bytes"] for name in ("none", "int8", "int4"))
    assert full == 2 * 124_439_808
    assert 0.50 < eight / full < 0.52
    assert 0.25 < four / full < eight / full


@pytest.mark.parametrize(
    ("memory_bytes", "said"),
    [
        (64 << 30, "this machine has 64.0 GiB; weights and KV cache of 16 sequences at their longest take "),
        (1 << 30, ", so fewer of them will run at the same time"),
        (1 << 28, "this machine has 0.2 GiB, too little; "),
    ],
)
def test_the_machines_memory_is_compared(monkeypatch: pytest.MonkeyPatch, memory_bytes: int, said: str):
    monkeypatch.setattr(sizing_report, "_machine_bytes", lambda: memory_bytes)
    assert said in "\n".join(in_words(cpu_sizes()))


@pytest.mark.parametrize(("limit", "is_limited"), [("max", False), ("123456789", True), (None, False)])
def test_a_containers_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, is_limited: bool
):
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
    monkeypatch.setattr(sizing_report, "CGROUP_LIMIT", tmp_path / "memory.max")
    assert (cpu_sizes()["machine"]["memory_bytes"] == 123456789) is is_limited


def test_a_synthetic_engine_holds_no_weights():
    sizes = size_plan(plan_of("synthetic"), GPT2)
    assert "weights" not in sizes and "gpus" not in sizes
    assert "holds no weights" in "\n".join(in_words(sizes))
