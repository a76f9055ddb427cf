"""OpenVINO engines from the tiny checkpoints, complete with engine.json, as the store would leave them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tiny_checkpoints
from checkpoint import Checkpoint, resolve
from compilers import CompiledModel, openvino_compiler
from engine_manifest import EngineManifest, write_manifest
from plan import BuildRequest, EnginePlan, make_plan


@dataclass(frozen=True, kw_only=True)
class TinyEngine:
    folder: Path
    checkpoint: Checkpoint
    plan: EnginePlan
    compiled: CompiledModel
    manifest: EngineManifest


def plan_for(checkpoint: Checkpoint, **request: Any) -> EnginePlan:
    asked = BuildRequest(model=checkpoint.model, **request)
    return make_plan(asked, checkpoint, "openvino", openvino_compiler.versions())


def build(
    name: str, parent: Path, *, stored_dtype: str = "float32", config: dict[str, Any] | None = None, **request: Any
) -> TinyEngine:
    """Make the tiny checkpoint `name` with `config` changed, and compile it as `request` says. In a new `parent`."""
    path = tiny_checkpoints.make(name, parent / "checkpoint", dtype=stored_dtype, **(config or {}))
    return compile(resolve(str(path)), parent / "engine", **request)


def compile(checkpoint: Checkpoint, folder: Path, **request: Any) -> TinyEngine:
    folder.mkdir(parents=True)
    plan = plan_for(checkpoint, **request)
    openvino_compiler.check(plan, {})
    compiled = openvino_compiler.compile(plan, checkpoint, folder, folder.with_name("kept"))
    manifest = EngineManifest(
        key="0" * 64,
        engine="openvino",
        model=plan.model,
        revision=plan.revision,
        checkpoint_digest=plan.checkpoint_digest,
        architecture=plan.architecture,
        dtype=plan.dtype,
        quantization=plan.quantization,
        kv_cache_dtype=plan.kv_cache_dtype,
        tensor_parallel=1,
        pipeline_parallel=1,
        limits=asdict(plan.limits),
        vocab_size=compiled.vocab_size,
        bos_token_id=compiled.bos_token_id,
        eos_token_ids=list(compiled.eos_token_ids),
        pad_token_id=compiled.pad_token_id,
        kv_bytes_per_token=compiled.kv_bytes_per_token,
        gpu=None,
        versions=dict(plan.compiler_versions),
        created="2026-01-01T00:00:00+00:00",
        files={},
    )
    write_manifest(folder, manifest)
    return TinyEngine(folder=folder, checkpoint=checkpoint, plan=plan, compiled=compiled, manifest=manifest)
