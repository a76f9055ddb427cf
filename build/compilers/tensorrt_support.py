"""What TensorRT-LLM 1.2.1 builds engines from, and on which GPUs: all that can be said before anything long starts.

The tables were read in the documentation of 1.2.1 and, where that is silent, in near versions of the source.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import trtllm_installation
from engine_manifest import major_and_minor
from errors import UnsupportedError, UsageError
from gpu_products import GpuProduct, product_of, refusal
from gpus import Gpu, find_gpus
from llm_arguments import check as check_llm_arguments
from model_shape import ModelShape, model_shape
from plan import BuildRequest, EnginePlan
from sizing import MIB, GpuSizing, Layout, Precision, check_layout, checkpoint_format, size_gpu

log = logging.getLogger(__name__)

OLDEST_VERSION, NEWEST_VERSION = (1, 2), (1, 2)  # that the calls are written for
PYTORCH_INSTEAD = "build with --engine pytorch, which needs no TensorRT"

# Architecture -> the library's class for it, among those that model_shape.py knows (MODEL_MAP of tensorrt_llm/models).
# Those that are left out of it have no from_hugging_face.
MODEL_CLASSES = {
    "GPT2LMHeadModel": "GPTForCausalLM",
    "LlamaForCausalLM": "LLaMAForCausalLM",
    "MistralForCausalLM": "LLaMAForCausalLM",
    "MixtralForCausalLM": "LLaMAForCausalLM",
    "Qwen2ForCausalLM": "QWenForCausalLM",
    "Qwen2MoeForCausalLM": "QWenForCausalLM",
    "Qwen3ForCausalLM": "QWenForCausalLM",
    "Qwen3MoeForCausalLM": "QWenForCausalLM",
    "GemmaForCausalLM": "GemmaForCausalLM",
    "Gemma2ForCausalLM": "GemmaForCausalLM",
    "Gemma3ForCausalLM": "GemmaForCausalLM",
    "Phi3ForCausalLM": "Phi3ForCausalLM",
}
# In MODEL_MAP, but only scripts that are not in the package convert them.
NOT_CONVERTIBLE = (
    "OPTForCausalLM",
    "BloomForCausalLM",
    "MptForCausalLM",
    "GPTNeoXForCausalLM",
    "DbrxForCausalLM",
    "RecurrentGemmaForCausalLM",
)

# KV caches that a format can have. W8A16 and W4A16 with an FP8 cache would take the library's own flow, which makes no
# scales for FP8; ModelOpt's FP8 has none for INT8.
KV_CACHES = {
    "none": ("auto", "fp8", "int8"),
    "int8": ("auto", "int8"),
    "int4": ("auto", "int8"),
    "fp8": ("auto", "fp8"),
    "int4_awq": ("auto", "fp8", "int8"),
    "int8_sq": ("auto", "int8"),
}
# An INT8 KV cache without ModelOpt's weights needs a quantize() of the class's own; Gemma's fails for it.
NATIVE_QUANTIZATION = ("GPTForCausalLM", "LLaMAForCausalLM", "QWenForCausalLM")
# Gemma's quantize() does nothing for a KV cache alone, and says nothing.
NO_KV_CACHE_ALONE = ("GemmaForCausalLM",)


def check_request(request: BuildRequest) -> None:
    """Raises UsageError for options that no TensorRT engine can have, UnsupportedError for what is missing here."""
    if request.dtype == "float32":
        raise UsageError(
            "--dtype float32 is not computed by TensorRT-LLM's attention kernels; use float16, bfloat16 or auto"
        )
    legal = KV_CACHES[request.quantization]
    if request.kv_cache_dtype not in legal:
        raise UsageError(
            f"--kv-cache-dtype {request.kv_cache_dtype} does not go with --quantization {request.quantization} in "
            f"TensorRT-LLM; use {' or '.join(legal)}"
        )
    check_llm_arguments(request.llm_arguments, "tensorrt")
    check_installation()
    target_gpus(request.gpu)


def check(plan: EnginePlan, config: Mapping[str, Any]) -> None:
    """Raises UsageError for a layout, UnsupportedError for a model or a GPU, that nothing can be built for."""
    _check_convertible(plan, config)
    shape = model_shape(config, plan.model)
    for note in check_layout(shape, layout_of(plan), plan.model, plan.quantization):
        log.info("plan: %s", note)
    gpus = target_gpus(plan.gpu)
    product = product_here(gpus)
    refused = refusal(product, engine="tensorrt", weights=plan.quantization, kv_cache=precision_of(plan).kv_cache)
    if refused is not None:
        raise UnsupportedError(refused)
    if gpus[0].memory_mib is not None:
        _check_fits(plan, shape, product)


# --- what is here


def check_installation() -> dict[str, str]:
    found = trtllm_installation.versions()
    version = found.get("tensorrt_llm")
    if version is None:
        raise UnsupportedError(
            "--engine tensorrt needs TensorRT-LLM, which is not installed here; build inside NVIDIA's container "
            "tritonserver:26.07-trtllm-python-py3, or build for this machine's CPU with --engine openvino"
        )
    if not trtllm_installation.has_engine_backend():
        raise UnsupportedError(
            f"TensorRT-LLM {version} builds no TensorRT engines any more (releases after 1.2 do not); "
            f"{PYTORCH_INSTEAD}, or use the container tritonserver:26.07-trtllm-python-py3"
        )
    if "tensorrt" not in found:
        raise UnsupportedError(
            f"TensorRT-LLM {version} is installed here without TensorRT, which builds its engines; {PYTORCH_INSTEAD}, "
            "or build inside NVIDIA's container tritonserver:26.07-trtllm-python-py3"
        )
    return found


def log_version(version: str) -> None:
    number = major_and_minor(version) or OLDEST_VERSION
    if not OLDEST_VERSION <= number <= NEWEST_VERSION:
        age = "older" if number < OLDEST_VERSION else "newer"
        log.warning("TensorRT-LLM %s is %s than 1.2.1, which the build is written for; going on with it", version, age)


@functools.cache
def _gpus() -> tuple[Gpu, ...]:
    """Asked for once: without its persistence daemon the driver takes seconds for an answer."""
    return tuple(find_gpus())


def target_gpus(asked: str | None) -> list[Gpu]:
    """The GPUs of this machine that the engine is for: TensorRT builds for the product that it runs on.

    Raises UnsupportedError if there is none of the product that was asked for, UsageError where the choice is open.
    """
    gpus = _gpus()
    products = list(dict.fromkeys(gpu.product for gpu in gpus))
    if not gpus:
        raise UnsupportedError(
            "--engine tensorrt builds on the GPU that the engine is for, and this machine shows no NVIDIA GPU; build "
            "on one that has it, or with --engine openvino for a CPU"
        )
    if asked is None and len(products) > 1:
        raise UsageError(
            f"this machine has {' and '.join(products)}, and an engine is for one of them; choose it with --gpu"
        )
    if asked is not None and asked not in products:
        raise UnsupportedError(
            f"--gpu {asked} is not in this machine, which has {' and '.join(products)}, and TensorRT builds on the GPU "
            f"that the engine is for; build on a machine with it, or use --gpu {products[0]}"
        )
    return [gpu for gpu in gpus if asked in (None, gpu.product)]


def product_here(gpus: list[Gpu]) -> GpuProduct:
    first = gpus[0]
    return product_of(gpus) or GpuProduct(
        product=first.product, compute_capability=first.compute_capability, memory_mib=0
    )


# --- what can be built


def _check_convertible(plan: EnginePlan, config: Mapping[str, Any]) -> None:
    architecture = plan.architecture
    if architecture not in MODEL_CLASSES:
        reason = (
            "which TensorRT-LLM 1.2.1 does not convert from a Hugging Face checkpoint"
            if architecture in NOT_CONVERTIBLE
            else "and TensorRT engines are built here from others"
        )
        raise UnsupportedError(
            f"'{plan.model}' is a {architecture}, {reason}; use one of {', '.join(MODEL_CLASSES)}, or try "
            "--engine pytorch"
        )
    own = checkpoint_format(config)
    if own is not None:
        raise UnsupportedError(
            f"'{plan.model}' is quantized already ({own}), and TensorRT engines are built here from full weights; use "
            "--engine pytorch, or the checkpoint that it was made from with --quantization"
        )
    model_class = MODEL_CLASSES[architecture]
    is_native = plan.kv_cache_dtype == "int8" and plan.quantization in ("none", "int8", "int4")
    is_alone = plan.kv_cache_dtype == "fp8" and plan.quantization == "none"
    if (is_native and model_class not in NATIVE_QUANTIZATION) or (is_alone and model_class in NO_KV_CACHE_ALONE):
        others = [name for name in KV_CACHES if plan.kv_cache_dtype in KV_CACHES[name][1:]]
        others = [name for name in others if name not in ("none", "int8", "int4")]
        raise UnsupportedError(
            f"TensorRT-LLM 1.2.1 makes no {plan.kv_cache_dtype} KV cache for a {architecture} with --quantization "
            f"{plan.quantization}; use --kv-cache-dtype auto, or --quantization {' or '.join(others)}"
        )


def _check_fits(plan: EnginePlan, shape: ModelShape, product: GpuProduct) -> None:
    """Weights are arithmetic, so what does not hold them is refused. The rest is estimated, and only said."""
    sizing = sized(plan, shape, product)
    asked = sizing.asked
    if asked is None or asked.fits:
        return
    layout = f"--tp {asked.layout.tp} --pp {asked.layout.pp}"
    if asked.weight_bytes > product.memory_mib * MIB:
        raise UnsupportedError(
            f"a rank of '{plan.model}' at {layout} has {asked.weight_bytes / 1e9:.1f} GB of weights, and "
            f"{product.product} has {product.memory_mib * MIB / 1e9:.1f} GB of memory; {smaller(plan, sizing)}"
        )
    log.warning(
        "plan: %s leaves no room on %s for a sequence of %d tokens, as far as can be estimated; %s",
        layout,
        product.product,
        plan.limits.max_seq_len,
        smaller(plan, sizing),
    )


def sized(plan: EnginePlan, shape: ModelShape, product: GpuProduct) -> GpuSizing:
    return size_gpu(product, shape, precision_of(plan), plan.limits, layout_of(plan), engine="tensorrt")


def smaller(plan: EnginePlan, sizing: GpuSizing) -> str:
    """What makes a rank smaller: a layout, or fewer bits."""
    best = sizing.recommended
    fewer_bits = " or --quantization" if plan.quantization == "none" else ""
    if best is not None and best.layout != layout_of(plan):
        return f"use --tp {best.layout.tp} --pp {best.layout.pp}{fewer_bits}"
    return f"use a larger GPU{fewer_bits}"


def layout_of(plan: EnginePlan) -> Layout:
    return Layout(tp=plan.tensor_parallel, pp=plan.pipeline_parallel)


def precision_of(plan: EnginePlan) -> Precision:
    return Precision(
        dtype=plan.dtype,
        weights=plan.quantization,
        kv_cache=plan.dtype if plan.kv_cache_dtype == "auto" else plan.kv_cache_dtype,
    )
