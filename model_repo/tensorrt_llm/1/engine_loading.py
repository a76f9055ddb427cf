"""From an engine folder to a running engine: the manifest decides which module runs it, and is checked first."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from engine_manifest import EngineManifest, check_files, check_machine, read_manifest
from generation import Engine
from gpus import Gpu, find_gpus

_log = logging.getLogger(__name__)


def load_engine(folder: Path) -> tuple[Engine, EngineManifest]:
    """Raises ManifestError, in one sentence, for an engine that is damaged or was built for something else."""
    manifest = read_manifest(folder)
    if manifest.engine in ("tensorrt", "pytorch"):
        return _load_on_gpus(folder, manifest), manifest
    check_files(folder, manifest)
    # A module is imported only when its engine is there: a GPU image has no OpenVINO, a CPU image no TensorRT-LLM.
    if manifest.engine == "openvino":
        import openvino_engine

        check_machine(manifest, gpu=None, versions=openvino_engine.runtime_versions(), world_size=1)
        _tell(manifest)
        return openvino_engine.OpenVinoEngine(folder, manifest), manifest
    import synthetic_engine

    check_machine(manifest, gpu=None, versions={}, world_size=1)
    _tell(manifest)
    return synthetic_engine.SyntheticEngine(folder, manifest), manifest


def _load_on_gpus(folder: Path, manifest: EngineManifest) -> Engine:
    import trtllm_engine
    from trtllm_installation import versions
    from trtllm_llm import check_installation

    # First what takes no time: the digests of a large engine take minutes.
    check_installation(manifest)
    gpus = _gpus_for(manifest, find_gpus())
    gpu = (gpus[0].product, gpus[0].compute_capability) if gpus else None
    check_machine(manifest, gpu=gpu, versions=versions(), world_size=len(gpus))
    check_files(folder, manifest)
    _tell(manifest)
    return trtllm_engine.TensorRtLlmEngine(folder, manifest, gpus)


def _gpus_for(manifest: EngineManifest, gpus: Sequence[Gpu]) -> list[Gpu]:
    """Those of one product: the engine's own if it was built for one and it is here, else the one there is most of."""
    products = [gpu.product for gpu in gpus]
    wanted = manifest.gpu["product"] if manifest.gpu else None
    if wanted not in products:
        wanted = max(products, key=products.count, default=None)
    return [gpu for gpu in gpus if gpu.product == wanted]


def _tell(manifest: EngineManifest) -> None:
    _log.info("loading %s (%s, %s, %s)", manifest.model, manifest.engine, manifest.dtype, manifest.quantization)
