"""The texts that a quantization is calibrated with: which formats need them, and what names their content.

TensorRT-LLM 1.2.1 takes cnn_dailymail, which it downloads from the Hugging Face hub, or a folder that `datasets` reads:
with a split `train` that has a column `text`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from checkpoint_files import sha256_of
from errors import UsageError

DEFAULT_DATASET = "cnn_dailymail"  # of PretrainedModel.quantize; downloaded when it is needed
CALIBRATED_WEIGHTS = ("fp8", "int4_awq", "int8_sq")  # int8 and int4 weights only are rounded as they are


def needs_calibration(quantization: str, kv_cache_dtype: str) -> bool:
    """A KV cache of 8 bits needs scales, whatever the weights are."""
    return quantization in CALIBRATED_WEIGHTS or kv_cache_dtype != "auto"


def dataset_digest(folder: Path | None) -> str:
    """What stands for the texts in the engine's key: the default's name, or the digest of all files of a folder.

    Raises UsageError for a folder that is missing, unreadable or empty.
    """
    if folder is None:
        return DEFAULT_DATASET
    what = f"--calibration-data {folder}"
    if not folder.is_dir():
        raise UsageError(
            f"{what} is no folder; give one that holds a data set with the split 'train' and column 'text'"
        )
    digest = hashlib.sha256()
    try:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in paths:
            digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_of(path)}\n".encode())
    except OSError as error:
        raise UsageError(f"{what} cannot be read: {error.filename}: {error.strerror}; make it readable") from error
    if not paths:
        raise UsageError(f"{what} is empty; give a folder that holds a data set")
    return f"sha256:{digest.hexdigest()}"
