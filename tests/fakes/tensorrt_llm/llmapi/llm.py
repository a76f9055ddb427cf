"""The two LLM classes: for TensorRT engines, and for checkpoints with the PyTorch backend."""

from __future__ import annotations

import atexit
import json
import os
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .._double import checkpoints, machine
from .._double.contract import ValidationError, bind, checked, parameters
from .._double.executor import Executor
from .._double.records import KvCacheConfig, SamplingParams, SchedulerConfig
from .._torch.models import MODEL_CLASS_MAPPING
from ..executor.result import IterationResult, RequestOutput, running_loop
from ..executor.utils import RequestError

__all__ = ["LLM", "KvCacheConfig", "SchedulerConfig"]

_ENGINE = "LLM(TensorRT)"
_PYTORCH = "LLM(PyTorch)"
_LEAST_SM = {"FP8": 89, "NVFP4": 100}
# What the double computes, or what changes nothing for token ids. Everything else must have its default.
_KNOWN_SAMPLING = {
    *("end_id", "pad_id", "max_tokens", "min_tokens", "ignore_eos", "stop", "bad", "stop_token_ids", "bad_token_ids"),
    *("include_stop_str_in_output", "n", "best_of", "use_beam_search", "temperature", "top_k", "top_p", "min_p"),
    *("seed", "repetition_penalty", "presence_penalty", "frequency_penalty", "prompt_ignore_length", "logprobs"),
    *("prompt_logprobs", "return_perf_metrics", "detokenize", "add_special_tokens", "skip_special_tokens"),
    "spaces_between_special_tokens",
}


async def _nothing() -> AsyncIterator[dict[str, Any]]:
    for item in ():
        yield item


class BaseLLM:
    _contract = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._executor: Executor | None = None
        for name in kwargs.keys() - parameters(self._contract).keys():
            self._refuse_unknown(name)
        arguments = bind(self._contract, args, kwargs)
        self.args = SimpleNamespace(**arguments)
        machine.need_gpu()  # validating dtype asks for the first GPU's properties
        if not self.args.skip_tokenizer_init:
            raise NotImplementedError("the double: only skip_tokenizer_init=True")
        settings = self._load(Path(self.args.model))
        world_size, num_gpus = settings["tp_size"] * settings["pp_size"], len(machine.visible_gpus())
        if min(world_size, self.args.gpus_per_node or world_size) > num_gpus:
            raise RuntimeError(f"Only {num_gpus} GPUs are available, but {world_size} are required.")
        self._limits = settings
        self._executor = Executor(settings)
        atexit.register(_shut_down, weakref.ref(self))

    def _refuse_unknown(self, name: str) -> None:
        raise ValueError(f"{type(self).__name__} got invalid argument: {name}")

    def _load(self, folder: Path) -> dict[str, Any]:
        raise NotImplementedError

    def _settings(self, folder: Path, **more: Any) -> dict[str, Any]:
        kv = self.args.kv_cache_config
        return {
            "folder": str(folder.absolute()),
            "chunks": self.args.enable_chunked_prefill,
            "kv_max_tokens": kv.max_tokens,
            "kv_fraction": kv.free_gpu_memory_fraction,
            "kv_dtype": kv.dtype,
            "reuses_blocks": kv.enable_block_reuse and os.environ.get("FORCE_DETERMINISTIC") != "1",
            "tokens_per_block": kv.tokens_per_block,
            "stream_interval": 1,
            "has_statistics": True,
            "has_torch_sampler": False,
            **more,
        }

    @checked("LLM.generate_async")
    def generate_async(self, inputs: Any, sampling_params: Any, streaming: bool, **rest: Any) -> RequestOutput:
        """A plain function: what is wrong is raised here, not by the iteration."""
        if self._executor is None or self._executor.is_shut_down:
            raise RuntimeError("LLM is shutting down")
        if any(value is not None for value in rest.values()):
            raise NotImplementedError(f"the double: one of {', '.join(rest)}")
        params = self._prepare(sampling_params)
        prompt = inputs.get("prompt_token_ids") if isinstance(inputs, dict) else inputs
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise TypeError(f"The inputs must be type str or list of int, but got {type(inputs)}")
        self._check_arguments(len(prompt), params)
        if not prompt:
            raise IndexError("list index out of range")
        for name, known in SamplingParams.model_fields.items():
            if name not in _KNOWN_SAMPLING and getattr(params, name) != known.default:
                raise NotImplementedError(f"the double: SamplingParams.{name} = {getattr(params, name)!r}")
        if params.use_beam_search or params.best_of > 1:
            raise NotImplementedError("the double: several answers to one prompt")
        executor = self._executor
        if executor.statistics is None:
            executor.statistics = IterationResult()
        else:
            executor.statistics.mark_undone()
        result = RequestOutput._make(executor, list(prompt), params, streaming)
        executor.submit(result, running_loop())
        return result

    def _prepare(self, params: SamplingParams | None) -> SamplingParams:
        params = params or SamplingParams()
        if params.end_id is None:
            raise ValueError(
                "tokenizer is required to reset end_id if it is None, or you can explicitly specify the end_id for "
                "sampling_params"
            )
        for name in ("stop", "bad"):
            if getattr(params, name) is not None:  # set up only where there is a tokenizer and no end_id
                raise RuntimeError(
                    f"SamplingParams.{name} is not processed by tokenizer, please call the setup method."
                )
        if params._used:
            raise RuntimeError(
                "the double: a SamplingParams submitted twice; the library changes the instance, so each request "
                "needs its own"
            )
        object.__setattr__(params, "_used", True)
        return params

    def _check_arguments(self, num_prompt_tokens: int, params: SamplingParams) -> None:
        raise NotImplementedError

    @checked("LLM.get_stats")
    def get_stats(self, timeout: float | None) -> list[dict[str, Any]]:
        statistics = self._executor.statistics
        if statistics is None:
            return []
        statistics.set_timeout(timeout)
        return statistics.get_results()

    @checked("LLM.get_stats_async")
    def get_stats_async(self, timeout: float | None) -> Any:
        statistics = self._executor.statistics
        if statistics is None:
            return _nothing()
        statistics.set_timeout(timeout)
        return statistics

    def shutdown(self) -> None:
        if self._executor is not None:
            self._executor.is_dropped = True
            self._executor.shutdown()
            self._executor = None

    def __enter__(self) -> BaseLLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()

    def __del__(self) -> None:
        if getattr(self, "_executor", None) is not None:
            self.shutdown()

    def __getstate__(self) -> None:
        raise RuntimeError("LLM object can not be pickled.")


def _shut_down(reference: weakref.ref[BaseLLM]) -> None:
    llm = reference()
    if llm is not None:
        llm.shutdown()


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"Failed to infer model format because no config.json exists in {folder}")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"Inferred model format, but failed to load config.json: {error}") from None


class _TrtLLM(BaseLLM):
    _contract = _ENGINE

    def _load(self, folder: Path) -> dict[str, Any]:
        args, content = self.args, _read_config(folder)
        if args.kv_cache_config.dtype != "auto":
            raise ValidationError("KvCacheConfig.dtype is not supported by the TensorRT backend.")
        if not {"pretrained_config", "build_config"} <= content.keys():
            raise NotImplementedError("the double: a TensorRT engine folder only; it builds none in the constructor")
        pretrained, build_config = content["pretrained_config"], content["build_config"]
        for name, given in (("tp", args.tensor_parallel_size), ("pp", args.pipeline_parallel_size)):
            engine = pretrained["mapping"][f"{name}_size"]
            if given not in (1, engine):
                raise ValueError(f"{name}_size {given} is not consistent with the engine's {name}_size {engine}")
        if pretrained.get("runtime_defaults"):
            raise AttributeError("'KvCacheConfig' object has no attribute 'fill_empty_fields_from_runtime_defaults'")
        if args.guided_decoding_backend not in (None, "xgrammar"):
            raise ValueError(f"Unsupported guided decoding backend {args.guided_decoding_backend}")
        if args.enable_chunked_prefill and not build_config["plugin_config"]["use_paged_context_fmha"]:
            raise RuntimeError("the double: chunked prefill needs an engine with use_paged_context_fmha")
        self._check_limits(build_config)
        max_num_tokens = args.max_num_tokens or build_config["max_num_tokens"]
        # With packed input and fused attention, the default, the engine's max_input_len is of no account.
        longest = build_config["max_seq_len"] - 1
        max_input_len = longest if args.enable_chunked_prefill else min(longest, max_num_tokens)
        return self._settings(
            folder,
            is_engine=True,
            tp_size=pretrained["mapping"]["tp_size"],
            pp_size=pretrained["mapping"]["pp_size"],
            dtype=None,
            max_batch_size=args.max_batch_size or build_config["max_batch_size"],
            max_num_tokens=max_num_tokens,
            max_seq_len=build_config["max_seq_len"],
            max_input_len=max_input_len,
            tokens_per_block=build_config["plugin_config"]["tokens_per_block"],
            reuses_blocks=args.kv_cache_config.enable_block_reuse
            and build_config["plugin_config"]["use_paged_context_fmha"],
            gathers_context=build_config["gather_context_logits"],
        )

    def _check_limits(self, build_config: dict[str, Any]) -> None:
        """Whether the executor clamps or rejects is not known, so the double rejects."""
        for name in ("max_batch_size", "max_num_tokens", "max_beam_width", "max_seq_len", "max_input_len"):
            given, built = getattr(self.args, name), build_config[name]
            if given is not None and given > built:
                raise RuntimeError(
                    f"the double: {name} {given} is more than the engine's {built}; not given, max_num_tokens is 8192 "
                    "whatever the engine was built with"
                )

    def _check_arguments(self, num_prompt_tokens: int, params: SamplingParams) -> None:
        limits, asked = self._limits, params.max_tokens or 0
        if not self.args.enable_chunked_prefill and num_prompt_tokens + asked > limits["max_seq_len"]:
            raise ValueError(
                f"The sum of prompt length ({num_prompt_tokens}) and query length (0) max_tokens "
                f"({params.max_tokens}) should not exceed max_seq_len ({limits['max_seq_len']})"
            )
        if params.use_beam_search and params.best_of > (self.args.max_beam_width or 1):
            raise ValueError(
                f"sampling_params.n ({params.n}) cannot exceed max_beam_width when use_beam_search is True"
            )
        if not params.use_beam_search and params.best_of > limits["max_batch_size"]:
            raise ValueError(
                f"sampling_params.n ({params.n}) cannot exceed max_batch_size ({limits['max_batch_size']})"
            )
        if params.prompt_logprobs and not limits["gathers_context"]:
            raise ValueError("`sampling_params's prompt_logprobs` requires `gather_context_logits=True` in BuildConfig")
        if params.logprobs and not self.args.gather_generation_logits:
            raise ValueError(
                f"`sampling_params.logprobs={params.logprobs}` requires `gather_generation_logits=True` to be passed "
                "explicitly to the `LLM()` constructor."
            )

    @checked("LLM.save")
    def save(self, engine_dir: str) -> None:
        raise NotImplementedError("the double: engines are built with build() and saved with Engine.save()")


class LLM(BaseLLM):
    _contract = _PYTORCH

    def _refuse_unknown(self, name: str) -> None:
        if name in parameters(_ENGINE):
            raise ValueError(
                f"The argument '{name}' is of the TensorRT engine backend; use "
                "`from tensorrt_llm._tensorrt_engine import LLM` for it"
            )
        super()._refuse_unknown(name)

    def _load(self, folder: Path) -> dict[str, Any]:
        args, content = self.args, _read_config(folder)
        if {"pretrained_config", "build_config"} <= content.keys():
            raise ValueError(f"{folder} is a TensorRT engine, which the PyTorch backend does not load")
        quantization = folder / "hf_quant_config.json"
        algorithm = None
        if quantization.exists():
            algorithm = json.loads(quantization.read_text())["quantization"].get("quant_algo")
        sm = machine.need_gpu().sm
        if sm < _LEAST_SM.get(algorithm, 0):
            raise RuntimeError(f"{algorithm} weights need SM {_LEAST_SM[algorithm]} or newer, this GPU is SM {sm}")
        architecture = content["architectures"][0]
        if architecture not in MODEL_CLASS_MAPPING:
            unknown = ValueError(f"Unknown architecture for AutoModelForCausalLM: {architecture}")
            raise RuntimeError("Executor worker returned error") from unknown
        max_positions = checkpoints.describe(content)["max_position_embeddings"]
        max_seq_len = args.max_seq_len or max_positions
        return self._settings(
            folder,
            is_engine=False,
            tp_size=args.tensor_parallel_size,
            pp_size=args.pipeline_parallel_size,
            dtype=None if args.dtype == "auto" else args.dtype,
            max_batch_size=args.max_batch_size or 2048,
            max_num_tokens=args.max_num_tokens or 8192,
            max_seq_len=min(max_seq_len, max_positions),
            max_input_len=args.max_input_len or max_seq_len,
            stream_interval=args.stream_interval,
            has_statistics=args.enable_iter_perf_stats,
            # "auto" is TorchSampler, where there is one beam.
            has_torch_sampler=args.sampler_type != "TRTLLMSampler",
        )

    def _check_arguments(self, num_prompt_tokens: int, params: SamplingParams) -> None:
        limit = self._limits["max_num_tokens"]
        if not self.args.enable_chunked_prefill and num_prompt_tokens > limit:
            raise RequestError(
                f"The sum of prompt length ({num_prompt_tokens}), query length (0) should not exceed max_num_tokens "
                f"({limit})"
            )
        if params.prompt_logprobs:
            raise NotImplementedError("the double: prompt_logprobs")
