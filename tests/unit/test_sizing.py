"""Bytes per rank and whether they fit, against NVIDIA's own logs, real tensors, and what must hold of any model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from errors import UsageError
from gpu_products import GPU_PRODUCTS, find_product
from hypothesis import given
from hypothesis import strategies as st
from model_shape import ModelShape, model_shape
from plan import EngineLimits
from sizing import (
    CONTEXT_BYTES,
    DRIVER_FRACTION,
    DRIVER_MOST_BYTES,
    KV_CACHE_FRACTION,
    MAX_NUM_TOKENS,
    MIB,
    MOST_GPUS,
    TOKENS_PER_BLOCK,
    WEIGHT_FORMATS,
    Fit,
    GpuSizing,
    Layout,
    Precision,
    check_layout,
    checkpoint_format,
    checkpoint_kv_cache,
    fit,
    kv_bytes_per_token,
    layouts,
    legal_tensor_parallel,
    model_bytes,
    rank_sizes,
    size_gpu,
    stages,
)

FACTS = Path(__file__).resolve().parents[3] / "shared/facts/tensorrt-llm-1.2.1.json"
GIB = 1 << 30
LIMITS = EngineLimits(max_batch_size=16, max_input_len=1023, max_seq_len=1024)
FP16 = Precision(dtype="float16", kv_cache="float16")
FP8 = Precision(dtype="float16", weights="fp8", kv_cache="fp8")
ONE = Layout(tp=1, pp=1)
USABLE = [gpu for gpu in GPU_PRODUCTS if gpu.supports]


def shape_of(architecture: str = "LlamaForCausalLM", **config: Any) -> ModelShape:
    return model_shape({"architectures": [architecture], **config}, "a-model")


LLAMA_2_7B = shape_of()
LLAMA_3_8B = shape_of(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8)
LLAMA_3_70B = shape_of(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
GPT2 = shape_of("GPT2LMHeadModel")


def sized(
    product: str, shape: ModelShape, precision: Precision = FP16, asked: Layout = ONE, **limits: int
) -> GpuSizing:
    return size_gpu(find_product(product), shape, precision, replace(LIMITS, **limits), asked, engine="tensorrt")


# --- against what NVIDIA's logs say of Llama 2 7B, FP8, on an H100 (sources in sizing.py)


def test_weights_are_those_of_the_logged_engine():
    assert model_bytes(LLAMA_2_7B, FP8) == pytest.approx(6695 * MIB, rel=0.005)


def test_kv_cache_is_that_of_the_logged_engine():
    assert kv_bytes_per_token(LLAMA_2_7B, FP8) * 259840 == pytest.approx(63.44 * GIB, rel=0.0005)
    assert pytest.approx(63.44 / 70.48, rel=0.001) == KV_CACHE_FRACTION


def test_activations_are_at_least_those_of_both_logged_engines_and_little_more():
    (size,) = rank_sizes(LLAMA_2_7B, FP8, LIMITS, ONE, is_table_divided=False)
    assert 1134 * MIB <= size.activation_bytes <= 1.3 * 928.77 * MIB


def test_buffers_are_those_of_the_logged_engine_with_4096_sequences():
    limits = replace(LIMITS, max_batch_size=4096)
    (size,) = rank_sizes(LLAMA_2_7B, FP8, limits, ONE, is_table_divided=False)
    assert size.buffer_bytes - CONTEXT_BYTES == pytest.approx((1.14 + 4.35) * GIB, rel=0.02)


def test_what_is_free_is_that_of_the_logged_engine_within_a_gibibyte():
    found = sized("NVIDIA-H100-80GB-HBM3", LLAMA_2_7B, FP8, max_batch_size=128).asked
    assert found is not None
    assert 70.48 * GIB * KV_CACHE_FRACTION - GIB < found.kv_bytes <= 70.48 * GIB * KV_CACHE_FRACTION


@pytest.mark.parametrize(
    ("nvidia_smi_mib", "cuda_mib"),
    [(81559, 80998), (81920, 81152), (143771, 143155), (183359, 182642), (23028, 22559)],
)
def test_the_drivers_part_covers_what_is_known(nvidia_smi_mib: int, cuda_mib: int):
    driver_mib = min(nvidia_smi_mib * DRIVER_FRACTION, DRIVER_MOST_BYTES / MIB)
    assert nvidia_smi_mib - cuda_mib <= driver_mib


# --- bytes


def test_unquantized_weights_are_the_parameters_times_their_width():
    for shape in (LLAMA_2_7B, GPT2, LLAMA_3_70B):
        assert model_bytes(shape, FP16) == 2 * shape.num_parameters
        assert model_bytes(shape, replace(FP16, dtype="float32")) == 4 * shape.num_parameters


@pytest.mark.parametrize(
    ("weights", "bytes_per_linear"),
    [("int8", 1), ("int8_sq", 1), ("fp8", 1), ("int4", 0.5), ("int4_awq", 0.5 + 2 / 128), ("nvfp4", 0.5 + 1 / 16)],
)
def test_quantization_takes_the_linear_layers_and_leaves_the_tables(weights: str, bytes_per_linear: float):
    tables = 2 * LLAMA_2_7B.parameters["embedding"] * 2
    linear = LLAMA_2_7B.parameters["attention"] + LLAMA_2_7B.parameters["mlp"]
    found = model_bytes(LLAMA_2_7B, replace(FP16, weights=weights))
    assert found == pytest.approx(tables + linear * bytes_per_linear, rel=0.002)


@pytest.mark.parametrize(
    ("shape", "kv_bytes"),
    [(LLAMA_2_7B, 524_288), (LLAMA_3_8B, 131_072), (LLAMA_3_70B, 327_680), (GPT2, 36_864)],
)
def test_kv_bytes_per_token_are_the_published_ones(shape: ModelShape, kv_bytes: int):
    assert kv_bytes_per_token(shape, FP16) == kv_bytes
    assert kv_bytes_per_token(shape, replace(FP16, kv_cache="fp8")) * 2 == kv_bytes


# --- ranks


def ranks(shape: ModelShape, layout: Layout, *, divided: bool = False, precision: Precision = FP16) -> list[int]:
    found = rank_sizes(shape, precision, LIMITS, layout, is_table_divided=divided)
    return [size.weight_bytes for size in found]


def test_one_rank_holds_the_model():
    assert ranks(LLAMA_3_8B, ONE) == [model_bytes(LLAMA_3_8B, FP16)]
    assert ranks(GPT2, ONE) == [model_bytes(GPT2, FP16)]  # the tied table once


def test_layers_that_do_not_divide_go_to_the_first_stages():
    assert stages(12, 5) == [3, 3, 2, 2, 2]
    assert stages(80, 3) == [27, 27, 26]
    assert stages(12, 12) == [1] * 12


def test_pipeline_stages_hold_the_layers_and_the_ends_hold_the_tables():
    first, last = ranks(LLAMA_2_7B, Layout(tp=1, pp=2))
    table = 32000 * 4096 * 2
    assert first - table == last - table - 4096 * 2  # the last norm
    assert first + last == model_bytes(LLAMA_2_7B, FP16)
    assert sum(ranks(GPT2, Layout(tp=1, pp=3))) == model_bytes(GPT2, FP16) + 50257 * 768 * 2  # a table at each end


def test_tensor_parallel_ranks_share_all_but_norms_and_the_whole_embedding():
    norms, table = 65 * 4096 * 2, 32000 * 4096 * 2
    shared = model_bytes(LLAMA_2_7B, FP16) - norms - table
    assert ranks(LLAMA_2_7B, Layout(tp=4, pp=1)) == [norms + table + shared // 4]
    assert ranks(LLAMA_2_7B, Layout(tp=4, pp=1), divided=True) == [norms + (table + shared) // 4]


def test_an_uneven_vocabulary_is_padded():
    table = 768 * 2
    whole = ranks(GPT2, Layout(tp=2, pp=1))[0]
    divided = ranks(GPT2, Layout(tp=2, pp=1), divided=True)[0]
    assert whole - divided == 50257 * table  # replaced by half of it, which the head then shares


def test_more_ranks_than_kv_heads_hold_copies():
    kv = 2 * 1024 * 4096 * 32 * 2  # of the 8 KV heads, all layers
    by_8 = ranks(LLAMA_3_8B, Layout(tp=8, pp=1))[0]
    by_16 = ranks(LLAMA_3_8B, Layout(tp=16, pp=1))[0]
    norms, table = 65 * 4096 * 2, 128256 * 4096 * 2
    assert (by_16 - norms - table - kv // 8) * 2 == by_8 - norms - table - kv // 8
    per_token = [
        rank_sizes(LLAMA_3_8B, FP16, LIMITS, Layout(tp=tp, pp=1), is_table_divided=False)[0].kv_bytes_per_token
        for tp in (1, 2, 8, 16, 32)
    ]
    assert per_token == [131072, 65536, 16384, 16384, 16384]


# --- layouts


@pytest.mark.parametrize(
    ("shape", "legal"),
    [
        (GPT2, [1, 2, 3, 4, 6, 12]),
        (LLAMA_3_8B, [1, 2, 4, 8, 16, 32]),
        (shape_of(num_attention_heads=28, hidden_size=3584, num_key_value_heads=4, intermediate_size=18944), [1, 2, 4]),
        (
            shape_of(num_attention_heads=12, hidden_size=768, num_key_value_heads=4, intermediate_size=3072),
            [1, 2, 4, 12],
        ),
        (shape_of("Gemma3ForCausalLM", num_attention_heads=4, num_key_value_heads=1), [1, 2, 4]),
        (shape_of("MixtralForCausalLM"), [1, 2, 4, 8, 16, 32]),
    ],
)
def test_legal_tensor_parallel(shape: ModelShape, legal: list[int]):
    assert legal_tensor_parallel(shape) == legal


def test_awq_needs_whole_groups_on_every_rank():
    assert legal_tensor_parallel(GPT2, "int4_awq") == [1, 2, 3, 6]  # 768 columns in groups of 128


@pytest.mark.parametrize(
    ("shape", "layout", "weights", "sentence"),
    [
        (
            GPT2,
            Layout(tp=5, pp=1),
            "none",
            "--tp 5 does not divide the 12 attention heads of 'gpt2'; use 1, 2, 3, 4, 6 or 12",
        ),
        (
            shape_of(num_attention_heads=12, hidden_size=768, num_key_value_heads=4, intermediate_size=3072),
            Layout(tp=6, pp=1),
            "none",
            "--tp 6 neither divides the 4 KV heads nor is a multiple of them, in the attention of 'gpt2'; "
            "use 1, 2, 4 or 12",
        ),
        (
            shape_of(intermediate_size=11000),
            Layout(tp=16, pp=1),
            "none",
            "--tp 16 does not divide the MLP width, 11000, of 'gpt2'; use 1, 2, 4 or 8",
        ),
        (
            GPT2,
            Layout(tp=4, pp=1),
            "int4_awq",
            "--tp 4 gives each rank 192 of the width of attention, no whole groups of 128 for int4_awq, of 'gpt2'; "
            "use 1, 2, 3 or 6",
        ),
        (GPT2, Layout(tp=1, pp=13), "none", "--pp 13 is more than the 12 layers of 'gpt2'; use at most 12"),
    ],
)
def test_what_cannot_be_divided_is_one_sentence(shape: ModelShape, layout: Layout, weights: str, sentence: str):
    with pytest.raises(UsageError) as caught:
        check_layout(shape, layout, "gpt2", weights)
    assert str(caught.value) == sentence


def test_what_divides_unevenly_is_noted():
    assert check_layout(GPT2, Layout(tp=2, pp=5), "gpt2") == [
        "--pp 5 does not divide the 12 layers, so its stages have 3, 3, 2, 2, 2; 1, 2, 3, 4, 6 or 12 would",
        "--tp 2 does not divide the vocabulary of 50257, so the head is padded to 50258",
    ]
    assert check_layout(LLAMA_3_8B, Layout(tp=16, pp=2), "llama") == [
        "--tp 16 is more than the 8 KV heads, so 2 ranks hold the KV cache of the same head"
    ]
    assert check_layout(LLAMA_3_8B, Layout(tp=4, pp=2), "llama") == []


def test_layouts_come_with_the_fewest_gpus_and_the_most_tensor_parallel_first():
    assert [str(layout) for layout in layouts(LLAMA_3_8B)] == [
        "1x1",
        "2x1",
        "1x2",
        "4x1",
        "2x2",
        "1x4",
        "8x1",
        "4x2",
        "2x4",
        "1x8",
    ]
    assert [str(layout) for layout in layouts(GPT2, most_gpus=3)] == ["1x1", "2x1", "1x2", "3x1", "1x3"]


# --- does it fit


@pytest.mark.parametrize(
    ("product", "shape", "precision", "recommended"),
    [
        ("NVIDIA-A10G", GPT2, FP16, "1x1"),
        ("NVIDIA-A10G", LLAMA_3_8B, FP16, "1x1"),
        ("NVIDIA-L4", LLAMA_3_70B, FP16, "8x1"),
        ("NVIDIA-L4", LLAMA_3_70B, FP8, "4x1"),
        ("NVIDIA-A100-SXM4-80GB", LLAMA_3_70B, FP16, "2x1"),
        ("NVIDIA-H100-80GB-HBM3", LLAMA_3_70B, FP8, "1x1"),
        ("NVIDIA-H200", LLAMA_3_70B, FP16, "1x1"),
    ],
)
def test_the_smallest_layout_that_fits(product: str, shape: ModelShape, precision: Precision, recommended: str):
    found = sized(product, shape, precision).recommended
    assert found is not None and str(found.layout) == recommended


def test_nothing_fits_where_the_model_is_too_big():
    huge = shape_of(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128)
    found = sized("NVIDIA-A10G", huge)
    assert found.recommended is None and found.recommended_for_all is None
    assert found.asked is not None
    assert (found.asked.fits, found.asked.kv_bytes, found.asked.tokens, found.asked.sequences) == (False, 0, 0, 0)


def test_a_refused_gpu_has_no_sizes():
    found = sized("Tesla-T4", GPT2)
    assert found.refusal is not None and "needs 8.0" in found.refusal
    assert (found.asked, found.recommended, found.fits) == (None, None, ())


def test_the_parts_add_up_to_the_gpus_memory():
    found = sized("NVIDIA-A10G", LLAMA_3_8B).asked
    assert found is not None
    taken = found.weight_bytes + found.activation_bytes + found.reserve_bytes + found.kv_bytes / KV_CACHE_FRACTION
    assert taken == pytest.approx(23028 * MIB, abs=10)


def test_sequences_take_whole_blocks():
    found = sized("NVIDIA-A10G", GPT2, max_seq_len=33, max_input_len=32).asked
    assert found is not None
    assert found.sequences == found.tokens // TOKENS_PER_BLOCK // 2


def test_the_recommendation_for_all_holds_all():
    found = sized("NVIDIA-A10G", LLAMA_3_8B, max_seq_len=8192)
    assert found.recommended is not None and not found.recommended.holds_all
    assert found.recommended_for_all is not None
    assert found.recommended_for_all.sequences >= 16
    assert found.recommended_for_all.layout.gpus > found.recommended.layout.gpus


def fit_of(shape: ModelShape, precision: Precision, memory_mib: int, layout: Layout, limits: EngineLimits) -> Fit:
    gpu = replace(find_product("NVIDIA-H100-80GB-HBM3"), memory_mib=memory_mib)
    return fit(gpu, layout, rank_sizes(shape, precision, limits, layout, is_table_divided=False), limits)


@given(
    memory_mib=st.integers(1000, 300_000), more_mib=st.integers(0, 100_000), layout=st.sampled_from([*layouts(GPT2)])
)
def test_more_memory_never_holds_less(memory_mib: int, more_mib: int, layout: Layout):
    for shape in (GPT2, LLAMA_3_8B):
        if layout.tp in legal_tensor_parallel(shape):
            less = fit_of(shape, FP16, memory_mib, layout, LIMITS)
            more = fit_of(shape, FP16, memory_mib + more_mib, layout, LIMITS)
            assert less.tokens <= more.tokens and less.sequences <= more.sequences


@given(
    memory_mib=st.integers(1000, 300_000),
    length=st.integers(2, 100_000),
    longer=st.integers(0, 10_000),
    batch=st.integers(1, 500),
    larger=st.integers(0, 500),
)
def test_longer_and_more_sequences_never_leave_more_room(
    memory_mib: int, length: int, longer: int, batch: int, larger: int
):
    base = EngineLimits(max_batch_size=batch, max_input_len=1, max_seq_len=length)
    found = fit_of(LLAMA_3_8B, FP16, memory_mib, ONE, base)
    assert fit_of(LLAMA_3_8B, FP16, memory_mib, ONE, replace(base, max_seq_len=length + longer)).sequences <= (
        found.sequences
    )
    assert (
        fit_of(LLAMA_3_8B, FP16, memory_mib, ONE, replace(base, max_batch_size=batch + larger)).tokens <= found.tokens
    )


@given(layers=st.integers(1, 40), more=st.integers(0, 40), tp=st.sampled_from([1, 2, 4, 8]))
def test_more_layers_never_take_less(layers: int, more: int, tp: int):
    small = rank_sizes(shape_of(num_hidden_layers=layers), FP16, LIMITS, Layout(tp=tp, pp=1), is_table_divided=False)
    large = rank_sizes(
        shape_of(num_hidden_layers=layers + more), FP16, LIMITS, Layout(tp=tp, pp=1), is_table_divided=False
    )
    assert small[0].weight_bytes <= large[0].weight_bytes
    assert small[0].kv_bytes_per_token <= large[0].kv_bytes_per_token


@pytest.mark.parametrize("shape", [GPT2, LLAMA_2_7B, LLAMA_3_8B, LLAMA_3_70B, shape_of("MixtralForCausalLM")])
def test_more_ranks_never_hold_more_each(shape: ModelShape):
    for pp in (1, 2):
        by_ranks = [max(ranks(shape, Layout(tp=tp, pp=pp))) for tp in legal_tensor_parallel(shape) if tp > 1 or pp > 1]
        assert by_ranks == sorted(by_ranks, reverse=True)


@pytest.mark.parametrize("gpu", USABLE, ids=lambda gpu: gpu.product)
def test_fewer_bits_never_hold_less(gpu: Any):
    def tokens(weights: str, kv_cache: str = "float16") -> int:
        precision = Precision(dtype="float16", weights=weights, kv_cache=kv_cache)
        return fit_of(LLAMA_3_8B, precision, gpu.memory_mib, ONE, LIMITS).tokens

    assert tokens("none") < tokens("int8") <= tokens("fp8") < tokens("int4_awq") <= tokens("int4")
    assert tokens("none") < tokens("none", "fp8")


# --- checkpoints that are quantized already


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        (None, None),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "int4_awq"),
        ({"quant_method": "gptq", "bits": 4}, "int4_gptq"),
        ({"quant_method": "gptq", "bits": 8}, "unknown"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "fbgemm_fp8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({"quant_method": "bitsandbytes"}, "unknown"),
    ],
)
def test_the_format_of_a_quantized_checkpoint(quantization: dict[str, Any] | None, name: str | None):
    assert checkpoint_format({"quantization_config": quantization}) == name


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        (None, None),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": None}, None),
        ({"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "fp8"),
        ({"quant_method": "awq", "bits": 4}, None),
    ],
)
def test_the_kv_cache_of_a_quantized_checkpoint(quantization: dict[str, Any] | None, name: str | None):
    assert checkpoint_kv_cache({"quantization_config": quantization}) == name


# --- the fact sheet of TensorRT-LLM 1.2.1


@pytest.mark.skipif(not FACTS.is_file(), reason="the fact sheets are not here")
@pytest.mark.parametrize(
    ("name", "parameter", "value"),
    [
        ("KvCacheConfig", "free_gpu_memory_fraction", KV_CACHE_FRACTION),
        ("KvCacheConfig", "tokens_per_block", TOKENS_PER_BLOCK),
        ("PluginConfig", "tokens_per_block", TOKENS_PER_BLOCK),
        ("BuildConfig", "max_num_tokens", MAX_NUM_TOKENS),
        ("Mapping", "gpus_per_node", MOST_GPUS),
        ("QuantConfig", "group_size", WEIGHT_FORMATS["int4_awq"].group),
    ],
)
def test_defaults_are_those_of_the_fact_sheet(name: str, parameter: str, value: float):
    parameters = json.loads(FACTS.read_text())[name]["params"]
    (default,) = [each["default"] for each in parameters if each["name"] == parameter]
    assert default == value
