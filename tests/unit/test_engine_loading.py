"""Which GPUs an engine gets, and that nothing of a large engine is read before it may run here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import engine_loading
import pytest
from engine_loading import _gpus_for, load_engine
from engine_manifest import EngineManifest, ManifestError, write_manifest
from gpus import Gpu
from manifests import PYTORCH, TENSORRT

L4, A10G = "NVIDIA-L4", "NVIDIA-A10G"


def gpus(*products: str) -> list[Gpu]:
    return [
        Gpu(index=index, product=product, compute_capability="8.6", memory_mib=24000)
        for index, product in enumerate(products)
    ]


@pytest.mark.parametrize(
    ("manifest", "products", "expected"),
    [
        (TENSORRT, (L4, A10G, L4, A10G), [1, 3]),  # the product that it was built for, although there are no more of it
        (TENSORRT, (L4, L4), [0, 1]),  # none of it: those that are here, for the sentence that refuses them
        (PYTORCH, (L4, A10G, A10G), [1, 2]),  # the product that there is most of: ranks must be alike
        (PYTORCH, (L4,), [0]),
        (PYTORCH, (), []),
    ],
)
def test_an_engine_gets_gpus_of_one_product(manifest: EngineManifest, products: tuple[str, ...], expected: list[int]):
    assert [gpu.index for gpu in _gpus_for(manifest, gpus(*products))] == expected


@pytest.mark.parametrize("manifest", [TENSORRT, PYTORCH], ids=["tensorrt", "pytorch"])
def test_the_machine_is_looked_at_before_the_files(
    manifest: EngineManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Their digests take minutes; here they are missing, and that is not what is said."""
    write_manifest(tmp_path, replace(manifest, files={"rank0.engine": {"bytes": 1, "sha256": "ab" * 32}}))
    monkeypatch.setattr("trtllm_llm.versions", lambda: TENSORRT.versions)
    monkeypatch.setattr("trtllm_llm.has_engine_backend", lambda: True)
    monkeypatch.setattr(engine_loading, "find_gpus", list)
    with pytest.raises(ManifestError, match=r"this machine has (no GPU|none that nvidia-smi names)"):
        load_engine(tmp_path)
