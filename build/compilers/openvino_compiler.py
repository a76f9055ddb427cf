"""Engines of the kind `openvino`: a checkpoint becomes OpenVINO IR for ContinuousBatchingPipeline on a CPU.

optimum-intel traces the model, NNCF makes its weights smaller if asked to, and `tokenizer_files` puts the tokenizer
beside it. `dtype` is what the weights are stored in, and decides the arithmetic of the server: float32 engines compute
in float32, the others in what the CPU is fastest in. `quantization` changes the weights only.

What is not covered:
- GPTQ, AWQ, FP8 and other checkpoints that are quantized already.
- A 16-bit Gemma 3 engine keeps its embedding table in float32: OpenVINO's tracing does not know that layer.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

from checkpoint import Checkpoint
from errors import BuildError, CompileError, UnsupportedError, UsageError
from plan import BuildRequest, EnginePlan

from compilers import CompiledModel, tokenizer_files
from compilers.quiet_libraries import quiet_libraries

# openvino, optimum, nncf and transformers are imported inside functions: together they take six seconds.

log = logging.getLogger(__name__)

PACKAGES = ("openvino", "openvino-genai", "optimum-intel", "nncf", "torch", "transformers")

# Built and compared with transformers, token by token, in tests/unit/test_openvino_compiler.py.
TESTED_ARCHITECTURES = (
    "GPT2LMHeadModel",
    "OPTForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
)

# optimum-intel 2.1.0 exports these, and OpenVINO GenAI 2026.4.1 cannot run them right. Found with tiny random models.
BROKEN_ARCHITECTURES = {
    "GPTNeoForCausalLM": "its answers go wrong as soon as a text is longer than the window of its local layers",
    "MptForCausalLM": "its answers are wrong from the first token on",
    "MambaForCausalLM": "it has no attention, and the pipeline's cache is one of attention",
    "XGLMForCausalLM": "its attention is not exported as an operation that the pipeline knows",
}

QUANTIZATIONS = ("none", "int8", "int4")  # what NNCF makes of --quantization
INT4_GROUP_SIZE = 128  # weights that share a scale; NNCF's and optimum-intel's default
MODEL_FILES = ("openvino_model.xml", "openvino_model.bin")


def versions() -> dict[str, str]:
    """Of the packages that decide the engine's bytes. Raises UnsupportedError if one is not installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise UnsupportedError(
                f"--engine openvino needs the package {package}, which is not installed here; "
                "pip install --group build (pip 25.1 or later)"
            ) from None
    return found


def runtime_properties(dtype: str) -> dict[str, str]:
    """What ContinuousBatchingPipeline is to be given for an engine of this dtype.

    Without these a CPU with bfloat16 instructions uses them for every engine. 16-bit engines bring the type of their
    KV cache in the IR: optimum-intel writes KV_CACHE_PRECISION f16 there, and with it the cache is 16 bits wide.
    """
    if dtype == "float32":
        return {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    return {}


def check_request(request: BuildRequest) -> None:
    """Raises UsageError for options that no OpenVINO engine can have."""
    for option, number in (("--tp", request.tensor_parallel), ("--pp", request.pipeline_parallel)):
        if number > 1:
            raise UsageError(
                f"{option} {number} splits a model over GPUs, and an OpenVINO engine runs in one process on one CPU; "
                f"leave {option} out, or build with --engine tensorrt"
            )
    if request.quantization not in QUANTIZATIONS:
        raise UsageError(
            f"--quantization {request.quantization} is computed by NVIDIA GPUs only; "
            f"use {', '.join(QUANTIZATIONS[:-1])} or {QUANTIZATIONS[-1]}, or build with --engine tensorrt"
        )
    if request.kv_cache_dtype != "auto":
        raise UsageError(
            f"--kv-cache-dtype {request.kv_cache_dtype} is for engines on NVIDIA GPUs, and the KV cache of an OpenVINO "
            "engine follows --dtype; leave it out"
        )
    if request.gpu is not None:
        raise UsageError(
            f"--gpu {request.gpu} is for engines that run on a GPU, and an OpenVINO engine runs on any CPU; "
            "leave it out"
        )


def check(plan: EnginePlan, config: Mapping[str, Any]) -> None:
    """Raises UnsupportedError for an architecture that cannot be exported, or not be run once it is."""
    architecture = plan.architecture
    if reason := BROKEN_ARCHITECTURES.get(architecture):
        raise UnsupportedError(
            f"'{plan.model}' is a {architecture}, which OpenVINO's continuous batching does not run: {reason}"
        )
    if not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise UnsupportedError(
            f"'{plan.model}' is a {architecture}, and engines are built from causal language models "
            "(...ForCausalLM, ...LMHeadModel); if it has a text-only sibling, name that"
        )
    if architecture not in TESTED_ARCHITECTURES:
        log.info("architecture: %s is not one of those tested here; compare it with --verify", architecture)


def compile(plan: EnginePlan, checkpoint: Checkpoint, folder: Path, kept: Path) -> CompiledModel:
    """Write IR and tokenizer files into the empty `folder`.

    Raises UnsupportedError for what the checkpoint holds and cannot be built, CompileError when a library fails.
    """
    config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    started = time.monotonic()
    with quiet_libraries() as messages, _library_errors(plan):
        _check_config(plan, config)
        _check_exportable(plan, config)
        special = tokenizer_files.write(checkpoint, folder, trust_remote_code=plan.trust_remote_code)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export.") as scratch:
            exported = Path(scratch)
            _export(plan, checkpoint, exported)
            _check_all_weights_found(plan, messages)
            log.info("compile: traced in %.1f s", time.monotonic() - started)
            if plan.quantization != "none":
                _quantize(plan, exported)
            for name in (*MODEL_FILES, "config.json"):
                shutil.move(exported / name, folder / name)
        vocab_size, kv_numbers_per_token = _measure(plan, folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    log.info("compile: %.1f MB in %.1f s", size / 1e6, time.monotonic() - started)
    return CompiledModel(
        vocab_size=vocab_size,
        bos_token_id=special.bos_token_id,
        eos_token_ids=special.eos_token_ids,
        pad_token_id=special.pad_token_id,
        kv_bytes_per_token=kv_numbers_per_token * (4 if plan.dtype == "float32" else 2),
    )


# --- what the checkpoint may hold


def _check_config(plan: EnginePlan, config: Mapping[str, Any]) -> None:
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "an unnamed method")
        raise UnsupportedError(
            f"'{plan.model}' is quantized already ({method}), and OpenVINO engines are made from full weights; "
            "use the checkpoint that it was made from, with --quantization int8 or int4"
        )
    if "auto_map" in config and not plan.trust_remote_code and not _is_in_transformers(config):
        raise UnsupportedError(
            f"'{plan.model}' is Python code that the checkpoint brings; read it, and allow it with --trust-remote-code"
        )
    rope = config.get("rope_scaling") or {}
    if "longrope" in (rope.get("rope_type"), rope.get("type")):
        short = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        if short and plan.limits.max_seq_len > short:
            # The exported graph looks at the longest sequence of a batch and changes the angles of all of them.
            raise UnsupportedError(
                f"'{plan.model}' has two sets of position angles, and beyond {short} tokens one long request would "
                f"change the answers of the others beside it; build with --max-seq-len {short} or less"
            )


def _is_in_transformers(config: Mapping[str, Any]) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return config.get("model_type") in CONFIG_MAPPING_NAMES


def _check_exportable(plan: EnginePlan, config: Mapping[str, Any]) -> None:
    import optimum.exporters.openvino.model_configs  # noqa: F401  fills the list that is asked below
    from optimum.exporters.tasks import TasksManager

    model_type = config.get("model_type")
    try:
        tasks = TasksManager.get_supported_tasks_for_model_type(model_type, "openvino", library_name="transformers")
    except KeyError:
        tasks = {}
    if "text-generation-with-past" not in tasks:
        raise UnsupportedError(
            f"'{plan.model}' is a {plan.architecture} (model_type {model_type!r}), which optimum-intel "
            f"{metadata.version('optimum-intel')} cannot export as a language model; use another architecture, "
            "such as " + ", ".join(TESTED_ARCHITECTURES[2:5])
        )


def _check_all_weights_found(plan: EnginePlan, messages: list[str]) -> None:
    """transformers fills what a checkpoint lacks with random numbers, and only warns."""
    for message in messages:
        if "newly initialized: " in message:
            missing = re.findall(r"'([^']+)'", message.partition("newly initialized: ")[2])
            raise CompileError(
                f"'{plan.model}' lacks {len(missing)} of the weights of a {plan.architecture}, such as {missing[0]!r}; "
                "its config.json and its weights do not belong together"
            )


# --- the steps


def _export(plan: EnginePlan, checkpoint: Checkpoint, folder: Path) -> None:
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    main_export(
        model_name_or_path=str(checkpoint.path),
        output=folder,
        task="text-generation-with-past",
        library_name="transformers",
        stateful=True,  # the KV cache inside the model, which is what paged attention is made from
        convert_tokenizer=False,
        local_files_only=True,
        trust_remote_code=plan.trust_remote_code,
        # "fp32" means: save as loaded. Without it optimum-intel makes int8 of models beyond a billion weights; with
        # "fp16" it rounds the rotary frequencies too, and long prompts get other answers.
        ov_config=OVConfig(dtype="fp32"),
        model_loading_kwargs={"torch_dtype": plan.dtype},
    )


def _quantize(plan: EnginePlan, folder: Path) -> None:
    """Weights to 8 bits; or to 4 bits in groups with a scale each, embedding and head to 8."""
    import nncf
    import openvino

    started = time.monotonic()
    path = folder / MODEL_FILES[0]
    model = openvino.Core().read_model(path)
    if plan.quantization == "int8":
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    else:
        adjust = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
        model = nncf.compress_weights(
            model,
            mode=nncf.CompressWeightsMode.INT4_ASYM,
            group_size=INT4_GROUP_SIZE,
            advanced_parameters=adjust,  # layers that 128 does not divide: the next that does, from 32 on, or 8 bits
        )
    compressed = folder / "compressed"
    compressed.mkdir()
    openvino.save_model(model, compressed / MODEL_FILES[0], compress_to_fp16=False)
    log.info("compile: of the weights %s, in %.1f s", _describe(model), time.monotonic() - started)
    del model  # it maps the files that are replaced now
    for name in MODEL_FILES:
        shutil.move(compressed / name, folder / name)


def _describe(model: Any) -> str:
    """Such as "62 % in 4 bits (groups of 128 and 64), 38 % in 8 bits"."""
    bits = {"u4": 4, "u8": 8}
    numbers: Counter[int] = Counter()
    group_sizes: set[int] = set()
    for subtract in model.get_ops():  # asymmetric weights: Convert(weights) - Convert(zero points), times the scales
        if subtract.get_type_name() != "Subtract":
            continue
        weights, zero_points = (subtract.input_value(port).get_node() for port in (0, 1))
        kind = weights.input_value(0).get_element_type().get_type_name() if weights.get_input_size() else ""
        if kind in bits:
            numbers[bits[kind]] += prod(weights.shape)
            if kind == "u4":
                group_sizes |= {
                    length for length, one in zip(weights.shape, zero_points.shape, strict=True) if one == 1 < length
                }
    shares = {number: f"{100 * count / numbers.total():.0f} % in {number} bits" for number, count in numbers.items()}
    if group_sizes:
        shares[4] += f" (groups of {' and '.join(map(str, sorted(group_sizes, reverse=True)))})"
    return ", ".join(shares[number] for number in sorted(shares))


def _measure(plan: EnginePlan, folder: Path) -> tuple[int, int]:
    """Width of the logits, and numbers in the KV cache per token. The IR says both, for every architecture alike."""
    import openvino

    model = openvino.Core().read_model(folder / MODEL_FILES[0])
    operations = Counter(operation.get_type_name() for operation in model.get_ops())
    if not operations["ScaledDotProductAttention"]:
        raise UnsupportedError(
            f"'{plan.model}' is a {plan.architecture}, and its export has no attention that OpenVINO's continuous "
            "batching knows; use another architecture, such as " + ", ".join(TESTED_ARCHITECTURES[2:5])
        )
    kv_numbers_per_token = 0
    for operation in model.get_ops():
        if operation.get_type_name() == "ReadValue":  # keys or values of one layer: [batch, heads, tokens, head size]
            shape = operation.get_output_partial_shape(0)
            kv_numbers_per_token += prod(length.get_length() for length in shape if length.is_static)
    return model.output("logits").get_partial_shape()[-1].get_length(), kv_numbers_per_token


# --- errors


@contextmanager
def _library_errors(plan: EnginePlan) -> Iterator[None]:
    """Everything that a library raises becomes one sentence, with the library's error as its cause."""
    try:
        yield
    except BuildError:
        raise
    except MemoryError as error:
        raise CompileError(_out_of_memory(plan)) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CompileError(f"the disk is full while '{plan.model}' is compiled; make room and run again") from error
        raise CompileError(_failed(plan, error)) from error
    except Exception as error:
        if "allocate memory" in str(error):  # torch's own, a RuntimeError
            raise CompileError(_out_of_memory(plan)) from error
        raise CompileError(_failed(plan, error)) from error


def _out_of_memory(plan: EnginePlan) -> str:
    return (
        f"this machine has too little memory to compile '{plan.model}' in {plan.dtype}; "
        + ("use --dtype bfloat16, which needs half of it, or " if plan.dtype == "float32" else "use ")
        + "a machine with more"
    )


def _failed(plan: EnginePlan, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {' '.join(lines)[:300]}"
    return f"'{plan.model}' ({plan.architecture}) cannot be compiled for OpenVINO: {reason}"
