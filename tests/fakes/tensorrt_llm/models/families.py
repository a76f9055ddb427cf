"""The model classes: which can be made from a Hugging Face folder, and which can only be scripted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._double import checkpoints, machine
from .._double.contract import ENTRIES, checked
from .._double.records import QuantAlgo, QuantConfig
from ..mapping import Mapping
from .modeling_utils import PretrainedConfig, PretrainedModel

_SUPPORT = ENTRIES["MODEL_MAP"]["from_hugging_face_support"]
_NEEDS_NO_SCALES = (None, QuantAlgo.W8A16, QuantAlgo.W4A16, QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN, QuantAlgo.NO_QUANT)
_GPT_VARIANTS = ("starcoder2", "starcoder", "santacoder", "gpt2", "persimmon", "fuyu", "kosmos-2", "jais", "nemotron")
_NOT_CONFIGURATION = {
    *("hf_model_or_dir", "dtype", "mapping", "quant_config", "load_model_on_cpu", "trust_remote_code"),
    *("is_prequantized_to_fp8", "load_by_shard", "quant_ckpt_path", "use_autoawq"),
}


def load(cls: type[PretrainedModel], arguments: dict[str, Any]) -> PretrainedModel:
    """What from_hugging_face does: read, check, cut out the rank's part."""
    folder = arguments["hf_model_or_dir"]
    is_folder = isinstance(folder, str)
    hf_config = checkpoints.read_config(folder) if is_folder else folder.config.to_dict()
    mapping = arguments["mapping"] or Mapping()
    quant_config = arguments["quant_config"] or QuantConfig()
    extra = {name: value for name, value in arguments.items() if name not in _NOT_CONFIGURATION}
    dtype = checkpoints.engine_dtype(hf_config, arguments["dtype"])
    described = checkpoints.describe(hf_config)
    config = cls.config_class(**{**described, **extra}, dtype=dtype, mapping=mapping, quantization=quant_config)
    weights = checkpoints.read_weights(folder) if is_folder else _state(folder)
    if not arguments["load_model_on_cpu"] and is_folder and machine.visible_gpus():
        machine.allocate(checkpoints.num_bytes(weights), machine.need_gpu())  # device_map="auto"
    has_scales = any(name.endswith("_scale") for name in weights)
    if (quant_config.quant_algo not in _NEEDS_NO_SCALES or quant_config.kv_cache_quant_algo) and not has_scales:
        raise RuntimeError(
            "Required but not provided tensors:{'transformer.layers.0.attention.qkv.weights_scaling_factor'}"
        )
    model = cls(config)
    model.weights = checkpoints.part_of_rank(checkpoints.convert(weights, dtype), config, mapping)
    return model


def _state(model: Any) -> checkpoints.Weights:
    return {name: tensor.detach().float().cpu().numpy() for name, tensor in model.state_dict().items()}


class GPTForCausalLM(PretrainedModel):
    config_class = type("GPTConfig", (PretrainedConfig,), {})
    quantizes_natively = True

    @classmethod
    @checked("GPTForCausalLM.from_hugging_face")
    def from_hugging_face(cls, **arguments: Any) -> GPTForCausalLM:
        variant = arguments["gpt_variant"] or _guess_variant(arguments["hf_model_or_dir"])
        model = load(cls, {**arguments, "gpt_variant": variant})
        # The library then looks for tensors of another model, and fails in ways of its own.
        if model.config.architecture == "GPT2LMHeadModel" and variant != "gpt2":
            raise KeyError(f"tensors of {variant} in a GPT-2 checkpoint")
        return model


class LLaMAForCausalLM(PretrainedModel):
    config_class = type("LLaMAConfig", (PretrainedConfig,), {})
    quantizes_natively = True

    @classmethod
    @checked("LLaMAForCausalLM.from_hugging_face")
    def from_hugging_face(cls, **arguments: Any) -> LLaMAForCausalLM:
        folder = arguments["hf_model_or_dir"]
        if not isinstance(folder, str):
            raise UnboundLocalError(
                "cannot access local variable 'hf_model_dir' where it is not associated with a value"
            )
        assert not any(word in folder for word in ("llava", "vila", "exaone")), f"{folder!r} names another model"
        return load(cls, {**arguments, "load_model_on_cpu": True})  # the unified converter reads the files itself


def _guess_variant(folder: Any) -> str:
    model_type = (checkpoints.read_config(folder) if isinstance(folder, str) else folder.config.to_dict())["model_type"]
    found = [variant for variant in _GPT_VARIANTS if variant in str(folder) or variant == model_type]
    assert found
    return found[0]


def _family(name: str) -> type[PretrainedModel]:
    convertible = [
        *_SUPPORT["own_from_hugging_face_and_quantize"],
        *_SUPPORT["own_from_hugging_face_inherited_quantize"],
    ]
    if name not in (*convertible, *_SUPPORT["not_on_1.2.1_page"]):
        return type(name, (PretrainedModel,), {})

    @checked("LLaMAForCausalLM.from_hugging_face")
    def from_hugging_face(cls: Any, **arguments: Any) -> PretrainedModel:
        return load(cls, arguments)

    body = {
        "config_class": type(name.replace("ForCausalLM", "Config"), (PretrainedConfig,), {}),
        "quantizes_natively": name in _SUPPORT["own_from_hugging_face_and_quantize"],
        "from_hugging_face": classmethod(from_hugging_face),
    }
    return type(name, (PretrainedModel,), body)


_NAMES = sorted(set(ENTRIES["MODEL_MAP"]["entries"].values()))
CLASSES = {name: globals().get(name) or _family(name) for name in _NAMES}


def class_of(folder: str | Path) -> type[PretrainedModel]:
    """Of a checkpoint's first architecture. Raises NotImplementedError as the library does."""
    assert (Path(folder) / "config.json").exists(), f"Please provide a Hugging Face model as the input, got {folder}"
    architecture = checkpoints.read_config(str(folder))["architectures"][0]
    name = ENTRIES["MODEL_MAP"]["entries"].get(architecture)
    if name is None:
        raise NotImplementedError(
            f"The given huggingface model architecture {architecture} is not supported in TRT-LLM yet"
        )
    return CLASSES[name]
