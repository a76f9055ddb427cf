"""What mpirun and srun leave in the environment of whatever they start, and what must not reach TensorRT-LLM.

`import tensorrt_llm` takes up such an identity: it joins that world and waits for the others, and the processes of the
ranks that it starts itself look for a parent that is not theirs. Configuration (other OMPI_MCA_*, PMIX_MCA_*) stays.
The list is that of NVIDIA's Triton model for the LLM API. The builder and the server both need it:
`build/mpi_identity.py` is a link to this file.
"""

from __future__ import annotations

from collections.abc import Iterable

_NAMES = frozenset(
    [f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK", "NODE_RANK")]
    + ["OMPI_UNIVERSE_SIZE", "OMPI_FIRST_RANKS", "OMPI_APP_CTX_NUM_PROCS"]
    + [f"PMIX_{name}" for name in ("RANK", "NAMESPACE", "SERVER_TMPDIR", "SYSTEM_TMPDIR", "SECURITY_MODE")]
    + [f"PMIX_SERVER_URI{number}" for number in ("", "2", "21", "3")]
    + [f"PMIX_{name}" for name in ("GDS_MODULE", "BFROPS_MODULE", "PTL_MODULE", "VERSION", "HOSTNAME")]
    + [f"PMI_{name}" for name in ("RANK", "SIZE", "FD", "SPAWNED", "APPNUM")]
)
_PREFIXES = ("OMPI_MCA_orte_", "ORTE_")


def mpi_identity(names: Iterable[str]) -> set[str]:
    """Of these names of environment variables, those that are an identity."""
    return {name for name in names if name in _NAMES or name.startswith(_PREFIXES)}
