"""The NVIDIA GPUs of this machine, as the driver names them, and as CUDA_VISIBLE_DEVICES leaves them to this process.

The builder and the server both ask: `build/gpus.py` is a link to this file.

What is not covered: parts of a GPU (MIG). Whole GPUs are listed whether or not they are divided, and a part's name in
CUDA_VISIBLE_DEVICES counts as unknown. An index there is taken as nvidia-smi's, which is CUDA's own with
CUDA_DEVICE_ORDER=PCI_BUS_ID; without it CUDA puts the fastest first, which matters on machines with several products.
"""

from __future__ import annotations

import csv
import logging
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0  # nvidia-smi takes some on a large machine without the persistence daemon
FIELDS = ("index", "uuid", "name", "compute_cap", "memory.total")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """`product` as in the label nvidia.com/gpu.product: the driver's name with '-' for spaces."""

    index: int  # nvidia-smi's, in the order of the PCI bus
    product: str
    compute_capability: str  # "9.0"
    memory_mib: int | None  # None where the GPU shares the machine's memory


def find_gpus() -> list[Gpu]:
    """All visible GPUs; none where there is no driver, or it does not answer."""
    found = _ask_driver()
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [gpu for _, gpu in found] if names is None else _visible(found, names)


def pin_environment(gpus: Sequence[Gpu]) -> dict[str, str]:
    """Environment variables with which a new process sees these GPUs and no other, as cuda:0, cuda:1, ..."""
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # else CUDA counts in another order than nvidia-smi
        "CUDA_VISIBLE_DEVICES": ",".join(str(gpu.index) for gpu in gpus),
    }


def _ask_driver() -> list[tuple[str, Gpu]]:
    """Each GPU with its UUID."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=True).stdout
    except subprocess.TimeoutExpired:
        log.warning("nvidia-smi does not answer within %g s; going on as if there were no GPU", ANSWER_SECONDS)
        return []
    except subprocess.CalledProcessError as error:
        said = " ".join((error.stdout + error.stderr).split()) or "nothing"
        log.warning("nvidia-smi ends with %d and says: %s; going on as if there were no GPU", error.returncode, said)
        return []
    except OSError as error:
        log.warning("nvidia-smi cannot be run (%s); going on as if there were no GPU", error.strerror)
        return []
    rows = [[value.strip() for value in row] for row in csv.reader(output.splitlines())]
    return [
        (
            uuid,
            Gpu(
                index=int(index),
                product=name.replace(" ", "-"),
                compute_capability=capability,
                memory_mib=int(memory) if memory.isdecimal() else None,  # "[N/A]"
            ),
        )
        for index, uuid, name, capability, memory in (row for row in rows if len(row) == len(FIELDS))
        if index.isdecimal()  # not "No devices were found"
    ]


def _visible(found: Sequence[tuple[str, Gpu]], names: str) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES names, in its order: indices, or as much of a UUID as tells one from the others.

    As CUDA reads it: what follows the first entry that names no GPU does not count, and one named twice means none.
    """
    visible: list[Gpu] = []
    for name in (part.strip() for part in names.split(",")):
        if name.isdecimal():
            matches = [gpu for _, gpu in found if gpu.index == int(name)]
        else:
            matches = [gpu for uuid, gpu in found if name.startswith("GPU-") and uuid.startswith(name)]
        if len(matches) != 1:
            break
        if matches[0] in visible:
            return []
        visible += matches
    return visible
