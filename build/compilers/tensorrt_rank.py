"""One step of building a TensorRT engine, in a process of its own: quantizing a checkpoint, or building one rank.

    python tensorrt_rank.py JOB.json RESULT.json

compilers/tensorrt_compiler.py writes the job, sees to the environment (one GPU, no MPI) and to the log, and reads the
result. A process per step, because TensorRT and CUDA give their memory back only when a process ends, because
`IS_BUILDING` is one variable for a whole process, and because a crash then takes one rank with it.

The only program here that imports tensorrt_llm. Every call is written against TensorRT-LLM 1.2.1.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(argv: list[str]) -> int:
    job_path, result_path = Path(argv[0]), Path(argv[1])
    job = json.loads(job_path.read_text(encoding="utf-8"))
    _end_with(job["parent"])
    started = time.monotonic()
    try:
        result = STEPS[job["step"]](job) | {"seconds": time.monotonic() - started}
    except BaseException as error:  # the library raises AssertionError and SystemExit too
        traceback.print_exc()
        result = {
            "error": {"type": type(error).__name__, "message": str(error), "errno": getattr(error, "errno", None)}
        }
    new = result_path.with_suffix(".new")
    new.write_text(json.dumps(result), encoding="utf-8")
    os.replace(new, result_path)
    return 1 if "error" in result else 0


def _end_with(parent: int) -> None:
    """Be killed when the builder ends, however it does: nobody wants what is built here then."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def quantize(job: dict[str, Any]) -> dict[str, Any]:
    """Write config.json and the weights of every rank into the checkpoint folder."""
    from tensorrt_llm import Mapping

    folder = Path(job["output"])
    _model_class(job, "quantize").quantize(
        job["model"],
        str(folder),
        dtype=job["dtype"],
        mapping=Mapping(**job["mapping"], rank=0),
        quant_config=_quant_config(job["quantization"]),
        **({"calib_dataset": job["calib_dataset"]} if job["calib_dataset"] else {}),
    )
    # Some classes return without a word when they have no way to a format.
    expected = ["config.json", *(f"rank{rank}.safetensors" for rank in range(job["mapping"]["world_size"]))]
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing:
        raise RuntimeError(f"quantize() of {job['architecture']} ended without {', '.join(missing)}")
    return {}


def build(job: dict[str, Any]) -> dict[str, Any]:
    """Write rank{r}.engine, and for rank 0 config.json, into the output folder."""
    from tensorrt_llm import BuildConfig, Mapping, build
    from tensorrt_llm._utils import release_gc
    from tensorrt_llm.plugin import PluginConfig

    plugin_config = PluginConfig(**_known_fields(PluginConfig, job["plugin_config"]))
    build_config = BuildConfig(**_known_fields(BuildConfig, job["build_config"]), plugin_config=plugin_config)
    rank = job["rank"]
    if job["checkpoint"] is not None:
        model = _model_class(job, "from_checkpoint").from_checkpoint(job["checkpoint"], rank=rank)
    else:
        model = _model_class(job, "from_hugging_face").from_hugging_face(
            job["model"],
            dtype=job["dtype"],
            mapping=Mapping(**job["mapping"], rank=rank),
            # None and an empty QuantConfig are not the same to every class: Phi-3 loads its weights in another way.
            quant_config=_quant_config(job["quantization"]) if job["quantization"] else None,
            **job["conversion"],
        )
    engine = build(model, build_config)
    if engine.engine is None:
        raise RuntimeError("TensorRT built no engine; its log says why")
    found = engine.config.build_config  # build() works on a copy of ours
    result = {
        "limits": {name: getattr(found, name) for name in job["limits"]},
        "use_paged_context_fmha": bool(found.plugin_config.use_paged_context_fmha),
    }
    engine.save(job["output"])
    del engine, model
    release_gc()
    return result


def _model_class(job: dict[str, Any], method: str) -> Any:
    from tensorrt_llm.models import MODEL_MAP

    architecture = job["architecture"]
    found = MODEL_MAP.get(architecture)
    if found is None or not hasattr(found, method):
        what = f"class for {architecture}" if found is None else f"{method} for {architecture}"
        raise NotImplementedError(f"this TensorRT-LLM has no {what} in its engine backend")
    return found


def _quant_config(names: dict[str, Any]) -> Any:
    from tensorrt_llm.llmapi import QuantAlgo, QuantConfig

    algorithms = {name: getattr(QuantAlgo, value) for name, value in names.items() if isinstance(value, str)}
    return QuantConfig(**(names | algorithms))


def _known_fields(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """`values`, whose names are all fields: the library's own classes let a misspelled one vanish."""
    if unknown := sorted(values.keys() - kind.model_fields.keys()):
        raise TypeError(f"{kind.__name__} of this TensorRT-LLM has no field {', '.join(unknown)}")
    return values


STEPS = {"quantize": quantize, "build": build}

if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # without the endings of MPI, CUDA and TensorRT: a crash there would spoil a finished rank
