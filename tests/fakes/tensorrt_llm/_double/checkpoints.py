"""Checkpoints in numpy: reading Hugging Face folders, and the part of the weights that a rank has.

GPT-2 becomes what TensorRT-LLM calls its tensors, cut as Megatron cuts them, so that a wrong mapping gives wrong text.
Other architectures keep their names, and are cut by the ends of these; the double builds them, but does not run them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..mapping import Mapping

Weights = dict[str, np.ndarray]

_DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "I8": np.int8, "U8": np.uint8}
_COLUMNS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight", "lm_head.weight")
_ROWS = ("o_proj.weight", "down_proj.weight")


def read_config(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "config.json").read_text())


def read_weights(folder: str) -> Weights:
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no *.safetensors; the double of TensorRT-LLM reads no other weights")
    weights: Weights = {}
    for file in files:
        weights.update(parse_safetensors(file.read_bytes()))
    return weights


def parse_safetensors(content: bytes) -> Weights:
    """Also bfloat16 and fp8, which safetensors.numpy does not read: as float32, and as bytes."""
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header.pop("__metadata__", None)
    return {name: _tensor(content[begin:], **entry) for name, entry in header.items()}


def _tensor(data: bytes, *, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    part = memoryview(data)[slice(*data_offsets)]
    if dtype == "BF16":
        return (np.frombuffer(part, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(part, _DTYPES.get(dtype, np.uint8)).reshape(shape)


def describe(hf_config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a PretrainedConfig, whatever the family calls them."""

    def first(*names: str, default: Any = None) -> Any:
        return next((hf_config[name] for name in names if hf_config.get(name) is not None), default)

    hidden_size = first("hidden_size", "n_embd", "d_model")
    num_heads = first("num_attention_heads", "n_head")
    return {
        "architecture": hf_config["architectures"][0],
        "hidden_size": hidden_size,
        "num_hidden_layers": first("num_hidden_layers", "n_layer"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": first("num_key_value_heads", default=num_heads),
        "head_size": first("head_dim", default=hidden_size // num_heads),
        "intermediate_size": first("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden_size),
        "vocab_size": hf_config["vocab_size"],
        "max_position_embeddings": first("max_position_embeddings", "n_positions"),
        "hidden_act": first("hidden_act", "activation_function", default="gelu"),
        "norm_epsilon": first("layer_norm_epsilon", "rms_norm_eps", default=1e-5),
        "position_embedding_type": "learned_absolute" if "n_positions" in hf_config else "rope_gpt_neox",
    }


def engine_dtype(hf_config: dict[str, Any], dtype: str) -> str:
    if dtype == "auto":
        dtype = hf_config.get("dtype") or hf_config.get("torch_dtype") or "float16"
        return "float16" if dtype == "float32" else dtype
    if dtype not in ("float16", "bfloat16", "float32"):
        raise KeyError(dtype)
    return dtype


def convert(weights: Weights, dtype: str) -> Weights:
    """Rounded to `dtype`. numpy has no bfloat16, so that is float32 with sixteen bits gone."""
    if dtype != "bfloat16":
        target = np.dtype(dtype)
        return {name: tensor.astype(target) if tensor.dtype.kind == "f" else tensor for name, tensor in weights.items()}
    return {
        name: (tensor.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
        if tensor.dtype.kind == "f"
        else tensor
        for name, tensor in weights.items()
    }


def check_layout(config: Any, mapping: Mapping) -> None:
    tp_size, num_kv_heads = mapping.tp_size, config.num_key_value_heads
    assert config.num_attention_heads % tp_size == 0, "num_attention_heads must be divisible by tp_size"
    assert num_kv_heads % tp_size == 0 or tp_size % num_kv_heads == 0, "num_kv_heads and tp_size do not divide"
    assert config.intermediate_size % tp_size == 0, "intermediate_size must be divisible by tp_size"
    # Not every uneven split fails in the library, but an engine with an empty stage, or a cut embedding, is no use.
    assert config.num_hidden_layers >= mapping.pp_size, "num_hidden_layers must not be less than pp_size"
    cut = config.use_parallel_embedding and config.embedding_sharding_dim == 0
    assert not cut or config.vocab_size % tp_size == 0, "vocab_size must be divisible by tp_size"


def part_of_rank(weights: Weights, config: Any, mapping: Mapping) -> Weights:
    check_layout(config, mapping)
    if config.architecture == "GPT2LMHeadModel":
        return _gpt2_part({name.removeprefix("transformer."): t for name, t in weights.items()}, config, mapping)
    return _other_part(weights, config, mapping)


def _gpt2_part(weights: Weights, config: Any, mapping: Mapping) -> Weights:
    part: Weights = {}
    size, rank = mapping.tp_size, mapping.tp_rank

    def cut(tensor: np.ndarray, axis: int = 0) -> np.ndarray:
        return np.split(tensor, size, axis)[rank]

    def cut_qkv(tensor: np.ndarray) -> np.ndarray:
        return np.concatenate([cut(third) for third in np.split(tensor, 3)])

    if mapping.is_first_pp_rank():
        for name, key in (("vocab_embedding", "wte"), ("position_embedding", "wpe")):
            table = weights[f"{key}.weight"]
            is_cut = config.use_parallel_embedding
            part[f"transformer.{name}.weight"] = cut(table, config.embedding_sharding_dim) if is_cut else table
    for index, layer in enumerate(mapping.pp_layers(config.num_hidden_layers)):
        for name, key in (("input_layernorm", "ln_1"), ("post_layernorm", "ln_2")):
            for kind in ("weight", "bias"):
                part[f"transformer.layers.{index}.{name}.{kind}"] = weights[f"h.{layer}.{key}.{kind}"]
        for name, key, cut_weight, cut_bias in (
            ("attention.qkv", "attn.c_attn", cut_qkv, cut_qkv),
            ("attention.dense", "attn.c_proj", lambda weight: cut(weight, 1), None),  # the bias is added once, to a sum
            ("mlp.fc", "mlp.c_fc", cut, cut),
            ("mlp.proj", "mlp.c_proj", lambda weight: cut(weight, 1), None),
        ):
            weight, bias = weights[f"h.{layer}.{key}.weight"].T, weights[f"h.{layer}.{key}.bias"]  # Conv1D: transposed
            part[f"transformer.layers.{index}.{name}.weight"] = cut_weight(weight)
            part[f"transformer.layers.{index}.{name}.bias"] = cut_bias(bias) if cut_bias else bias
    if mapping.is_last_pp_rank():
        part["transformer.ln_f.weight"], part["transformer.ln_f.bias"] = weights["ln_f.weight"], weights["ln_f.bias"]
        head = weights.get("lm_head.weight", weights["wte.weight"])
        missing = -len(head) % size
        part["lm_head.weight"] = cut(np.pad(head, ((0, missing), (0, 0))))
    return {name: np.ascontiguousarray(tensor) for name, tensor in part.items()}


def _other_part(weights: Weights, config: Any, mapping: Mapping) -> Weights:
    layers = set(mapping.pp_layers(config.num_hidden_layers))
    part: Weights = {}
    for name, tensor in weights.items():
        number = next((int(step) for step in name.split(".") if step.isdecimal()), None)
        if number is not None and number not in layers:
            continue
        axis = 0 if name.endswith(_COLUMNS) else 1 if name.endswith(_ROWS) else None
        if axis is not None and tensor.ndim == 2 and tensor.shape[axis] % mapping.tp_size == 0:
            tensor = np.split(tensor, mapping.tp_size, axis)[mapping.tp_rank]
        part[name] = np.ascontiguousarray(tensor)
    return part


def num_bytes(weights: Weights) -> int:
    return sum(tensor.nbytes for tensor in weights.values())
