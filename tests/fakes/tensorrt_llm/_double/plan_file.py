"""The double's engine files: as of a TensorRT plan, the machine and the release decide whether one can be loaded."""

from __future__ import annotations

import json
from typing import Any

from safetensors.numpy import save

from .checkpoints import Weights, parse_safetensors

_MAGIC = b"ftrt"  # as in a real plan


def to_bytes(weights: Weights, header: dict[str, Any]) -> bytes:
    line = json.dumps(header).encode()
    return _MAGIC + len(line).to_bytes(4, "little") + line + save(weights)


def from_bytes(content: bytes) -> tuple[dict[str, Any], Weights]:
    """Raises ValueError for what is no plan file, or a damaged one."""
    if content[:4] != _MAGIC:
        raise ValueError("the plan file has no magic tag")
    end = 8 + int.from_bytes(content[4:8], "little")
    try:
        return json.loads(content[8:end]), parse_safetensors(content[end:])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"the plan file is damaged: {error}") from None
