"""What to build, decided before anything long starts: a `BuildRequest` and a `Checkpoint` become an `EnginePlan`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from calibration import dataset_digest, needs_calibration
from checkpoint import Checkpoint
from checkpoint_files import MODELOPT_FILE, read_note
from errors import UnsupportedError, UsageError

EngineKind = Literal["tensorrt", "pytorch", "openvino", "synthetic"]
EngineChoice = Literal["auto", "tensorrt", "pytorch", "openvino", "synthetic"]
DType = Literal["auto", "float32", "float16", "bfloat16"]
Quantization = Literal["none", "int8", "int4", "fp8", "int4_awq", "int8_sq"]
KvCacheDType = Literal["auto", "fp8", "int8"]

ENGINE_KINDS: tuple[str, ...] = get_args(EngineKind)
ENGINE_CHOICES: tuple[str, ...] = get_args(EngineChoice)
DTYPES: tuple[str, ...] = get_args(DType)
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
KV_CACHE_DTYPES: tuple[str, ...] = get_args(KvCacheDType)
GPU_ENGINES: tuple[str, ...] = ("tensorrt", "pytorch")


@dataclass(frozen=True, kw_only=True)
class SyntheticRates:
    """How a synthetic engine behaves. Every sequence is as fast alone as beside others."""

    tokens_per_second: float = 50.0  # of each sequence
    prefill_seconds: float = 0.0  # from the slot to the first token
    kv_tokens: int = 0  # room of the KV cache, in tokens; 0: for every slot at its longest


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What the user asked for. `None` means "decide for me"; `make_plan` decides and says why."""

    model: str
    revision: str | None = None
    engine: EngineChoice = "auto"
    dtype: DType = "auto"
    quantization: Quantization = "none"
    kv_cache_dtype: KvCacheDType = "auto"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    gpu: str | None = None
    max_batch_size: int | None = None
    max_input_len: int | None = None
    max_seq_len: int | None = None
    trust_remote_code: bool = False
    synthetic: SyntheticRates | None = None
    calibration_data: Path | None = None  # None: the library's default, where the format needs any
    llm_arguments: Mapping[str, Any] = field(default_factory=dict)  # for TensorRT-LLM's LLM class


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """What one engine takes. Lengths in tokens; `max_batch_size` in sequences that generate at the same time."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int  # prompt and answer together
    max_beam_width: int = 1


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """What to compile. Every field decides the result, so all of them go into the store's key."""

    engine: EngineKind
    model: str
    revision: str | None
    checkpoint_digest: str
    architecture: str
    dtype: DType  # never "auto"
    quantization: Quantization
    kv_cache_dtype: KvCacheDType  # "auto": as wide as dtype
    tensor_parallel: int
    pipeline_parallel: int
    gpu: str | None
    limits: EngineLimits
    trust_remote_code: bool
    compiler_versions: tuple[tuple[str, str], ...]  # ("openvino", "2026.4.1"), ... sorted by name
    synthetic: SyntheticRates | None = None
    calibration: str | None = None  # the texts' name or digest; None where the format needs none
    calibration_data: str | None = None  # the folder with them; None for the library's default
    llm_arguments: Mapping[str, Any] = field(default_factory=dict)  # checked by llm_arguments.py

    @property
    def world_size(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    def key_fields(self) -> dict[str, Any]:
        """Everything that decides the engine's bytes, as plain JSON data.

        `model` and `calibration_data` are left out: digests say what they hold.
        """
        fields = asdict(self)
        del fields["model"], fields["calibration_data"]
        return fields


# A context of 128k tokens would reserve most of a laptop's memory for its KV cache; whoever needs it asks for it.
_DEFAULT_MOST_SEQ_LEN = 4096
_DEFAULT_MAX_BATCH_SIZE = 16
_MAX_BEAM_WIDTH = 4  # on a CPU; TensorRT-LLM's beam search gives no stream, and takes memory for every beam


def choose_engine(choice: EngineChoice, gpu_products: Sequence[str]) -> tuple[EngineKind, str]:
    """The engine kind and the reason, for the line that says what was resolved."""
    if choice != "auto":
        return choice, "asked for"
    if gpu_products:
        return "tensorrt", f"auto: this machine has {gpu_products[0]}"
    return "openvino", "auto: no NVIDIA GPU here"


def make_plan(
    request: BuildRequest, checkpoint: Checkpoint, engine: EngineKind, versions: Mapping[str, str]
) -> EnginePlan:
    """Decide everything that is open. Raises UsageError for limits that the model cannot have."""
    is_calibrated = engine == "tensorrt" and needs_calibration(request.quantization, request.kv_cache_dtype)
    if request.calibration_data is not None and not is_calibrated:
        raise UsageError(
            f"--calibration-data {request.calibration_data} is for TensorRT engines with --quantization fp8, int4_awq "
            "or int8_sq or a --kv-cache-dtype, and this one needs no texts; leave it out"
        )
    config = read_config(checkpoint)
    architectures = config.get("architectures") or []
    if len(architectures) != 1:
        raise UnsupportedError(
            f"config.json of '{checkpoint.model}' names {len(architectures)} architectures; "
            "give a checkpoint of a causal language model, which names one"
        )
    return EnginePlan(
        engine=engine,
        model=checkpoint.model,
        revision=checkpoint.revision,
        checkpoint_digest=checkpoint.digest,
        architecture=architectures[0],
        dtype=_dtype(request, engine, config),
        quantization=request.quantization,
        kv_cache_dtype=request.kv_cache_dtype,
        tensor_parallel=request.tensor_parallel,
        pipeline_parallel=request.pipeline_parallel,
        gpu=request.gpu,
        limits=_limits(request, engine, {} if engine == "synthetic" else config),
        trust_remote_code=request.trust_remote_code,
        compiler_versions=tuple(sorted(versions.items())),
        synthetic=request.synthetic,
        calibration=dataset_digest(request.calibration_data) if is_calibrated else None,
        calibration_data=str(request.calibration_data.absolute()) if request.calibration_data is not None else None,
        llm_arguments=dict(request.llm_arguments),
    )


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The content of config.json, with what ModelOpt's hf_quant_config.json says of quantization if only that does.

    Raises UnsupportedError if it is no object.
    """
    config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise UnsupportedError(f"config.json of '{checkpoint.model}' is not a JSON object; choose another checkpoint")
    quantization = read_note(checkpoint.path / MODELOPT_FILE, {}).get("quantization")
    if "quantization_config" not in config and isinstance(quantization, dict):
        config["quantization_config"] = {"quant_method": "modelopt"} | quantization
    return config


def _dtype(request: BuildRequest, engine: EngineKind, config: Mapping[str, Any]) -> DType:
    """On a GPU 16 bits, in the checkpoint's own type if it has one of them: what TensorRT-LLM's "auto" means too.

    On a CPU float32 is exact. Weights of 8 or 4 bits are not, and computing with them in 16 bits is faster.
    """
    if request.dtype != "auto":
        return request.dtype
    if engine in GPU_ENGINES:
        own = config.get("dtype") or config.get("torch_dtype")  # since transformers 4.56, and before
        return "bfloat16" if own == "bfloat16" else "float16"
    return "float32" if request.quantization == "none" else "bfloat16"


def _limits(request: BuildRequest, engine: EngineKind, config: Mapping[str, Any]) -> EngineLimits:
    text_config = config.get("text_config") or config
    positions = text_config.get("max_position_embeddings") or text_config.get("n_positions")
    max_seq_len = request.max_seq_len or min(positions or _DEFAULT_MOST_SEQ_LEN, _DEFAULT_MOST_SEQ_LEN)
    max_input_len = request.max_input_len or max_seq_len - 1
    if max_seq_len < 2:
        raise UsageError(f"--max-seq-len {max_seq_len} leaves no room for a prompt and an answer; use at least 2")
    if positions and max_seq_len > positions:
        raise UsageError(
            f"--max-seq-len {max_seq_len} is more than the model's {positions} positions; use at most {positions}"
        )
    if max_input_len >= max_seq_len:
        raise UsageError(
            f"--max-input-len {max_input_len} leaves no room for an answer within --max-seq-len {max_seq_len}; "
            f"use at most {max_seq_len - 1}"
        )
    return EngineLimits(
        max_batch_size=request.max_batch_size or _DEFAULT_MAX_BATCH_SIZE,
        max_input_len=max_input_len,
        max_seq_len=max_seq_len,
        max_beam_width=1 if engine in GPU_ENGINES else _MAX_BEAM_WIDTH,
    )
