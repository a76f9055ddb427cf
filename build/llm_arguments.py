"""`--llm-args`: arguments for TensorRT-LLM's LLM class, checked here by name and type.

    --llm-args '{"kv_cache_config": {"free_gpu_memory_fraction": 0.8}}'        --llm-args @arguments.json

They decide how an engine is loaded, and are written beside it (llm_args.json). The table below is the part of
TrtLlmArgs and TorchLlmArgs of TensorRT-LLM 1.2.1 that an operator may want to set. What the build or the server sets
is refused, with the option that sets it, so that no value is given twice.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import UsageError

GPU_KINDS = ("tensorrt", "pytorch")
PYTORCH = ("pytorch",)
EXAMPLE = """'{"kv_cache_config": {"free_gpu_memory_fraction": 0.8}}'"""


@dataclass(frozen=True)
class _Value:
    """One argument. `least` and `most` bound a number, and the numbers of a list."""

    kind: type  # bool, int, float, str, or list for a list of whole numbers
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    is_nullable: bool = False
    engines: tuple[str, ...] = GPU_KINDS

    def problem(self, value: Any) -> str | None:
        """Ends the sentence "name is value, ...", or None."""
        if value is None and self.is_nullable:
            return None
        if self.kind is list:
            if not isinstance(value, list) or not value or not all(self._is_number(item, int) for item in value):
                return f"and must be a list of whole numbers{self._range()}"
        elif self.kind in (int, float):
            if not self._is_number(value, self.kind):
                return f"and must be a {'whole ' if self.kind is int else ''}number{self._range()}"
        elif type(value) is not self.kind:
            return f"and must be {'true or false' if self.kind is bool else 'a string'}"
        elif self.choices and value not in self.choices:
            return f"and must be one of {', '.join(self.choices)}"
        return None

    def _is_number(self, value: Any, kind: type) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
            return False
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def _range(self) -> str:
        if self.least is None:
            return ""
        return f" of {self.least:g} or more" if self.most is None else f" from {self.least:g} to {self.most:g}"


@dataclass(frozen=True)
class _Group:
    """Arguments that belong together: a configuration class of TensorRT-LLM."""

    values: Mapping[str, _Value]
    is_nullable: bool = False
    engines: tuple[str, ...] = GPU_KINDS


_FLAG = _Value(bool)
_TORCH_FLAG = _Value(bool, engines=PYTORCH)
_TORCH_COUNT = _Value(int, least=1, engines=PYTORCH)

# Names, types and bounds: tensorrt_llm/llmapi/llm_args.py of 1.2.1.
ARGUMENTS: dict[str, _Value | _Group] = {
    "kv_cache_config": _Group(
        {
            "free_gpu_memory_fraction": _Value(float, least=0, most=1),
            "enable_block_reuse": _FLAG,
            "enable_partial_reuse": _FLAG,
            "copy_on_partial_reuse": _FLAG,
            "host_cache_size": _Value(int, least=0, is_nullable=True),  # bytes
            "max_tokens": _Value(int, least=1, is_nullable=True),
            "max_attention_window": _Value(list, least=1, is_nullable=True),
            "sink_token_length": _Value(int, least=0, is_nullable=True),
        }
    ),
    "scheduler_config": _Group(
        {
            "capacity_scheduler_policy": _Value(
                str, choices=("GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH")
            ),
            "context_chunking_policy": _Value(
                str, choices=("FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS"), is_nullable=True
            ),
        }
    ),
    "max_num_tokens": _TORCH_COUNT,  # of one step; an engine has it in its config.json
    "enable_chunked_prefill": _TORCH_FLAG,
    "cuda_graph_config": _Group(
        {
            "max_batch_size": _Value(int, least=0),
            "batch_sizes": _Value(list, least=1, is_nullable=True),
            "enable_padding": _FLAG,
        },
        is_nullable=True,
        engines=PYTORCH,
    ),
    "attn_backend": _Value(str, choices=("TRTLLM", "FLASHINFER", "VANILLA"), engines=PYTORCH),
    "sampler_type": _Value(str, choices=("auto", "TorchSampler", "TRTLLMSampler"), engines=PYTORCH),
    "disable_overlap_scheduler": _TORCH_FLAG,
    "enable_autotuner": _TORCH_FLAG,
    "enable_attention_dp": _TORCH_FLAG,
    "moe_tensor_parallel_size": _TORCH_COUNT,
    "moe_expert_parallel_size": _TORCH_COUNT,
    "stream_interval": _TORCH_COUNT,
    "disable_flashinfer_sampling": _TORCH_FLAG,
    "allreduce_strategy": _Value(
        str,
        choices=(
            *("AUTO", "NCCL", "UB", "MINLATENCY", "ONESHOT", "TWOSHOT", "LOWPRECISION", "MNNVL"),
            "NCCL_SYMMETRIC",
        ),
        engines=PYTORCH,
    ),
    "load_format": _Value(str, choices=("auto", "dummy"), engines=PYTORCH),
    "fail_fast_on_attention_window_too_large": _FLAG,
}

# What the build or the server sets itself, and how to say it.
_LIMITS = "use --max-batch-size, --max-input-len and --max-seq-len"
_SERVER = "leave it out: the server sets it"
SET_ELSEWHERE: dict[str, str] = {
    "model": "use --model",
    "revision": "use --revision",
    "dtype": "use --dtype",
    "trust_remote_code": "use --trust-remote-code",
    "tensor_parallel_size": "use --tp",
    "pipeline_parallel_size": "use --pp",
    "max_batch_size": "use --max-batch-size",
    "max_input_len": "use --max-input-len",
    "max_seq_len": "use --max-seq-len",
    "build_config": _LIMITS,
    "quant_config": "use --quantization and --kv-cache-dtype",
    "calib_config": "use --calibration-data",
    "kv_cache_config.dtype": "use --kv-cache-dtype",
    "max_beam_width": "leave it out: engines on GPUs are served without beam search",
    "backend": "use --engine",
    "tokenizer": _SERVER,
    "tokenizer_mode": _SERVER,
    "tokenizer_revision": _SERVER,
    "skip_tokenizer_init": _SERVER,
    "gpus_per_node": _SERVER,
    "enable_iter_perf_stats": _SERVER,
    "return_perf_metrics": _SERVER,
    "gather_generation_logits": _SERVER,
}


def read(text: str) -> dict[str, Any]:
    """The object that the option's value is or, after '@', the named file holds. Raises UsageError."""
    source = "the value"
    if text.startswith("@"):
        source = f"the file {text[1:]}"
        try:
            text = Path(text[1:]).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UsageError(f"{source} cannot be read: {reason}; give a file with a JSON object") from error
    try:
        arguments = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source} is not JSON ({error}); write for instance {EXAMPLE}, or @FILE") from None
    if not isinstance(arguments, dict):
        raise UsageError(f"{source} is not a JSON object; write for instance {EXAMPLE}, or @FILE")
    return arguments


def check(arguments: Mapping[str, Any], engine: str) -> None:
    """Raises UsageError for a name that is unknown, set elsewhere or another engine kind's, and for a wrong value."""
    for name, value in arguments.items():
        known = _look_up(name, name, ARGUMENTS, engine)
        if isinstance(known, _Value):
            _check_value(name, known, value)
        elif value is None and known.is_nullable:
            continue
        elif not isinstance(value, dict):
            raise UsageError(f"--llm-args: {name} is {json.dumps(value)}, and must be an object{_or_null(known)}")
        else:
            for inner, inner_value in value.items():
                path = f"{name}.{inner}"
                _check_value(path, _look_up(path, inner, known.values, engine), inner_value)
    _check_graph_sizes(arguments.get("cuda_graph_config") or {})


def _look_up(path: str, name: str, table: Mapping[str, Any], engine: str) -> Any:
    if path in SET_ELSEWHERE and (path not in ARGUMENTS):
        raise UsageError(f"--llm-args: {path} is not for here; {SET_ELSEWHERE[path]}")
    known = table.get(name)
    prefix = path.removesuffix(name)
    if known is None:
        near = difflib.get_close_matches(name, table, n=1, cutoff=0.6)
        hint = f"perhaps you meant {prefix}{near[0]}" if near else f"known are {', '.join(sorted(table))}"
        raise UsageError(f"--llm-args: {path} is no argument known here; {hint}")
    if engine not in known.engines:
        raise UsageError(
            f"--llm-args: {path} is for --engine {' and '.join(known.engines)}, and this engine is {engine}; "
            "leave it out"
        )
    return known


def _check_value(path: str, known: _Value, value: Any) -> None:
    problem = known.problem(value)
    if problem is not None:
        raise UsageError(f"--llm-args: {path} is {json.dumps(value)}, {problem}{_or_null(known)}")


def _or_null(known: _Value | _Group) -> str:
    return ", or null" if known.is_nullable else ""


def _check_graph_sizes(config: Mapping[str, Any]) -> None:
    """CudaGraphConfig's own rule."""
    sizes, most = config.get("batch_sizes"), config.get("max_batch_size")
    if sizes and most and most != max(sizes):
        raise UsageError(
            f"--llm-args: cuda_graph_config.max_batch_size is {most}, and must be the largest of batch_sizes, "
            f"{max(sizes)}, where both are given; leave one out"
        )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets the last of two equal keys win, silently."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


def merged(defaults: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`arguments` over `defaults`, groups field by field."""
    result = dict(defaults)
    for name, value in arguments.items():
        before = result.get(name)
        result[name] = before | value if isinstance(before, dict) and isinstance(value, dict) else value
    return result
