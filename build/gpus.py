"""The NVIDIA GPUs of this machine, as the driver names them."""

from __future__ import annotations

import csv
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """`product` as in the label nvidia.com/gpu.product: the driver's name with '-' for spaces. Memory in MiB."""

    product: str
    compute_capability: str
    memory_mib: int


def find_gpus() -> list[Gpu]:
    """All visible GPUs; none where there is no driver, or it does not answer."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return []
    return [
        Gpu(product=name.replace(" ", "-"), compute_capability=capability, memory_mib=int(memory))
        for name, capability, memory in csv.reader(output.splitlines(), skipinitialspace=True)
    ]
