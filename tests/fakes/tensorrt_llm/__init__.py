"""A double of TensorRT-LLM 1.2.1 for tests: strict about calls, true about behaviour, without a GPU.

It stands for the library on a machine without one. contract.json, derived from the fact sheet that the project wrote
of the library's documentation and of near versions of its source, says which names, parameters, types and defaults
there are; what is called otherwise fails, as it would there. The machine, its GPUs and versions, and the faults to
inject come from the file that the variable TENSORRT_LLM_DOUBLE names (trtllm_environment.py makes one); without the
variable the package refuses to be imported, as if it were not there. GPT-2 checkpoints are really converted, cut into
ranks and run, in numpy.

Where it is stricter than the library it says so in its messages ("the double: ..."): no wrong types, though pydantic
would convert many; a SamplingParams serves once; one event loop.

Its PyTorch backend runs GPT-2, which the library's does not have (trtllm_environment.py registers it on request).

What it does not cover: other models than GPT-2 (built, not run), beam search, speculative and guided decoding, LoRA,
prompt tuning, several nodes, the memory and time that anything takes, quantized arithmetic (weights stay exact), and
whatever the fact sheet marks as not confirmed.
"""

import os as _os
from pathlib import Path as _Path

if "TENSORRT_LLM_DOUBLE" not in _os.environ:
    raise ModuleNotFoundError("No module named 'tensorrt_llm'", name="tensorrt_llm")

from ._double import machine as _machine

__version__ = _machine.settings()["tensorrt_llm"]
print(f"[TensorRT-LLM] TensorRT LLM version: {__version__}", flush=True)  # to stdout, as the library does

from ._utils import mpi_rank, mpi_world_size
from .llmapi import KvCacheConfig, SamplingParams
from .llmapi.llm import LLM
from .mapping import Mapping

__all__ = ["LLM", "KvCacheConfig", "Mapping", "SamplingParams", "__version__", "mpi_rank", "mpi_world_size"]

if (_Path(__file__).parent / "_tensorrt_engine").exists():
    from .builder import BuildConfig, Engine, EngineConfig, build
    from .models import AutoModelForCausalLM

    __all__ += ["AutoModelForCausalLM", "BuildConfig", "Engine", "EngineConfig", "build"]
