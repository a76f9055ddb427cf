"""From an engine folder to a running TensorRT-LLM `LLM`: what is checked, set up and passed, for both engine kinds.

    tensorrt   TensorRT plans, by `tensorrt_llm._tensorrt_engine.LLM` (TensorRT-LLM 1.2; removed from later releases)
    pytorch    a Hugging Face checkpoint, by `tensorrt_llm.LLM`

`tensorrt_llm` is imported in `import_library` and nowhere before: importing it opens CUDA and MPI, whose children take
over the devices and the MPI identity that they find then. Facts about the library were read in its 1.2.1 documentation
and in sources of near versions; docs/gpu.md says which were seen on a GPU.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from engine_manifest import EngineManifest, ManifestError, major_and_minor
from generation import Capability, EngineError
from gpus import Gpu, pin_environment
from library_environment import library_environment
from trtllm_installation import has_engine_backend, pytorch_architectures, versions

LLM_ARGUMENTS_NAME = "llm_args.json"  # the user's own arguments, which the build has checked

# Arguments that are objects of the library: a misspelled name in a dict of ours must not vanish.
_ARGUMENT_CLASSES = {
    "build_config": "BuildConfig",
    "kv_cache_config": "KvCacheConfig",
    "scheduler_config": "SchedulerConfig",
    "cuda_graph_config": "CudaGraphConfig",
}
_SINCE_TORCH_SAMPLER_IS_COMPLETE = (1, 3)  # TensorRT-LLM pull requests 16485 (penalties) and 17172 (seeds)


@dataclass(frozen=True, kw_only=True)
class LlmPlan:
    """How one engine is to be run here. `arguments` are those of the LLM's constructor, as plain data."""

    engine: str
    gpus: Sequence[Gpu]  # one per rank
    arguments: Mapping[str, Any]
    capabilities: frozenset[Capability]


def plan_llm(folder: Path, manifest: EngineManifest, gpus: Sequence[Gpu]) -> LlmPlan:
    """Decide everything, without importing the library. Raises ManifestError for an engine that is not what it says.

    `gpus` are those that the engine may use, at least one per rank.
    """
    users = _read_object(folder / LLM_ARGUMENTS_NAME)
    limits = manifest.limits
    arguments: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,  # token ids go in and come out; this server has its own tokenizer
        "tensor_parallel_size": manifest.tensor_parallel,
        "pipeline_parallel_size": manifest.pipeline_parallel,
        "gpus_per_node": manifest.world_size,
        "max_batch_size": limits["max_batch_size"],
        "max_input_len": limits["max_input_len"],
        "max_seq_len": limits["max_seq_len"],
        "max_beam_width": limits["max_beam_width"],
        "kv_cache_config": {},
    }
    if manifest.engine == "tensorrt":
        arguments |= _check_engine_config(folder, manifest)
        capabilities: set[Capability] = {"bad_words", "min_tokens", "no_end_id", "penalties", "seed"}
    else:
        _check_architecture(manifest)
        sampler = users.get("sampler_type", _best_sampler())
        arguments |= {
            "dtype": manifest.dtype,
            "enable_iter_perf_stats": True,  # without it there are no statistics
            "sampler_type": sampler,
        }
        capabilities = {"log_probs", "min_tokens", "no_end_id"}
        if sampler == "TRTLLMSampler":
            capabilities |= {"bad_words", "penalties", "seed"}
        elif _library_version() >= _SINCE_TORCH_SAMPLER_IS_COMPLETE:
            capabilities |= {"penalties", "seed"}
    return LlmPlan(
        engine=manifest.engine,
        gpus=gpus[: manifest.world_size],
        arguments=_merged(arguments, users),
        capabilities=frozenset(capabilities),
    )


def _merged(ours: Mapping[str, Any], users: Mapping[str, Any]) -> dict[str, Any]:
    """The user's values win, also one by one inside of kv_cache_config."""
    result = dict(ours)
    for name, value in users.items():
        before = result.get(name)
        result[name] = before | value if isinstance(before, dict) and isinstance(value, dict) else value
    return result


@dataclass(frozen=True, kw_only=True)
class Library:
    """What is used of the imported library."""

    llm: Callable[..., Any]  # the class LLM of the engine's kind
    sampling_params: Callable[..., Any]
    request_error: type[Exception]  # of one request; whatever else it raises is the end of the LLM
    llmapi: ModuleType

    def start(self, plan: LlmPlan) -> Any:
        """An `LLM`, with the engine loaded. Takes seconds to minutes, and raises what the library raises."""
        arguments = {
            name: getattr(self.llmapi, _ARGUMENT_CLASSES[name])(**value)
            if name in _ARGUMENT_CLASSES and value is not None
            else value
            for name, value in plan.arguments.items()
        }
        return self.llm(**arguments)


def import_library(plan: LlmPlan) -> Library:
    """Set this process up for the plan's GPUs and import TensorRT-LLM. To be called once, from the main thread.

    Raises EngineError.
    """
    if "tensorrt_llm" in sys.modules:
        raise EngineError("this process has run TensorRT-LLM before, which can be started once per process; restart it")
    _set_up_environment(plan.gpus)
    try:
        if plan.engine == "tensorrt":
            from tensorrt_llm._tensorrt_engine import LLM
        else:
            from tensorrt_llm import LLM
        from tensorrt_llm import SamplingParams, llmapi
    except Exception as error:  # an ImportError, or what CUDA and MPI raise when they cannot be loaded
        raise EngineError(f"TensorRT-LLM cannot be imported: {type(error).__name__}: {error}") from error
    return Library(llm=LLM, sampling_params=SamplingParams, request_error=llmapi.RequestError, llmapi=llmapi)


# ---- the engine's own record -----------------------------------------------------------------------------------------


def _check_engine_config(folder: Path, manifest: EngineManifest) -> dict[str, Any]:
    """The limits that the engine was really built with, as arguments.

    TensorRT-LLM resolves its own defaults before it reads the engine's config.json, so each is passed. Raises
    ManifestError where config.json, which TensorRT-LLM wrote, and engine.json, which we wrote, tell different things.
    """
    path = folder / "config.json"
    config = _read_object(path)
    try:
        mapping = config["pretrained_config"]["mapping"]
        built = config["build_config"]
        layout = (mapping["tp_size"], mapping["pp_size"])
        limits = {name: built[name] for name in ("max_batch_size", "max_input_len", "max_seq_len", "max_beam_width")}
        max_num_tokens = built["max_num_tokens"]
        has_paged_context = bool(built["plugin_config"]["use_paged_context_fmha"])
        version = config["version"]
    except (KeyError, TypeError) as error:
        raise ManifestError(f"{path} is not that of a TensorRT-LLM engine ({error} is missing); {_REBUILD}") from None
    expected = (manifest.tensor_parallel, manifest.pipeline_parallel)
    ranks = sorted(name for name in manifest.files if re.fullmatch(r"rank\d+\.engine", name))
    for what, found, said in (
        ("layout (TP, PP)", layout, expected),
        ("ranks", len(ranks), manifest.world_size),
        ("TensorRT-LLM version", version, manifest.versions.get("tensorrt_llm")),
        *((name, limits[name], manifest.limits[name]) for name in limits),
    ):
        if found != said:
            raise ManifestError(
                f"{folder} holds an engine with {what} {found}, and engine.json says {said}; {_REBUILD}"
            )
    return limits | {
        "max_num_tokens": max_num_tokens,
        # Limits are cut to those of this one before the engine's own takes its place; by default to 8192 tokens.
        "build_config": limits | {"max_num_tokens": max_num_tokens},
        "enable_chunked_prefill": has_paged_context,
        # Reuse of KV blocks needs it as well.
        "kv_cache_config": {"enable_block_reuse": has_paged_context},
    }


_REBUILD = "build it again with --force"


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(f"{path} is missing; copy the engine again, or {_REBUILD}") from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ManifestError(f"{path} is not JSON ({error}); {_REBUILD}") from None
    if not isinstance(content, dict):
        raise ManifestError(f"{path} is not a JSON object; {_REBUILD}")
    return content


# ---- the installation ------------------------------------------------------------------------------------------------


def check_installation(manifest: EngineManifest) -> None:
    """Whether a TensorRT-LLM is installed that has this kind of engine. Raises ManifestError."""
    installed = versions()
    if "tensorrt_llm" not in installed:
        raise ManifestError(
            f"the engine is of the kind {manifest.engine} and TensorRT-LLM is not installed here; "
            "serve it in NVIDIA's tritonserver container with TensorRT-LLM, or rebuild with --engine openvino"
        )
    if manifest.engine == "tensorrt" and not has_engine_backend():
        raise ManifestError(
            f"the engine holds TensorRT plans, and TensorRT-LLM {installed['tensorrt_llm']} here runs none any more; "
            "rebuild with --engine pytorch, or serve it in a container with TensorRT-LLM 1.2"
        )


def _check_architecture(manifest: EngineManifest) -> None:
    known = pytorch_architectures()
    if known is not None and manifest.architecture not in known:
        raise ManifestError(
            f"the engine is a {manifest.architecture}, which the PyTorch backend of TensorRT-LLM "
            f"{versions().get('tensorrt_llm')} here does not have; serve it in a container with a release that has it"
        )


def _best_sampler() -> str:
    """The sampler that does what a request asks for.

    The default of TensorRT-LLM 1.2, TorchSampler, takes penalties, bad words and seeds and ignores them.
    """
    return "auto" if _library_version() >= _SINCE_TORCH_SAMPLER_IS_COMPLETE else "TRTLLMSampler"


def _library_version() -> tuple[int, int]:
    return major_and_minor(versions().get("tensorrt_llm")) or (0, 0)


# ---- the process -----------------------------------------------------------------------------------------------------


def _set_up_environment(gpus: Sequence[Gpu]) -> None:
    """Devices by numbers: parts of TensorRT-LLM cannot read GPU UUIDs."""
    visible = pin_environment(gpus)
    # What later releases make CUDA_VISIBLE_DEVICES of in the processes of the ranks.
    wanted = library_environment(os.environ) | visible | {"TRTLLM_VISIBLE_DEVICES": visible["CUDA_VISIBLE_DEVICES"]}
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    os.environ.update(wanted)
