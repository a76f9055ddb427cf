"""Parameters and KV cache of config.json, compared with models and caches that transformers makes."""

from __future__ import annotations

from typing import Any

import pytest
from errors import CheckpointError, UnsupportedError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_shape import ARCHITECTURES, ModelShape, model_shape


def shape_of(architecture: str, **config: Any) -> ModelShape:
    return model_shape({"architectures": [architecture], **config}, "a-model")


def transformers_config(architecture: str, config: dict[str, Any]) -> Any:
    import transformers

    return getattr(transformers, architecture).config_class(**config)


def made_by_transformers(architecture: str, config: dict[str, Any]) -> int:
    """The number of parameters of the real class, on the meta device."""
    import torch
    import transformers
    from transformers.modeling_utils import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = getattr(transformers, architecture)(transformers_config(architecture, config))
        model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


# --- published totals


LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
PUBLISHED = [
    ("gpt2", "GPT2LMHeadModel", {}, 124_439_808),
    ("gpt2-medium", "GPT2LMHeadModel", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, 354_823_168),
    ("gpt2-xl", "GPT2LMHeadModel", {"n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
    ("opt-125m", "OPTForCausalLM", {}, 125_239_296),
    (
        "opt-350m",
        "OPTForCausalLM",
        {
            "hidden_size": 1024,
            "ffn_dim": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "word_embed_proj_dim": 512,
            "do_layer_norm_before": False,
        },
        331_196_416,
    ),
    ("Llama-2-7b", "LlamaForCausalLM", {}, 6_738_415_616),
    (
        "Llama-2-70b",
        "LlamaForCausalLM",
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
        68_976_648_192,
    ),
    ("Llama-3.1-8B", "LlamaForCausalLM", LLAMA_3 | {"intermediate_size": 14336}, 8_030_261_248),
    (
        "Llama-3.2-1B",
        "LlamaForCausalLM",
        LLAMA_3
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
        1_235_814_400,
    ),
    ("Mistral-7B-v0.1", "MistralForCausalLM", {}, 7_241_732_096),
    ("Mixtral-8x7B-v0.1", "MixtralForCausalLM", {}, 46_702_792_704),
    (
        "Qwen2.5-7B",
        "Qwen2ForCausalLM",
        {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        7_615_616_512,
    ),
    (
        "Qwen2.5-0.5B",
        "Qwen2ForCausalLM",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        494_032_768,
    ),
    (
        "Qwen3-8B",
        "Qwen3ForCausalLM",
        {"intermediate_size": 12288, "num_hidden_layers": 36, "num_key_value_heads": 8},
        8_190_735_360,
    ),
    (
        "Qwen3-30B-A3B",
        "Qwen3MoeForCausalLM",
        {"head_dim": 128, "num_hidden_layers": 48},
        30_532_122_624,
    ),
    ("Qwen1.5-MoE-A2.7B", "Qwen2MoeForCausalLM", {}, 14_315_784_192),
    ("gemma-7b", "GemmaForCausalLM", {}, 8_537_680_896),
    (
        "gemma-2-9b",
        "Gemma2ForCausalLM",
        {
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
        },
        9_241_705_984,
    ),
    (
        "gemma-3-1b",
        "Gemma3ForCausalLM",
        {
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
        },
        999_885_952,
    ),
    ("Phi-3-mini", "Phi3ForCausalLM", {}, 3_821_079_552),
]


@pytest.mark.parametrize(("name", "architecture", "config", "total"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_the_published_totals(name: str, architecture: str, config: dict[str, Any], total: int):
    assert shape_of(architecture, **config).num_parameters == total


# --- odd configurations, each compared with transformers


SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SMALL_GPT2 = {"vocab_size": 97, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 6}
SMALL_OPT = {
    "vocab_size": 97,
    "hidden_size": 48,
    "ffn_dim": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
SMALL_MOE = SMALL | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ODD_GENERAL = [{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"num_key_value_heads": 6}]
ODD_HEADS = [{"head_dim": 20}, {"num_key_value_heads": 1, "head_dim": 7}]
ODD_BIAS = [{"attention_bias": True}, {"attention_bias": True, "head_dim": 10}]
ODD: dict[str, list[dict[str, Any]]] = {
    "GPT2LMHeadModel": [
        SMALL_GPT2,
        SMALL_GPT2 | {"n_inner": 77},
        SMALL_GPT2 | {"tie_word_embeddings": False},
        SMALL_GPT2 | {"hidden_size": 36, "num_hidden_layers": 1},
    ],
    "OPTForCausalLM": [
        SMALL_OPT,
        SMALL_OPT | {"word_embed_proj_dim": 20},
        SMALL_OPT | {"word_embed_proj_dim": 20, "tie_word_embeddings": False},
        SMALL_OPT | {"do_layer_norm_before": False},
        SMALL_OPT | {"_remove_final_layer_norm": True},
        SMALL_OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False},
    ],
    "LlamaForCausalLM": [
        *(SMALL | odd for odd in (*ODD_GENERAL, *ODD_HEADS, *ODD_BIAS)),
        SMALL | {"mlp_bias": True},
        SMALL | {"num_key_value_heads": None, "head_dim": None},
    ],
    "MistralForCausalLM": [*(SMALL | odd for odd in (*ODD_GENERAL, *ODD_HEADS)), SMALL | {"sliding_window": None}],
    "MixtralForCausalLM": [
        *(SMALL | odd for odd in (*ODD_GENERAL, *ODD_HEADS)),
        SMALL | {"num_local_experts": 3, "num_experts_per_tok": 1},
    ],
    "Qwen2ForCausalLM": [
        *(SMALL | odd for odd in (*ODD_GENERAL, *ODD_HEADS)),
        SMALL | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ],
    "Qwen2MoeForCausalLM": [
        *(SMALL_MOE | {"shared_expert_intermediate_size": 28} | odd for odd in ODD_GENERAL),
        SMALL_MOE | {"decoder_sparse_step": 2, "qkv_bias": False},
        SMALL_MOE | {"mlp_only_layers": [0, 2]},
    ],
    "Qwen3ForCausalLM": [SMALL | odd for odd in (*ODD_GENERAL, *ODD_HEADS, *ODD_BIAS)],
    "Qwen3MoeForCausalLM": [
        *(SMALL_MOE | odd for odd in (*ODD_GENERAL, *ODD_HEADS, *ODD_BIAS)),
        SMALL_MOE | {"decoder_sparse_step": 3},
        SMALL_MOE | {"mlp_only_layers": [1], "shared_expert_intermediate_size": 28},
    ],
    "GemmaForCausalLM": [SMALL | odd for odd in (*ODD_GENERAL, *ODD_HEADS, *ODD_BIAS)],
    "Gemma2ForCausalLM": [SMALL | odd for odd in (*ODD_GENERAL, *ODD_HEADS, *ODD_BIAS)],
    "Gemma3ForCausalLM": [SMALL | odd for odd in (*ODD_GENERAL, *ODD_HEADS, *ODD_BIAS)],
    "Phi3ForCausalLM": [SMALL | odd | {"pad_token_id": 0} for odd in (*ODD_GENERAL, *ODD_HEADS)],
}


def test_every_architecture_is_compared():
    assert set(ODD) == set(ARCHITECTURES) == {row[1] for row in PUBLISHED}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_odd_configurations_have_the_parameters_of_transformers(architecture: str):
    for config in ODD[architecture]:
        assert shape_of(architecture, **config).num_parameters == made_by_transformers(architecture, config), config


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_config_json_leaves_out_is_what_transformers_takes(architecture: str):
    config = transformers_config(architecture, {}).to_dict()
    family = ARCHITECTURES[architecture]
    for key, value in family.defaults.items():
        if key == "head_dim" and value is None:
            assert config.get(key) in (None, config["hidden_size"] // config["num_attention_heads"])
        elif value is None and key in ("num_key_value_heads", "word_embed_proj_dim"):
            assert config[key] in (None, config["num_attention_heads"], config["hidden_size"])
        elif key == "sliding_window" and config.get("use_sliding_window") is False:
            assert config[key] is None  # of no effect until use_sliding_window says so
        else:
            assert config[key] == value, key


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_configuration_has_the_parameters_of_transformers(data: st.DataObject):
    architecture = data.draw(st.sampled_from(sorted(ARCHITECTURES)))
    kv_heads = data.draw(st.integers(1, 3))
    heads = kv_heads * data.draw(st.integers(1, 3))
    sizes = {
        "vocab_size": data.draw(st.integers(2, 300)),
        "hidden_size": heads * 2 * data.draw(st.integers(1, 9)),
        "num_hidden_layers": data.draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "max_position_embeddings": data.draw(st.integers(1, 99)),
        "tie_word_embeddings": data.draw(st.booleans()),
        "pad_token_id": 0,
    }
    if architecture == "GPT2LMHeadModel":
        sizes["n_inner"] = data.draw(st.none() | st.integers(1, 99))
    elif architecture == "OPTForCausalLM":
        sizes |= {"ffn_dim": data.draw(st.integers(1, 99)), "word_embed_proj_dim": data.draw(st.integers(1, 99))}
    else:
        sizes |= {"num_key_value_heads": kv_heads, "intermediate_size": data.draw(st.integers(1, 99))}
        if "experts" in str(ARCHITECTURES[architecture].defaults):
            sizes |= {"moe_intermediate_size": data.draw(st.integers(1, 40)), "num_experts_per_tok": 1}
            sizes |= {name: data.draw(st.integers(1, 4)) for name in ("num_experts", "num_local_experts")}
    assert shape_of(architecture, **sizes).num_parameters == made_by_transformers(architecture, sizes)


def test_components_add_up_and_a_tied_table_counts_once():
    shape = shape_of("GPT2LMHeadModel")
    assert sum(shape.parameters.values()) == shape.num_parameters
    assert shape.parameters["embedding"] == 50257 * 768 and shape.parameters["head"] == 0
    assert shape_of("GPT2LMHeadModel", tie_word_embeddings=False).parameters["head"] == 50257 * 768


# --- the KV cache


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kv_cache_has_the_shape_of_a_real_one(architecture: str):
    import torch
    import transformers

    for odd in ODD[architecture]:
        if odd.get("head_dim", 8) and odd.get("head_dim", 8) % 2:
            continue  # rotary positions take halves
        if odd.get("layer_norm_elementwise_affine") is False:
            continue  # transformers makes such a model, and cannot fill it with numbers
        torch.manual_seed(0)
        model = getattr(transformers, architecture)(transformers_config(architecture, odd)).eval()
        cache = transformers.DynamicCache()
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3, 4, 5]]), past_key_values=cache, use_cache=True)
        numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
        shape = shape_of(architecture, **odd)
        assert numbers == 5 * shape.num_layers * shape.kv_numbers_per_token_and_layer, odd


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("MistralForCausalLM", SMALL),
        ("MistralForCausalLM", SMALL | {"sliding_window": None}),
        ("MixtralForCausalLM", SMALL),
        ("Phi3ForCausalLM", SMALL | {"sliding_window": 9, "pad_token_id": 0}),
        ("Qwen2ForCausalLM", SMALL),
        ("Qwen2ForCausalLM", SMALL | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
        ("Qwen3ForCausalLM", SMALL | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
        ("Qwen3MoeForCausalLM", SMALL_MOE | {"use_sliding_window": True, "sliding_window": 9}),
        ("Gemma2ForCausalLM", SMALL),
        ("Gemma2ForCausalLM", SMALL | {"num_hidden_layers": 4, "sliding_window": 9}),
        ("Gemma3ForCausalLM", SMALL | {"num_hidden_layers": 13}),
        ("Gemma3ForCausalLM", SMALL | {"num_hidden_layers": 7, "sliding_window_pattern": 3}),
        ("Gemma3ForCausalLM", SMALL | {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}),
    ],
)
def test_layers_with_a_window_are_those_of_a_real_cache(architecture: str, config: dict[str, Any]):
    from transformers import DynamicCache

    made = transformers_config(architecture, config)
    sliding = [layer for layer in DynamicCache(config=made).layers if getattr(layer, "is_sliding", False)]
    shape = shape_of(architecture, **config)
    assert shape.sliding_layers == len(sliding)
    assert shape.window == (made.sliding_window if sliding else None)


# --- what cannot be read


def test_an_unknown_architecture_is_one_sentence():
    with pytest.raises(UnsupportedError) as caught:
        shape_of("FalconForCausalLM")
    assert str(caught.value).startswith(
        "'a-model' is a FalconForCausalLM, whose tensors are not known here; sizes can be planned for GPT2LMHeadModel, "
    )


@pytest.mark.parametrize(
    ("architecture", "config", "sentence"),
    [
        (
            "LlamaForCausalLM",
            {"hidden_size": "big"},
            "config.json of 'a-model' has hidden_size 'big'; a LlamaForCausalLM needs a whole number of 1 or more "
            "there",
        ),
        (
            "GPT2LMHeadModel",
            {"n_layer": 0},
            "config.json of 'a-model' has n_layer 0; a GPT2LMHeadModel needs a whole number of 1 or more there",
        ),
        (
            "LlamaForCausalLM",
            {"num_attention_heads": 32, "num_key_value_heads": 5},
            "config.json of 'a-model' has 32 attention heads for 5 KV heads, which does not divide; "
            "choose an undamaged checkpoint",
        ),
        (
            "OPTForCausalLM",
            {"hidden_size": 100, "num_attention_heads": 12},
            "config.json of 'a-model' has hidden_size 100 for 12 heads, which does not divide; "
            "choose an undamaged checkpoint",
        ),
    ],
)
def test_damaged_values_are_one_sentence(architecture: str, config: dict[str, Any], sentence: str):
    with pytest.raises(CheckpointError) as caught:
        shape_of(architecture, **config)
    assert str(caught.value) == sentence
