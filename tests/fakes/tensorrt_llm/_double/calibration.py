"""Quantization with calibration data, as far as others notice: what is refused, and which files it leaves.

The weights stay as exact as they were; only their names and shapes are the library's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ..mapping import Mapping
from . import checkpoints, machine
from .records import QuantAlgo, QuantConfig

_MODELOPT = (
    QuantAlgo.FP8,
    QuantAlgo.NVFP4,
    QuantAlgo.W4A16_AWQ,
    QuantAlgo.W4A8_AWQ,
    QuantAlgo.W8A8_SQ_PER_CHANNEL,
    QuantAlgo.MIXED_PRECISION,
)
_NOT_CALIBRATED = (QuantAlgo.W8A16, QuantAlgo.W4A16, QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN)
_AWQ = (QuantAlgo.W4A16_AWQ, QuantAlgo.W4A8_AWQ)
_LEAST_SM = {QuantAlgo.FP8: 89, QuantAlgo.W4A8_AWQ: 89, QuantAlgo.NVFP4: 100}


def quantize(
    hf_model_dir: str,
    output_dir: str,
    *,
    dtype: str,
    mapping: Mapping,
    quant_config: QuantConfig,
    class_name: str,
    is_native_possible: bool,
    device: str,
    calib_dataset: str,
    calib_batches: int,
) -> None:
    algorithm, kv_algorithm = quant_config.quant_algo, quant_config.kv_cache_quant_algo
    if mapping.moe_ep_size > 1:
        raise NotImplementedError("Quantization for expert parallelism is not supported")
    if kv_algorithm is None and (algorithm is None or algorithm in _NOT_CALIBRATED):
        raise ValueError(
            f"The quant_config ({quant_config}) does not require calibration, "
            f"try {class_name}.from_hugging_face instead."
        )
    is_modelopt = algorithm in _MODELOPT or (algorithm is None and kv_algorithm == QuantAlgo.FP8)
    if not is_modelopt:
        if not is_native_possible:
            raise NotImplementedError(f"{class_name} has no native quantization of {algorithm}")
        assert mapping.rank == 0, "quantize() should be called at rank 0"
    export(
        hf_model_dir,
        output_dir,
        dtype=dtype,
        mapping=mapping,
        quant_config=quant_config,
        device=device,
        calib_dataset=calib_dataset,
        calib_batches=calib_batches,
    )


def export(
    hf_model_dir: str,
    output_dir: str,
    *,
    dtype: str,
    mapping: Mapping,
    quant_config: QuantConfig,
    device: str,
    calib_dataset: str,
    calib_batches: int,
) -> None:
    """What ModelOpt does, without asking whether it has to."""
    algorithm = quant_config.quant_algo
    gpus = machine.visible_gpus()
    if not gpus:
        raise OSError("GPU is required for inference.")
    if gpus[0].sm < _LEAST_SM.get(algorithm, 0):
        raise RuntimeError(f"{algorithm} needs SM {_LEAST_SM[algorithm]} or newer, this GPU is SM {gpus[0].sm}")
    hf_config = checkpoints.read_config(hf_model_dir)
    weights = checkpoints.read_weights(hf_model_dir)
    if device == "cuda":
        machine.allocate(checkpoints.num_bytes(weights), gpus[0])  # the whole model, whatever the layout
    _read_samples(calib_dataset, calib_batches)
    _write(output_dir, hf_config, weights, checkpoints.engine_dtype(hf_config, dtype), mapping, quant_config)


def _read_samples(name: str, count: int) -> list[str]:
    folder = Path(name)
    if "cnn_dailymail" in name or "pileval" in name or not folder.is_dir():
        if "cnn_dailymail" not in name and "pileval" not in name:
            raise NotImplementedError(f"Unsupported dataset name or local repo directory: {name}.")
        if not folder.is_dir() and not machine.settings().get("has_network"):
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub (ConnectionError)")
    column = "article" if "cnn_dailymail" in name else "text"
    if not folder.is_dir():
        return ["a sample"] * count
    # What datasets.load_dataset makes of a folder: files whose names begin with the split's.
    files = sorted([*folder.glob("train*.json*"), *folder.glob("data/train*.json*"), *folder.glob("train/*.json*")])
    if not files:
        raise ValueError(f'Unknown split "train" in {name}; the double reads JSON lines only')
    samples = [json.loads(line)[column] for line in files[0].read_text().splitlines() if line.strip()]
    if not samples or not all(isinstance(sample, str) for sample in samples):
        raise ValueError(f"{files[0]} must have a text in the column {column!r} of every row")
    return samples[:count]


def _write(
    output_dir: str,
    hf_config: dict[str, Any],
    weights: checkpoints.Weights,
    dtype: str,
    mapping: Mapping,
    quant_config: QuantConfig,
) -> None:
    from ..models.modeling_utils import PretrainedConfig

    dtype = "float16" if dtype == "float32" else dtype
    described = checkpoints.describe(hf_config)
    config = PretrainedConfig(**described, dtype=dtype, mapping=mapping, quantization=quant_config)
    for width in (config.hidden_size, config.intermediate_size, config.num_attention_heads):
        assert width % mapping.tp_size == 0, f"Weights with shape {width} cannot be split into {mapping.tp_size} ranks."
    if quant_config.quant_algo in _AWQ:
        block = quant_config.group_size
        for width in (config.hidden_size // mapping.tp_size, config.intermediate_size // mapping.tp_size):
            if width % block:
                raise NotImplementedError(f"Weight shape {width} is not divisible for block size {block}.")
        weights, config.vocab_size = _pad_vocabulary(weights, config.vocab_size)
    config.quantization.has_zero_point = False
    config.quantization.pre_quant_scale = quant_config.quant_algo in _AWQ
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    config.to_json_file(f"{output_dir}/config.json")
    if quant_config.quant_algo == QuantAlgo.MIXED_PRECISION:
        Path(output_dir, "quant_cfg.json").write_text(json.dumps({"quant_algo": "MIXED_PRECISION"}))
    for one in config.for_each_rank():
        part = checkpoints.part_of_rank(checkpoints.convert(weights, dtype), one, one.mapping)
        save_file(part, f"{output_dir}/rank{one.mapping.rank}.safetensors")


def _pad_vocabulary(weights: checkpoints.Weights, vocab_size: int) -> tuple[checkpoints.Weights, int]:
    padded = vocab_size + -vocab_size % 64
    names = ("wte.weight", "lm_head.weight", "embed_tokens.weight")
    return {
        name: np.pad(tensor, ((0, padded - vocab_size), (0, 0))) if name.endswith(names) else tensor
        for name, tensor in weights.items()
    }, padded
