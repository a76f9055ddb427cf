"""Engines of the kind `tensorrt`: a checkpoint becomes one TensorRT engine per rank, by TensorRT-LLM's own builder.

A calibrated format is quantized once, for all ranks; then every rank is converted and built in a process of its own
(tensorrt_rank.py), on a GPU of the product that the engine is for. There may be fewer GPUs than ranks, even one: rank r
is built on GPU r modulo their number, and those of one GPU one after another. What is finished waits in the store for
the next build if this one dies (kept_steps.py). Ranks are called as their files are, from 0.

Nothing here imports tensorrt_llm but tensorrt_rank.py. Names and rules are those of TensorRT-LLM 1.2.1;
tensorrt_support.py has what it can build.

What is not covered: checkpoints that are quantized already, LoRA, speculative decoding, expert parallelism, several
nodes. Each process loads what it converts into the machine's memory, and for GPT-2, Gemma and Phi-3 that is the whole
model.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from math import ceil
from pathlib import Path
from typing import Any

from checkpoint import Checkpoint
from checkpoint_files import human_size
from errors import BuildError, CompileError
from gpus import Gpu
from llm_arguments import merged
from model_shape import ModelShape, model_shape
from plan import EnginePlan
from sizing import MAX_NUM_TOKENS, MIB, TOKENS_PER_BLOCK, Precision, kv_bytes_per_token, model_bytes

from compilers import CompiledModel, kept_steps, tokenizer_files
from compilers.quiet_libraries import quiet_libraries
from compilers.step_processes import Step, StepFailedError, run
from compilers.tensorrt_support import (
    MODEL_CLASSES,
    check,
    check_installation,
    check_request,
    log_version,
    precision_of,
    product_here,
    sized,
    smaller,
    target_gpus,
)

__all__ = ["check", "check_request", "compile", "target_gpus", "versions"]

log = logging.getLogger(__name__)

OPT_BATCH_SIZE = 8  # BuildConfig's default: what TensorRT chooses its kernels for
NUM_LOG_CHARACTERS, NUM_QUOTED_LINES = 600, 3  # of a library's log, in a message

# Keywords of from_hugging_face beside the common ones. A class takes any name, and makes it an attribute of its
# configuration if it knows none, so each gets only what it reads.
CONVERSION_KEYWORDS: dict[str, dict[str, Any]] = {
    # The whole embedding on every rank, as sizing.py counts it; how 50257 rows are divided is not known.
    "GPTForCausalLM": {"load_model_on_cpu": True, "use_parallel_embedding": False},
    "LLaMAForCausalLM": {"load_model_on_cpu": True},
    "QWenForCausalLM": {"load_model_on_cpu": True},
    "GemmaForCausalLM": {"load_model_on_cpu": True},
    "Phi3ForCausalLM": {},
}
# GPT's class guesses the variant from the folder's name, and fails where it finds none there.
ARCHITECTURE_KEYWORDS: dict[str, dict[str, Any]] = {"GPT2LMHeadModel": {"gpt_variant": "gpt2"}}

QUANT_ALGORITHMS = {
    "none": None,
    "int8": "W8A16",
    "int4": "W4A16",
    "fp8": "FP8",
    "int4_awq": "W4A16_AWQ",
    "int8_sq": "W8A8_SQ_PER_CHANNEL",
}
KV_ALGORITHMS = {"auto": None, "fp8": "FP8", "int8": "INT8"}
AWQ_GROUP_SIZE = 128  # as sizing.py counts it


def versions() -> dict[str, str]:
    """Of the packages that decide the engine's bytes. Raises UnsupportedError if TensorRT-LLM is not installed."""
    found = check_installation()
    for package in ("transformers", "tokenizers", "nvidia-modelopt"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def compile(plan: EnginePlan, checkpoint: Checkpoint, folder: Path, kept: Path) -> CompiledModel:
    """Write the ranks' engines, config.json, the tokenizer's files and llm_args.json into the empty `folder`.

    Raises UnsupportedError for what the checkpoint holds and cannot be built, CompileError when a library fails.
    """
    gpus = target_gpus(plan.gpu)
    shape = model_shape(json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8")), plan.model)
    started = time.monotonic()
    with quiet_libraries():
        special = tokenizer_files.write(checkpoint, folder, trust_remote_code=plan.trust_remote_code)
    kept.mkdir(parents=True, exist_ok=True)
    with _folder_for_work(folder) as work, _explained(plan, shape, gpus, kept):
        _stage(plan, checkpoint, work / "model")
        quantized = _quantize(plan, shape, work, kept, gpus) if plan.calibration is not None else None
        _build_ranks(plan, work, kept, gpus, quantized)
    config = _assemble(plan, folder, kept)
    _write_llm_arguments(plan, shape, folder, config)
    size = sum(path.stat().st_size for path in folder.iterdir())
    log.info("compile: %d ranks, %.1f MB in %.1f s", plan.world_size, size / 1e6, time.monotonic() - started)
    return CompiledModel(
        vocab_size=config["pretrained_config"]["vocab_size"],  # AWQ pads it
        bos_token_id=special.bos_token_id,
        eos_token_ids=special.eos_token_ids,
        pad_token_id=special.pad_token_id,
        kv_bytes_per_token=kv_bytes_per_token(shape, precision_of(plan)),
        gpu=(gpus[0].product, gpus[0].compute_capability),
    )


# --- the work


@contextmanager
def _folder_for_work(folder: Path) -> Iterator[Path]:
    """In `folder`, so that what is finished there can be moved into the store."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".work.") as work:
        yield Path(work)


def _stage(plan: EnginePlan, checkpoint: Checkpoint, folder: Path) -> None:
    """The checkpoint's files under a path that says nothing, and without code that nobody trusted.

    The library looks for "llava", "vila", "exaone" and "mpt" in paths (the last is in "prompts"), so steps name this
    folder by a relative one. And it runs whatever code `auto_map` names, also from other repositories, unasked.
    """
    folder.mkdir()
    for name in checkpoint.files:
        source = (checkpoint.path / name).resolve()
        if name in ("config.json", "tokenizer_config.json") and not plan.trust_remote_code:
            content = json.loads(source.read_text(encoding="utf-8"))
            content.pop("auto_map", None)
            (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
        else:
            (folder / name).symlink_to(source)


MODEL_PATH = "../model"  # from a step's working directory


def _mapping(plan: EnginePlan) -> dict[str, int]:
    """`world_size` is not derived by the library."""
    return {
        "world_size": plan.world_size,
        "tp_size": plan.tensor_parallel,
        "pp_size": plan.pipeline_parallel,
    }


def _quant_config(plan: EnginePlan) -> dict[str, Any]:
    """Fields of QuantConfig; empty where nothing is quantized."""
    found: dict[str, Any] = {
        "quant_algo": QUANT_ALGORITHMS[plan.quantization],
        "kv_cache_quant_algo": KV_ALGORITHMS[plan.kv_cache_dtype],
    }
    if plan.quantization == "int4_awq":
        found["group_size"] = AWQ_GROUP_SIZE
    return {name: value for name, value in found.items() if value is not None}


def _quantize(plan: EnginePlan, shape: ModelShape, work: Path, kept: Path, gpus: list[Gpu]) -> Path:
    """The quantized checkpoint of all ranks, made now or by an earlier build."""
    if (found := kept_steps.find(kept, "quantized")) is not None:
        log.info("quantizing: done by an earlier build")
        return found
    step_folder, output = work / "quantizing", work / "quantized"
    step_folder.mkdir()
    output.mkdir()
    texts, dataset = _calibration_texts(plan, step_folder)

    def job() -> dict[str, Any]:
        return {
            "step": "quantize",
            "model": MODEL_PATH,
            "architecture": plan.architecture,
            "dtype": plan.dtype,
            "mapping": _mapping(plan),
            "quantization": _quant_config(plan),
            "calib_dataset": dataset,
            "output": str(output),
        }

    def finished(step: Step, result: dict[str, Any]) -> None:
        place = kept_steps.keep(kept, "quantized", output)
        log.info("quantizing: done in %.0f s, %s, %s", result["seconds"], _size(place), step.gpu_words)

    used = gpus[: _num_gpus_for_whole_model(plan, shape, gpus)]
    step = Step(
        name="quantizing", folder=step_folder, gpus=tuple(used), job=job, needs_hub=plan.calibration_data is None
    )
    log.info("quantizing: %s, calibrated with %s, %s", _format_words(plan), texts, step.gpu_words)
    run([step], finished)
    return kept / "quantized"


def _calibration_texts(plan: EnginePlan, folder: Path) -> tuple[str, str]:
    """What to call them, and the value of calib_dataset.

    The library takes a path with "cnn_dailymail" in it for a copy of that data set, and one with "pileval" for a
    download, so the folder gets a name of ours that says the first or nothing.
    """
    if plan.calibration_data is None:
        return "cnn_dailymail, from the hub unless it is in its cache", "cnn_dailymail"
    source = Path(plan.calibration_data)
    name = "cnn_dailymail" if "cnn_dailymail" in source.name else "calibration"
    (folder / name).symlink_to(source, target_is_directory=True)
    return str(source), name


def _num_gpus_for_whole_model(plan: EnginePlan, shape: ModelShape, gpus: list[Gpu]) -> int:
    """Quantizing loads all of the model in 16 bits, however many ranks it will have; a fifth more for its states."""
    memory_mib = gpus[0].memory_mib
    if not memory_mib:
        return 1
    whole = model_bytes(shape, Precision(dtype=plan.dtype, kv_cache=plan.dtype))
    return max(1, min(len(gpus), ceil(1.2 * whole / (memory_mib * MIB))))


def _build_ranks(plan: EnginePlan, work: Path, kept: Path, gpus: list[Gpu], quantized: Path | None) -> None:
    """All ranks that no earlier build has finished."""
    log_version(dict(plan.compiler_versions).get("tensorrt_llm", ""))
    steps = []
    for rank in range(plan.world_size):
        if kept_steps.find(kept, f"rank{rank}") is not None:
            log.info("rank %d of %d: built by an earlier build", rank, plan.world_size)
        else:
            steps.append(_rank_step(plan, rank, work, kept, gpus[rank % len(gpus)], quantized))

    def finished(step: Step, result: dict[str, Any]) -> None:
        _check_built(plan, step.name, result)
        place = kept_steps.keep(kept, step.folder.name, step.folder / "engine")
        log.info("%s: built in %.0f s, %s, %s", step.name, result["seconds"], _size(place), step.gpu_words)

    run(steps, finished)


def _rank_step(plan: EnginePlan, rank: int, work: Path, kept: Path, gpu: Gpu, quantized: Path | None) -> Step:
    folder = work / f"rank{rank}"
    output = folder / "engine"
    output.mkdir(parents=True)

    def job() -> dict[str, Any]:
        # TensorRT's measurements of kernels: rank 0 writes them, and ranks that start after it need not measure again.
        known = kept / "rank0" / TIMING_CACHE
        caches = {"output_timing_cache": str(output / TIMING_CACHE)}
        caches |= {"input_timing_cache": str(known)} if known.exists() else {}
        model_class = MODEL_CLASSES[plan.architecture]
        return {
            "step": "build",
            "model": MODEL_PATH,
            "architecture": plan.architecture,
            "dtype": plan.dtype,
            "mapping": _mapping(plan),
            "rank": rank,
            "quantization": _quant_config(plan),
            "conversion": CONVERSION_KEYWORDS[model_class] | ARCHITECTURE_KEYWORDS.get(plan.architecture, {}),
            "checkpoint": str(quantized) if quantized is not None else None,
            "build_config": _limits(plan) | {"opt_batch_size": _opt_batch_size(plan)} | caches,
            "plugin_config": {"use_paged_context_fmha": True, "tokens_per_block": TOKENS_PER_BLOCK},
            "limits": list(_limits(plan)),
            "output": str(output),
        }

    return Step(name=f"rank {rank} of {plan.world_size}", folder=folder, gpus=(gpu,), job=job)


TIMING_CACHE = "timing.cache"


def _opt_batch_size(plan: EnginePlan) -> int:
    return min(OPT_BATCH_SIZE, plan.limits.max_batch_size)


def has_paged_context_attention(plan: EnginePlan) -> bool:
    """Whether build() leaves it on: with a KV cache of 8 bits only FP8 beside FP8 weights (which need 8.9 anyway)."""
    return plan.kv_cache_dtype == "auto" or plan.kv_cache_dtype == plan.quantization == "fp8"


def _limits(plan: EnginePlan) -> dict[str, int]:
    """As BuildConfig calls them. Without paged context attention a prompt is one piece, and must fit into a step."""
    limits = plan.limits
    in_one_piece = 0 if has_paged_context_attention(plan) else limits.max_input_len
    return {
        "max_batch_size": limits.max_batch_size,
        "max_input_len": limits.max_input_len,
        "max_seq_len": limits.max_seq_len,
        "max_beam_width": limits.max_beam_width,
        # More than all sequences at their longest is cut by the library.
        "max_num_tokens": max(min(MAX_NUM_TOKENS, limits.max_seq_len * limits.max_batch_size), in_one_piece),
    }


def _check_built(plan: EnginePlan, name: str, result: dict[str, Any]) -> None:
    """The library changes what it is asked for with a line in its log only."""
    _check_limits(plan, name, result["limits"])
    is_paged = result["use_paged_context_fmha"]
    if not is_paged and result["limits"]["max_num_tokens"] < plan.limits.max_input_len:
        raise CompileError(
            f"TensorRT-LLM switched paged context attention off for {name} of '{plan.model}', so prompts longer than "
            f"{result['limits']['max_num_tokens']} tokens could not be served; build with a shorter --max-input-len"
        )
    if not is_paged and name.startswith("rank 0 "):
        log.warning(
            "%s: TensorRT-LLM switched paged context attention off, so this engine reuses no KV cache and takes every "
            "prompt in one piece",
            name,
        )


def _check_limits(plan: EnginePlan, name: str, found: Mapping[str, Any]) -> None:
    asked = _limits(plan)
    for limit, value in asked.items():
        if found.get(limit) == value:
            continue
        if limit == "max_num_tokens":  # of one step, not of a request: any number serves
            log.warning("%s: TensorRT-LLM made %s %s of %s", name, limit, found.get(limit), value)
            continue
        raise CompileError(
            f"TensorRT-LLM built {name} of '{plan.model}' with {limit} {found.get(limit)} instead of {value}; build "
            f"with other limits, or in the container tritonserver:26.07-trtllm-python-py3"
        )


# --- the engine's folder


def _assemble(plan: EnginePlan, folder: Path, kept: Path) -> dict[str, Any]:
    """The ranks' files, side by side. Returns config.json."""
    for rank in range(plan.world_size):
        for path in kept_steps.files_of(kept / f"rank{rank}"):
            if path.name != TIMING_CACHE:
                _link_or_copy(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    missing = [f"rank{rank}.engine" for rank in range(plan.world_size) if not (folder / f"rank{rank}.engine").exists()]
    layout = {name: config["pretrained_config"]["mapping"].get(name) for name in _mapping(plan)}
    if missing or layout != _mapping(plan):
        raise CompileError(
            f"TensorRT-LLM wrote an engine of '{plan.model}' with layout {layout}"
            + (f" and without {', '.join(missing)}" if missing else "")
            + f", and {_mapping(plan)} was asked for; build again with --force"
        )
    _check_limits(plan, "config.json", config["build_config"])
    planned = dict(plan.compiler_versions).get("tensorrt_llm")
    if config["version"] != planned:  # the server would refuse it
        raise CompileError(
            f"TensorRT-LLM {config['version']} built '{plan.model}', and {planned} is what pip lists here; use an "
            "environment that holds one of them"
        )
    return config


def _link_or_copy(source: Path, target: Path) -> None:
    """The kept file stays until the engine is in the store."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _write_llm_arguments(plan: EnginePlan, shape: ModelShape, folder: Path, config: dict[str, Any]) -> None:
    """llm_args.json: what the server gives to the LLM class for this engine, beside what it knows itself.

    `runtime_defaults` of config.json, such as the windows of a model's layers, go there too: the loader of 1.2.1 calls
    a method for them that does not exist.
    """
    defaults = config["pretrained_config"].get("runtime_defaults") or {}
    cache = {name: value for name, value in defaults.items() if value is not None and name in RUNTIME_DEFAULTS}
    if any(value is not None for value in defaults.values()):
        config["pretrained_config"]["runtime_defaults"] = None
        new = folder / f".config.{secrets.token_hex(4)}"
        new.write_text(json.dumps(config, indent=4), encoding="utf-8")
        os.replace(new, folder / "config.json")  # the old one is a link to the kept one
    window = shape.window if shape.sliding_layers else None
    if window is not None and window < plan.limits.max_seq_len and "max_attention_window" not in cache:
        log.warning(
            "%d of %d layers of '%s' look back %d tokens only, and this engine lets them see everything; say "
            '--llm-args \'{"kv_cache_config": {"max_attention_window": [...]}}\', or build with --max-seq-len %d',
            shape.sliding_layers,
            shape.num_layers,
            plan.model,
            window,
            window,
        )
    arguments = merged({"kv_cache_config": cache} if cache else {}, plan.llm_arguments)
    (folder / "llm_args.json").write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")


RUNTIME_DEFAULTS = ("max_attention_window", "sink_token_length")  # names that KvCacheConfig has too


def _size(folder: Path) -> str:
    return human_size(sum(path.stat().st_size for path in kept_steps.files_of(folder)))


def _format_words(plan: EnginePlan) -> str:
    cache = "" if plan.kv_cache_dtype == "auto" else f", KV cache {plan.kv_cache_dtype}"
    return f"{'weights ' + plan.dtype if plan.quantization == 'none' else plan.quantization}{cache}"


# --- errors


@contextmanager
def _explained(plan: EnginePlan, shape: ModelShape, gpus: list[Gpu], kept: Path) -> Iterator[None]:
    """A step that failed becomes one sentence; its whole log stays in `kept`."""
    try:
        yield
    except StepFailedError as failed:
        if (failed.error or {}).get("errno") in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(failed.error["errno"], "the disk is full") from failed  # type: ignore[index]
        log_file = kept / f"{failed.step.folder.name}.log"
        shutil.copyfile(failed.step.log_file, log_file)
        raise _sentence(plan, shape, gpus, failed, log_file) from failed


def _sentence(
    plan: EnginePlan, shape: ModelShape, gpus: list[Gpu], failed: StepFailedError, log_file: Path
) -> BuildError:
    what = f"{failed.step.name} of '{plan.model}'"
    error = failed.error
    if failed.exit_code == -9 and error is None:
        return CompileError(
            f"{what} was killed by signal 9 on {failed.step.gpu_words}, as happens when the machine's memory runs out; "
            "use a machine with more, or let it see fewer GPUs (CUDA_VISIBLE_DEVICES), so that fewer ranks are built "
            "side by side; what is finished is kept"
        )
    if failed.is_out_of_gpu_memory:
        product = product_here(gpus)
        remedy = smaller(plan, sized(plan, shape, product)) if gpus[0].memory_mib else "use a larger GPU"
        return CompileError(
            f"{what} ran out of memory on {failed.step.gpu_words}, {product.product}; end what else uses the GPU, or "
            f"{remedy}; the whole log is {log_file}"
        )
    if error is not None:
        lines = [line.strip() for line in error["message"].splitlines() if line.strip()]
        reason = f"{error['type']}: {lines[-1] if lines else 'without a message'}"
    elif failed.exit_code < 0:
        reason = f"its process was ended by signal {-failed.exit_code}"
    else:
        reason = f"its process ended with {failed.exit_code}"
    said = failed.lines[-NUM_QUOTED_LINES:]
    quoted = f" (its last lines: {' | '.join(said)})"[:NUM_LOG_CHARACTERS] if error is None and said else ""
    return CompileError(
        f"{what} cannot be built: {reason[:NUM_LOG_CHARACTERS]}{quoted}; the whole log is {log_file}, and "
        "--engine pytorch needs no TensorRT"
    )
