"""The environment of a process that runs TensorRT-LLM: what it must not inherit, and what it cannot do without.

The builder and the server both need it: `build/library_environment.py` is a link to this file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

# What mpirun and srun leave in the environment of whatever they start. `import tensorrt_llm` takes up such an identity:
# it joins that world and waits for the others, and the ranks that it starts itself look for a parent that is not
# theirs. Configuration (other OMPI_MCA_*, PMIX_MCA_*) stays. The list is that of NVIDIA's Triton model for the LLM API.
_MPI_IDENTITY = frozenset(
    [f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK", "NODE_RANK")]
    + ["OMPI_UNIVERSE_SIZE", "OMPI_FIRST_RANKS", "OMPI_APP_CTX_NUM_PROCS"]
    + [f"PMIX_{name}" for name in ("RANK", "NAMESPACE", "SERVER_TMPDIR", "SYSTEM_TMPDIR", "SECURITY_MODE")]
    + [f"PMIX_SERVER_URI{number}" for number in ("", "2", "21", "3")]
    + [f"PMIX_{name}" for name in ("GDS_MODULE", "BFROPS_MODULE", "PTL_MODULE", "VERSION", "HOSTNAME")]
    + [f"PMI_{name}" for name in ("RANK", "SIZE", "FD", "SPAWNED", "APPNUM")]
)
_MPI_IDENTITY_PREFIXES = ("OMPI_MCA_orte_", "ORTE_")

# Where the library and what it imports write. flashinfer makes a folder and a log while it is imported, and what it
# raises there (not an ImportError) ends the import of tensorrt_llm.
_CACHES = ("FLASHINFER_WORKSPACE_BASE", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def library_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` as TensorRT-LLM needs it. Makes a folder for its caches where the home folder cannot be written."""
    dropped = {name for name in environment if name in _MPI_IDENTITY or name.startswith(_MPI_IDENTITY_PREFIXES)}
    changed = {name: value for name, value in environment.items() if name not in dropped}
    # Open MPI starts no more ranks than it counts cores, and a container may have fewer than GPUs.
    changed.setdefault("OMPI_MCA_rmaps_base_oversubscribe", "1")
    if not _has_home(environment):
        home = tempfile.mkdtemp(prefix="tensorrt-llm-")
        changed["HOME"] = home
        for name in _CACHES:
            changed.setdefault(name, home)
    return changed


def _has_home(environment: Mapping[str, str]) -> bool:
    home = environment.get("HOME")
    return bool(home) and Path(home).is_dir() and os.access(home, os.W_OK | os.X_OK)
