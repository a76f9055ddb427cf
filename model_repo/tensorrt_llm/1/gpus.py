"""The NVIDIA GPUs of this machine, as the driver names them."""

from __future__ import annotations

import csv
import logging
import shutil
import subprocess
from dataclasses import dataclass

log = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0  # nvidia-smi takes some on a large machine without the persistence daemon


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """`product` as in the label nvidia.com/gpu.product: the driver's name with '-' for spaces."""

    product: str
    compute_capability: str  # "9.0"
    memory_mib: int | None  # None where the GPU shares the machine's memory


def find_gpus() -> list[Gpu]:
    """All visible GPUs; none where there is no driver, or it does not answer."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total", "--format=csv,noheader,nounits"]
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
        Gpu(
            product=name.replace(" ", "-"),
            compute_capability=capability,
            memory_mib=int(memory) if memory.isdecimal() else None,  # "[N/A]"
        )
        for name, capability, memory in (row for row in rows if len(row) == 3)  # not "No devices were found"
    ]
