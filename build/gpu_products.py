"""NVIDIA GPUs by their label nvidia.com/gpu.product: memory, compute capability, precisions of TensorRT-LLM 1.2.1.

Where the numbers come from:
- product: what GPU Feature Discovery writes, the driver's device name with '-' for blanks.
- memory_mib: `memory.total` of nvidia-smi on that product, which is also the label nvidia.com/gpu.memory. A T4 shows
  15109 and a V100 16160 or 32510 under drivers before 510, which left out what they keep for themselves.
- compute_capability: NVIDIA's list, https://developer.nvidia.com/cuda-gpus; `compute_cap` of nvidia-smi.
- OLDEST_CAPABILITY: TensorRT-LLM's supported hardware is Ampere, Ada, Hopper and Blackwell
  (https://nvidia.github.io/TensorRT-LLM/supported-hardware.html); its support matrix begins with SM80.
- FP8 from 8.9, NVFP4 from 10.0; bfloat16 from 8.0: the same support matrix, "Precision".
- What Blackwell lacks: the engine builder of 1.2.1 raises RuntimeError for INT8 and INT4 weight-only, which AWQ is too,
  INT8 KV cache and SmoothQuant on SM 100 to 119 (tensorrt_llm/builder.py, quantization/mode.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errors import UsageError
from gpus import Gpu

OLDEST_CAPABILITY = (8, 0)
FP8_CAPABILITY = (8, 9)
NVFP4_CAPABILITY = (10, 0)
NO_INTEGER_WEIGHTS = ((10, 0), (11, 9))  # from and to, both included


@dataclass(frozen=True, kw_only=True)
class GpuProduct:
    """One product. `memory_mib` is all of its memory; the driver keeps some of it (sizing.py)."""

    product: str
    compute_capability: str  # "8.9"
    memory_mib: int

    @property
    def capability(self) -> tuple[int, int]:
        major, _, minor = self.compute_capability.partition(".")
        return int(major), int(minor)

    @property
    def has_integer_weights(self) -> bool:
        first, last = NO_INTEGER_WEIGHTS
        return not first <= self.capability <= last

    @property
    def supports(self) -> tuple[str, ...]:
        """Precisions of TensorRT-LLM 1.2.1 engines; empty where it does not run."""
        if self.capability < OLDEST_CAPABILITY:
            return ()
        found = ["fp16", "bf16"]
        found += ["int8", "int4"] if self.has_integer_weights else []
        found += ["fp8"] if self.capability >= FP8_CAPABILITY else []
        found += ["nvfp4"] if self.capability >= NVFP4_CAPABILITY else []
        return tuple(found)


def _product(product: str, compute_capability: str, memory_mib: int) -> GpuProduct:
    return GpuProduct(product=product, compute_capability=compute_capability, memory_mib=memory_mib)


GPU_PRODUCTS: tuple[GpuProduct, ...] = (
    _product("Tesla-V100-SXM2-16GB", "7.0", 16384),
    _product("Tesla-V100-SXM2-32GB", "7.0", 32768),
    _product("Tesla-T4", "7.5", 15360),
    _product("NVIDIA-A10", "8.6", 23028),
    _product("NVIDIA-A10G", "8.6", 23028),
    _product("NVIDIA-L4", "8.9", 23034),
    _product("NVIDIA-A100-SXM4-40GB", "8.0", 40960),
    _product("NVIDIA-A100-PCIE-40GB", "8.0", 40960),
    _product("NVIDIA-L40S", "8.9", 46068),
    _product("NVIDIA-A100-SXM4-80GB", "8.0", 81920),
    _product("NVIDIA-A100-80GB-PCIe", "8.0", 81920),
    _product("NVIDIA-H100-80GB-HBM3", "9.0", 81559),
    _product("NVIDIA-H100-PCIe", "9.0", 81559),
    _product("NVIDIA-H100-NVL", "9.0", 95830),
    _product("NVIDIA-H200", "9.0", 143771),
    _product("NVIDIA-H200-NVL", "9.0", 143771),
    _product("NVIDIA-B200", "10.0", 183359),
    _product("NVIDIA-GB200", "10.0", 189471),
    _product("NVIDIA-B300-SXM6-AC", "10.3", 275040),
)


def find_product(name: str) -> GpuProduct:
    """The product of that label. Raises UsageError, with the nearest label, for one that is not in the table."""
    known = {product.product: product for product in GPU_PRODUCTS}
    if name in known:
        return known[name]
    shared_or_part = next((label for label in known if name.startswith((f"{label}-SHARED", f"{label}-MIG-"))), None)
    if shared_or_part is not None:
        raise UsageError(
            f"--gpu {name} is a share of a {shared_or_part}, and sizes are planned for whole GPUs; "
            f"use --gpu {shared_or_part}"
        )
    best = max(known, key=lambda label: len(_words(label) & _words(name)))
    hint = f"perhaps you meant {best!r}; " if _words(best) & _words(name) else ""
    raise UsageError(f"--gpu {name} is no product known here; {hint}use one of {', '.join(known)}")


def _words(label: str) -> set[str]:
    """Of a label, without the maker's: what tells "NVIDIA-T4" and "H100-SXM5" from others."""
    return set(label.lower().replace(" ", "-").split("-")) - {"nvidia", "tesla"}


def product_of(gpus: Sequence[Gpu]) -> GpuProduct | None:
    """The product of this machine's first GPU, with the memory that its driver reports; None if there is none."""
    if not gpus or gpus[0].memory_mib is None:
        return None
    first = gpus[0]
    return _product(first.product, first.compute_capability, first.memory_mib)


def refusal(gpu: GpuProduct, *, engine: str, weights: str, kv_cache: str) -> str | None:
    """Why TensorRT-LLM 1.2.1 runs nothing with these weights and this KV cache there, or None when it does.

    `engine` is "tensorrt" or "pytorch"; integers on Blackwell are refused by the builder, which only the first has.
    `weights` is a format of sizing.py, such as "fp8" or "none"; `kv_cache` a type, such as "float16", "fp8" or "int8".
    """
    has = f"{gpu.product} has compute capability {gpu.compute_capability}"
    if gpu.capability < OLDEST_CAPABILITY:
        return f"{has}, and TensorRT-LLM 1.2.1 needs 8.0; use a newer GPU, such as NVIDIA-A10G or NVIDIA-L4"
    if "fp8" in (weights, kv_cache) and gpu.capability < FP8_CAPABILITY:
        return f"{has}, and FP8 needs 8.9; use int8 or int4_awq weights, or a newer GPU, such as NVIDIA-L4"
    if weights == "nvfp4" and gpu.capability < NVFP4_CAPABILITY:
        return f"{has}, and NVFP4 needs 10.0; use fp8 or int4_awq weights, or a newer GPU, such as NVIDIA-B200"
    integers = [name for name in (weights, f"{kv_cache} KV cache") if name.startswith(("int8", "int4"))]
    if engine == "tensorrt" and integers and not gpu.has_integer_weights:
        return f"{has}, where TensorRT-LLM 1.2.1 builds nothing with {integers[0]}; use fp8"
    return None
