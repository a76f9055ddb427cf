"""What the PyTorch backend has: every modeling_*.py of this folder registers architectures, as in the library."""

import importlib
from pathlib import Path

from .modeling_utils import MODEL_CLASS_MAPPING

for _file in sorted(Path(__path__[0]).glob("modeling_*.py")):
    importlib.import_module(f"{__name__}.{_file.stem}")

__all__ = ["MODEL_CLASS_MAPPING"]
