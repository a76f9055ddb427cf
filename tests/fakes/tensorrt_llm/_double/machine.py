"""The machine that the double believes to be on: GPUs, versions and faults, from the file of TENSORRT_LLM_DOUBLE.

The file is read again when it has changed, so that a test can inject faults while an engine runs.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

VARIABLE = "TENSORRT_LLM_DOUBLE"

# Once imported, the library has opened the GPUs it saw, and later changes of these variables come too late: the
# processes that MPI spawns go on with what was there at import.
_VISIBLE = os.environ.get("TRTLLM_VISIBLE_DEVICES") or os.environ.get("CUDA_VISIBLE_DEVICES")

_settings: tuple[Any, dict[str, Any]] = (None, {})


class Gpu(NamedTuple):
    name: str
    compute_capability: str
    memory_mib: int

    @property
    def sm(self) -> int:
        return int(self.compute_capability.replace(".", ""))


def settings() -> dict[str, Any]:
    global _settings
    path = Path(os.environ[VARIABLE])
    state = path.stat()
    stamp = (state.st_mtime_ns, state.st_ino, state.st_size)
    if stamp != _settings[0]:
        _settings = (stamp, json.loads(path.read_text()))
    return _settings[1]


def faults() -> dict[str, Any]:
    return settings().get("faults", {})


def visible_gpus() -> list[Gpu]:
    """In the order of the variable. CUDA stops at the first entry that names no GPU."""
    gpus = [Gpu(*gpu) for gpu in settings().get("gpus") or ()]
    if _VISIBLE is None:
        return gpus
    named = {str(index): gpu for index, gpu in enumerate(gpus)}
    named.update({f"GPU-{index:08d}": gpu for index, gpu in enumerate(gpus)})
    found = []
    for entry in (part.strip() for part in _VISIBLE.split(",")):
        if entry not in named:
            break
        found.append(named.pop(entry))
    return found


def need_gpu() -> Gpu:
    gpus = visible_gpus()
    if not gpus:
        raise RuntimeError("No CUDA GPUs are available")
    return gpus[0]


def allocate(num_bytes: int, gpu: Gpu) -> None:
    """Raises what torch raises when the GPU is too small; torch's class is a RuntimeError."""
    if num_bytes > gpu.memory_mib * 2**20:
        raise RuntimeError(
            f"CUDA out of memory. Tried to allocate {num_bytes / 2**20:.2f} MiB. GPU 0 has a total capacity of "
            f"{gpu.memory_mib} MiB of which {gpu.memory_mib} MiB is free."
        )


def log(level: str, message: str) -> None:
    """The library's log goes to stdout."""
    stamp = datetime.now().strftime("%m/%d/%Y-%H:%M:%S")
    print(f"[{stamp}] [TRT-LLM] [{level}] {message}", file=sys.stdout, flush=True)


def environment_of_children() -> dict[str, str]:
    """As this process's, but with the GPUs that it saw when the library was imported."""
    names = ("CUDA_VISIBLE_DEVICES", "TRTLLM_VISIBLE_DEVICES")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    return environment if _VISIBLE is None else {**environment, "CUDA_VISIBLE_DEVICES": _VISIBLE}
