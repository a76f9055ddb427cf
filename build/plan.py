"""What to build, decided before anything long starts: a `BuildRequest` and a `Checkpoint` become an `EnginePlan`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from checkpoint import Checkpoint
from errors import UnsupportedError, UsageError

EngineKind = Literal["tensorrt", "pytorch", "openvino"]
EngineChoice = Literal["auto", "tensorrt", "pytorch", "openvino"]
DType = Literal["auto", "float32", "float16", "bfloat16"]
Quantization = Literal["none", "int8", "int4"]

ENGINE_KINDS: tuple[str, ...] = get_args(EngineKind)
ENGINE_CHOICES: tuple[str, ...] = get_args(EngineChoice)
DTYPES: tuple[str, ...] = get_args(DType)
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What the user asked for. `None` means "decide for me"; `make_plan` decides and says why."""

    model: str
    revision: str | None = None
    engine: EngineChoice = "auto"
    dtype: DType = "auto"
    quantization: Quantization = "none"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    gpu: str | None = None
    max_batch_size: int | None = None
    max_input_len: int | None = None
    max_seq_len: int | None = None
    trust_remote_code: bool = False


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
    tensor_parallel: int
    pipeline_parallel: int
    gpu: str | None
    limits: EngineLimits
    trust_remote_code: bool
    compiler_versions: tuple[tuple[str, str], ...]  # ("openvino", "2026.4.1"), ... sorted by name

    @property
    def world_size(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    def key_fields(self) -> dict[str, Any]:
        """Everything that decides the engine's bytes, as plain JSON data. `model` is left out: the digest says it."""
        fields = asdict(self)
        del fields["model"]
        return fields
