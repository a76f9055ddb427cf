"""Building engines. One model, one call; never in two threads; never beside a running engine."""

from __future__ import annotations

import copy
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from ._double import checkpoints, machine, plan_file, process
from ._double.contract import Record, bind, checked
from ._double.records import KVCacheType, LoraConfig, QuantAlgo
from .models.modeling_utils import PretrainedConfig, PretrainedModel
from .plugin import PluginConfig

__all__ = ["BuildConfig", "Engine", "EngineConfig", "LoraConfig", "PluginConfig", "build"]

_lock = threading.Lock()


class BuildConfig(Record):
    @classmethod
    def from_json_file(cls, config_file: str) -> BuildConfig:
        return cls(**json.loads(Path(config_file).read_text()))

    def update_kv_cache_type(self, model_architecture: str) -> None:
        self.kv_cache_type = self.kv_cache_type or KVCacheType.PAGED


class EngineConfig:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        vars(self).update(bind("EngineConfig", args, kwargs))

    @classmethod
    def from_json_file(cls, config_file: str) -> EngineConfig:
        content = json.loads(Path(config_file).read_text())
        pretrained = PretrainedConfig.from_dict(content["pretrained_config"])
        return cls(pretrained, BuildConfig(**content["build_config"]), content["version"])

    def to_dict(self) -> dict[str, Any]:
        build_config = self.build_config.model_dump("json")
        del build_config["dry_run"], build_config["visualize_network"]
        return {
            "version": self.version,
            "pretrained_config": self.pretrained_config.to_dict(),
            "build_config": build_config,
        }


class Engine:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        vars(self).update(bind("Engine", args, kwargs))

    @checked("Engine.save")
    def save(self, engine_dir: str) -> None:
        """Makes the folder; config.json is only of rank 0."""
        if self.engine is None:
            raise TypeError("a bytes-like object is required, not 'NoneType'")
        folder, rank = Path(engine_dir), self.config.pretrained_config.mapping.rank
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            (folder / "config.json").write_text(json.dumps(self.config.to_dict(), indent=4))
        (folder / f"rank{rank}.engine").write_bytes(self.engine)

    @classmethod
    @checked("Engine.from_dir")
    def from_dir(cls, engine_dir: str, rank: int) -> Engine:
        config = EngineConfig.from_json_file(f"{engine_dir}/config.json")
        config.pretrained_config.set_rank(rank)
        return cls(config, Path(engine_dir, f"rank{rank}.engine").read_bytes())


@checked("build")
def build(model: PretrainedModel, build_config: BuildConfig) -> Engine:
    gpu = machine.need_gpu()
    if process.num_engines:
        raise RuntimeError(
            "the double: build() while an LLM runs in this process; the library's plugins misbehave then"
        )
    if not _lock.acquire(blocking=False):
        raise RuntimeError("the double: build() in two threads; IS_BUILDING is one variable for the process")
    try:
        if model.was_built:
            raise RuntimeError("the double: build() changes its model, so every call needs a fresh one")
        model.was_built = True
        os.environ["IS_BUILDING"] = "1"
        return _build(model, copy.deepcopy(build_config), gpu)
    finally:
        os.environ.pop("IS_BUILDING", None)
        _lock.release()


def _build(model: PretrainedModel, build_config: BuildConfig, gpu: machine.Gpu) -> Engine:
    config, rank = model.config, model.config.mapping.rank
    _refuse_unsupported(config, gpu.sm)
    _fill_in(build_config, config)
    _override(build_config, config, gpu.sm)
    process.obey_build_faults(rank)
    machine.allocate(checkpoints.num_bytes(model.weights), gpu)
    _use_timing_cache(build_config, rank)
    header = {"sm": gpu.sm, "tensorrt": machine.settings()["tensorrt"], "rank": rank}
    plan = None if build_config.dry_run else plan_file.to_bytes(model.weights, header)
    return Engine(EngineConfig(config, build_config, machine.settings()["tensorrt_llm"]), plan)


def _refuse_unsupported(config: PretrainedConfig, sm: int) -> None:
    quantization = config.quantization
    names = [str(name) for name in (quantization.quant_algo, quantization.kv_cache_quant_algo) if name]
    if not 100 <= sm < 120:
        return
    for name in names:
        is_weight_only = name in (QuantAlgo.W8A16, QuantAlgo.W4A16, QuantAlgo.INT8)
        if is_weight_only or name.startswith("W8A8_SQ") or "PER_CHANNEL" in name or "PER_TOKEN" in name:
            raise RuntimeError(f"{name} is not supported on SM{sm}")


def _fill_in(build_config: BuildConfig, config: PretrainedConfig) -> None:
    build_config.update_kv_cache_type(config.architecture)
    longest = config.max_position_embeddings or 2048
    if build_config.max_seq_len is None:
        build_config.max_seq_len = longest
        machine.log("I", f"max_seq_len is not specified, using deduced value {longest}")
    elif build_config.max_seq_len > longest:
        machine.log("W", f"max_seq_len {build_config.max_seq_len} is larger than max_position_embeddings {longest}")
    if build_config.max_input_len > build_config.max_seq_len:
        machine.log("W", f"max_input_len is clipped to max_seq_len {build_config.max_seq_len}")
        build_config.max_input_len = build_config.max_seq_len
    most, least = build_config.max_seq_len * build_config.max_batch_size, build_config.plugin_config.tokens_per_block
    if build_config.max_num_tokens > most:
        machine.log("W", f"max_num_tokens is set to max_seq_len * max_batch_size = {most}")
        build_config.max_num_tokens = most
    elif build_config.max_num_tokens < least:
        machine.log("W", f"max_num_tokens is set to tokens_per_block {least}; it needs context chunking at runtime")
        build_config.max_num_tokens = least
    if build_config.opt_num_tokens is None:
        widest = build_config.max_batch_size * build_config.max_beam_width
        build_config.opt_num_tokens = min(widest, build_config.max_num_tokens)
    plugins = build_config.plugin_config
    plugins.dtype = config.dtype
    plugins.nccl_plugin = config.dtype if config.mapping.world_size > 1 else None
    if config.quantization.quant_algo in (QuantAlgo.W8A16, QuantAlgo.W4A16):
        plugins.weight_only_quant_matmul_plugin = config.dtype


def _override(build_config: BuildConfig, config: PretrainedConfig, sm: int) -> None:
    """The library changes what does not go together, and says so in its log only."""
    plugins, quantization = build_config.plugin_config, config.quantization
    kv_algorithm = quantization.kv_cache_quant_algo
    has_fp8_weights = quantization.quant_algo in (QuantAlgo.FP8, QuantAlgo.W4A8_AWQ, QuantAlgo.NVFP4)
    if not plugins.context_fmha:
        plugins.use_paged_context_fmha = plugins.use_fp8_context_fmha = False
    if plugins.use_fp8_context_fmha and not (has_fp8_weights and sm >= 89):
        plugins.use_fp8_context_fmha = False
    if plugins.use_paged_context_fmha and kv_algorithm is not None:
        is_fp8 = kv_algorithm == QuantAlgo.FP8 and has_fp8_weights and sm >= 89
        plugins.use_fp8_context_fmha = is_fp8
        plugins.use_paged_context_fmha = is_fp8
        if not is_fp8:
            machine.log("W", f"use_paged_context_fmha is disabled because of the {kv_algorithm} KV cache")
    elif plugins.use_paged_context_fmha:
        plugins.use_fp8_context_fmha = False
    if plugins.reduce_fusion and config.mapping.tp_size == 1:
        plugins.reduce_fusion = False


def _use_timing_cache(build_config: BuildConfig, rank: int) -> None:
    if build_config.input_timing_cache is not None and Path(build_config.input_timing_cache).exists():
        machine.log("I", f"Loaded timing cache from {build_config.input_timing_cache}")
    seconds = machine.faults().get("build_seconds", 0)
    time.sleep(seconds)
    if rank == 0:
        try:
            Path(build_config.output_timing_cache).write_bytes(b"timing cache")
        except OSError as error:
            raise AssertionError("Failed to save timing cache.") from error
