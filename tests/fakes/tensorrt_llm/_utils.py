"""Helpers of the library that builders and servers use."""

from __future__ import annotations

import functools
import gc
import os

from ._double import machine

# Importing the library initialises MPI, and later changes of the environment do not change its world.
_WORLD_SIZE = int(os.environ.get("OMPI_COMM_WORLD_SIZE") or 1)
_RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK") or 0)


@functools.cache
def get_sm_version() -> int:
    return machine.need_gpu().sm


def release_gc() -> None:
    gc.collect()


def mpi_rank() -> int:
    return _RANK


def mpi_world_size() -> int:
    return _WORLD_SIZE


def global_mpi_rank() -> int:
    return _RANK


def global_mpi_size() -> int:
    return _WORLD_SIZE


def mpi_disabled() -> bool:
    return os.environ.get("TLLM_DISABLE_MPI") == "1"
