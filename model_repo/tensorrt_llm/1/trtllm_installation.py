"""What TensorRT-LLM is installed here, found out without importing it.

Importing it takes many seconds, opens CUDA and MPI, and fails in ways of its own where something is missing. The
builder and the server both ask: `build/trtllm_installation.py` is a link to this file.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

# TensorRT's Python package is called after the CUDA release in some installations.
_TENSORRT_PACKAGES = (
    "tensorrt",
    "tensorrt_cu13",
    "tensorrt_cu12",
    "tensorrt_cu13_bindings",
    "tensorrt_cu12_bindings",
)
_IMPORT_SECONDS = 60
_REGISTERED = re.compile(r"""^@register_auto_model\(\s*["'](\w+)["']""", re.MULTILINE)


def versions() -> dict[str, str]:
    """Of "tensorrt_llm" and "tensorrt", those that are installed."""
    found = {"tensorrt_llm": _version("tensorrt_llm"), "tensorrt": _tensorrt_version()}
    return {name: version for name, version in found.items() if version is not None}


def has_engine_backend() -> bool:
    """Whether this TensorRT-LLM runs TensorRT engines. It was removed after 1.2; the version does not tell for sure."""
    return any((folder / "_tensorrt_engine").exists() for folder in _package_folders())


def pytorch_architectures() -> frozenset[str] | None:
    """What this TensorRT-LLM registers for its PyTorch backend; None where that cannot be read.

    A model that a user's own code registers is not among them.
    """
    found: set[str] = set()
    for folder in _package_folders():
        for path in (folder / "_torch/models").glob("*.py"):
            found.update(_REGISTERED.findall(path.read_text(encoding="utf-8", errors="replace")))
    return frozenset(found) or None


def _package_folders() -> list[Path]:
    """Where tensorrt_llm lies; none where it is not installed."""
    package = importlib.util.find_spec("tensorrt_llm")
    return [Path(folder) for folder in (package.submodule_search_locations or ())] if package is not None else []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _tensorrt_version() -> str | None:
    for package in _TENSORRT_PACKAGES:
        if version := _version(package):
            return version
    if importlib.util.find_spec("tensorrt") is None:
        return None
    # Installed without a record of it. Only TensorRT itself can say, in a process that may fail.
    # Inside Triton sys.executable is the stub, and its packages are those of the python3 that is first on PATH.
    python = sys.executable if Path(sys.executable).name.startswith("python") else shutil.which("python3")
    command = [str(python), "-c", "import tensorrt; print(tensorrt.__version__)"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
