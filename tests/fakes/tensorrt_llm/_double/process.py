"""What the process as a whole is doing."""

from __future__ import annotations

import os

from . import machine

num_engines = 0  # LLMs that have been made and not shut down


def obey_build_faults(rank: int) -> None:
    faults = machine.faults()
    if faults.get("build_dies_at_rank") == rank:
        os._exit(139)
    if faults.get("build_fails_at_rank") == rank:
        raise RuntimeError(faults.get("build_error", "Failed to build the TensorRT engine"))
