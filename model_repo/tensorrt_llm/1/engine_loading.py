"""From an engine folder to a running engine: the manifest decides which module runs it, and is checked first."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

from engine_manifest import EngineManifest, check_files, check_machine, read_manifest
from generation import Engine

_log = logging.getLogger(__name__)

# Engine kind -> its module and class. A module is imported only when its engine is there: a GPU image has no
# OpenVINO, a CPU image no TensorRT-LLM.
_ENGINES = {
    "openvino": ("openvino_engine", "OpenVinoEngine"),
    "synthetic": ("synthetic_engine", "SyntheticEngine"),
}


def load_engine(folder: Path) -> tuple[Engine, EngineManifest]:
    """Raises ManifestError, in one sentence, for an engine that is damaged or was built for something else."""
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    module_name, class_name = _ENGINES[manifest.engine]
    module = importlib.import_module(module_name)
    check_machine(manifest, gpu=None, versions=module.runtime_versions(), world_size=1)
    _log.info("loading %s (%s, %s, %s)", manifest.model, manifest.engine, manifest.dtype, manifest.quantization)
    return getattr(module, class_name)(folder, manifest), manifest
