"""Engines of the kind `pytorch`: the pinned checkpoint itself, for TensorRT-LLM's PyTorch backend.

There is nothing to compile: that backend loads Hugging Face files and chooses its kernels at every start. What is made
is a folder that needs neither the hub nor the user's files any more: config.json, weights, the tokenizer's files as
every engine has them, and llm_args.json, the arguments that the server loads it with. It is for any GPU and any number
of machines, and is made on one without a GPU too.

What is not covered: quantizing. A checkpoint that NVIDIA ModelOpt or another tool has quantized is taken as it is.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import trtllm_installation
from checkpoint import Checkpoint
from checkpoint_files import TOKENIZER_FILES, TOKENIZER_SUFFIXES
from errors import UnsupportedError, UsageError
from llm_arguments import check as check_llm_arguments
from llm_arguments import merged
from model_shape import ARCHITECTURES, model_shape
from plan import BuildRequest, EnginePlan, read_config
from sizing import (
    MAX_NUM_TOKENS,
    Layout,
    Precision,
    check_layout,
    checkpoint_format,
    checkpoint_kv_cache,
    kv_bytes_per_token,
)

from compilers import CompiledModel, tokenizer_files
from compilers.quiet_libraries import quiet_libraries

log = logging.getLogger(__name__)

# Of the architectures in model_shape.py, those that the documentation of 1.2.1 lists for this backend
# (https://nvidia.github.io/TensorRT-LLM/models/supported-models.html).
LISTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
)
# Written anew by tokenizer_files: every end token, and no code.
OWN_FILES = ("generation_config.json", *TOKENIZER_FILES)


def versions() -> dict[str, str]:
    """Of the packages that decide the engine's bytes, and TensorRT-LLM's where it is installed."""
    found = {name: metadata.version(name) for name in ("tokenizers", "transformers")}
    installed = trtllm_installation.versions().get("tensorrt_llm")
    return found | ({"tensorrt_llm": installed} if installed is not None else {})


def check_request(request: BuildRequest) -> None:
    """Raises UsageError for options that this kind cannot have."""
    if request.quantization != "none":
        raise UsageError(
            f"--quantization {request.quantization} is made by the TensorRT builder, and --engine pytorch loads "
            "weights as they are; name a checkpoint that is quantized already (such as those of NVIDIA on the hub), or "
            "build with --engine tensorrt"
        )
    if request.kv_cache_dtype == "int8":
        raise UsageError(
            "--kv-cache-dtype int8 is for TensorRT engines, and the PyTorch backend has none; use fp8 or auto"
        )
    if request.dtype == "float32":
        raise UsageError(
            "--dtype float32 is not computed by TensorRT-LLM's attention kernels; use float16, bfloat16 or auto"
        )
    if request.gpu is not None:
        raise UsageError(
            f"--gpu {request.gpu} is for TensorRT engines and --plan, and a pytorch engine is for any GPU; leave it out"
        )
    check_llm_arguments(request.llm_arguments, "pytorch")


def check(plan: EnginePlan, config: Mapping[str, Any]) -> None:
    """Raises UsageError for a layout, UnsupportedError for a model, that the PyTorch backend cannot load."""
    architecture = plan.architecture
    if not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise UnsupportedError(
            f"'{plan.model}' is a {architecture}, and engines are built from causal language models "
            "(...ForCausalLM, ...LMHeadModel); if it has a text-only sibling, name that"
        )
    weights = checkpoint_format(config)
    if weights == "unknown":
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        raise UnsupportedError(
            f"'{plan.model}' is quantized in a way ({method}) that TensorRT-LLM is not known to read; use a checkpoint "
            "in FP8, NVFP4, AWQ or GPTQ, or the one that it was made from"
        )
    _check_registered(plan)
    _check_chunks(plan)
    _check_experts(plan)
    _vocab_size(plan, config)
    if architecture not in ARCHITECTURES:
        log.warning("plan: the tensors of a %s are not known here, so --tp and --pp are not checked", architecture)
        return
    shape = model_shape(config, plan.model)
    for note in check_layout(shape, Layout(tp=plan.tensor_parallel, pp=plan.pipeline_parallel), plan.model):
        log.info("plan: %s", note)


def _check_registered(plan: EnginePlan) -> None:
    """By the source of the TensorRT-LLM that is installed here; without one, by the documentation of 1.2.1."""
    registered = trtllm_installation.pytorch_architectures()
    if registered is not None and plan.architecture not in registered:
        raise UnsupportedError(
            f"'{plan.model}' is a {plan.architecture}, which the PyTorch backend of TensorRT-LLM "
            f"{dict(plan.compiler_versions).get('tensorrt_llm')} does not have; use --engine tensorrt, or one of "
            f"{', '.join(name for name in LISTED_ARCHITECTURES if name in registered)}"
        )
    if registered is None and plan.architecture not in LISTED_ARCHITECTURES:
        log.warning(
            "plan: the documentation of TensorRT-LLM 1.2.1 lists no %s for its PyTorch backend, which may refuse to "
            "load it; --engine tensorrt has a builder of its own for more architectures",
            plan.architecture,
        )


def _check_chunks(plan: EnginePlan) -> None:
    """A prompt that is not split into chunks must fit into one step."""
    arguments, longest = _llm_arguments(plan), plan.limits.max_input_len
    if not arguments["enable_chunked_prefill"] and longest > arguments["max_num_tokens"]:
        raise UsageError(
            f"--llm-args: enable_chunked_prefill is false, and prompts may have {longest} tokens, more than the "
            f"{arguments['max_num_tokens']} of a step; set max_num_tokens to {longest}, or shorten --max-input-len"
        )


def _check_experts(plan: EnginePlan) -> None:
    """Experts are divided among the ranks of tensor parallelism."""
    sizes = {name: plan.llm_arguments.get(f"moe_{name}_parallel_size") or 1 for name in ("tensor", "expert")}
    product = sizes["tensor"] * sizes["expert"]
    if plan.tensor_parallel % product or (product < plan.tensor_parallel and min(sizes.values()) > 1):
        raise UsageError(
            f"--llm-args: moe_tensor_parallel_size {sizes['tensor']} times moe_expert_parallel_size {sizes['expert']} "
            f"is not --tp {plan.tensor_parallel}; choose two whose product it is, or give one that divides it"
        )


def _vocab_size(plan: EnginePlan, config: Mapping[str, Any]) -> int:
    if plan.architecture in ARCHITECTURES:
        return model_shape(config, plan.model).vocab_size
    found = config.get("vocab_size")
    if not isinstance(found, int):
        raise UnsupportedError(
            f"config.json of '{plan.model}' has no vocab_size, which the server needs; use a checkpoint of a causal "
            "language model"
        )
    return found


def compile(plan: EnginePlan, checkpoint: Checkpoint, folder: Path, kept: Path) -> CompiledModel:
    """Write the checkpoint's files, the tokenizer's and llm_args.json into the empty `folder`."""
    started = time.monotonic()
    config = read_config(checkpoint)
    with quiet_libraries():
        special = tokenizer_files.write(checkpoint, folder, trust_remote_code=plan.trust_remote_code)
    for name in checkpoint.files:
        if name not in OWN_FILES and not name.endswith(TOKENIZER_SUFFIXES):
            _take(checkpoint, name, folder)
    if not plan.trust_remote_code:
        _remove_code(folder / "config.json")
    (folder / "llm_args.json").write_text(json.dumps(_llm_arguments(plan), indent=2) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.iterdir())
    log.info("compile: %.1f MB in %.1f s", size / 1e6, time.monotonic() - started)
    return CompiledModel(
        vocab_size=_vocab_size(plan, config),
        bos_token_id=special.bos_token_id,
        eos_token_ids=special.eos_token_ids,
        pad_token_id=special.pad_token_id,
        kv_bytes_per_token=_kv_bytes_per_token(plan, config),
    )


def _take(checkpoint: Checkpoint, name: str, folder: Path) -> None:
    """A hub's file never changes, so a second name for it will do; a user's own is copied."""
    source = (checkpoint.path / name).resolve()
    if checkpoint.revision is not None:
        try:
            os.link(source, folder / name)
            return
        except OSError:  # another disk, another user's file, or a file system without hard links
            pass
    shutil.copyfile(source, folder / name)


def _remove_code(path: Path) -> None:
    """Of a config.json, what names code: nobody trusted it, and the server must not come to run it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("auto_map", None) is not None:
        path.unlink()  # it may be a name of the hub's file
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _llm_arguments(plan: EnginePlan) -> dict[str, Any]:
    defaults: dict[str, Any] = {"max_num_tokens": MAX_NUM_TOKENS, "enable_chunked_prefill": True}
    if plan.kv_cache_dtype != "auto":
        defaults["kv_cache_config"] = {"dtype": plan.kv_cache_dtype}
    if plan.trust_remote_code:
        defaults["trust_remote_code"] = True
    return merged(defaults, plan.llm_arguments)


def _kv_bytes_per_token(plan: EnginePlan, config: Mapping[str, Any]) -> int:
    """0 where the architecture's tensors are not known."""
    if plan.architecture not in ARCHITECTURES:
        return 0
    own = checkpoint_kv_cache(config) or plan.dtype
    kv_cache = own if plan.kv_cache_dtype == "auto" else plan.kv_cache_dtype
    return kv_bytes_per_token(model_shape(config, plan.model), Precision(dtype=plan.dtype, kv_cache=kv_cache))
