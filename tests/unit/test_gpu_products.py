"""The table of GPUs: labels, what runs there, and what is said about the others."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from errors import UsageError
from gpu_products import GPU_PRODUCTS, GpuProduct, find_product, product_of, refusal
from gpus import Gpu

FACTS = Path(__file__).resolve().parents[3] / "shared/facts/kubernetes.md"


@pytest.mark.skipif(not FACTS.is_file(), reason="the fact sheets are not here")
def test_labels_and_capabilities_are_those_of_the_fact_sheet():
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+`)[^|]*\| (\d+\.\d)", FACTS.read_text(), flags=re.MULTILINE)
    known = {product.product: product.compute_capability for product in GPU_PRODUCTS}
    in_sheet = {label: capability for labels, capability in rows for label in re.findall("`([^`]+)`", labels)}
    shared = set(known) & set(in_sheet)
    assert len(shared) >= 14
    assert {label: known[label] for label in shared} == {label: in_sheet[label] for label in shared}
    assert set(in_sheet) - set(known) == {"NVIDIA-GB300"}  # its memory is not known here


def test_every_label_is_one_that_a_node_can_have():
    labels = [product.product for product in GPU_PRODUCTS]
    assert len(set(labels)) == len(labels)
    assert all(re.fullmatch(r"(Tesla|NVIDIA)-[A-Za-z0-9-]+", label) and len(label) <= 63 for label in labels)
    assert json.dumps(labels)


@pytest.mark.parametrize(
    ("product", "supports"),
    [
        ("Tesla-V100-SXM2-16GB", ()),
        ("Tesla-T4", ()),
        ("NVIDIA-A10G", ("fp16", "bf16", "int8", "int4")),
        ("NVIDIA-A100-SXM4-80GB", ("fp16", "bf16", "int8", "int4")),
        ("NVIDIA-L4", ("fp16", "bf16", "int8", "int4", "fp8")),
        ("NVIDIA-H100-80GB-HBM3", ("fp16", "bf16", "int8", "int4", "fp8")),
        ("NVIDIA-B200", ("fp16", "bf16", "fp8", "nvfp4")),
        ("NVIDIA-B300-SXM6-AC", ("fp16", "bf16", "fp8", "nvfp4")),
    ],
)
def test_what_runs_there(product: str, supports: tuple[str, ...]):
    assert find_product(product).supports == supports


@pytest.mark.parametrize(
    ("product", "weights", "kv_cache", "sentence"),
    [
        ("Tesla-T4", "none", "float16", "Tesla-T4 has compute capability 7.5, and TensorRT-LLM 1.2.1 needs 8.0; use a"),
        (
            "Tesla-V100-SXM2-32GB",
            "int8",
            "float16",
            "Tesla-V100-SXM2-32GB has compute capability 7.0, and TensorRT-LLM",
        ),
        ("NVIDIA-A10G", "fp8", "float16", "NVIDIA-A10G has compute capability 8.6, and FP8 needs 8.9; use int8 or"),
        ("NVIDIA-A100-SXM4-40GB", "none", "fp8", "NVIDIA-A100-SXM4-40GB has compute capability 8.0, and FP8 needs 8.9"),
        ("NVIDIA-H200", "nvfp4", "fp8", "NVIDIA-H200 has compute capability 9.0, and NVFP4 needs 10.0; use fp8 or"),
        ("NVIDIA-B200", "int8", "bfloat16", "where TensorRT-LLM 1.2.1 builds nothing with int8; use fp8"),
        ("NVIDIA-B200", "none", "int8", "where TensorRT-LLM 1.2.1 builds nothing with int8 KV cache; use fp8"),
        ("NVIDIA-B200", "int4_awq", "fp8", "where TensorRT-LLM 1.2.1 builds nothing with int4_awq; use fp8"),
    ],
)
def test_what_does_not_run_there_is_one_sentence(product: str, weights: str, kv_cache: str, sentence: str):
    assert sentence in (refusal(find_product(product), engine="tensorrt", weights=weights, kv_cache=kv_cache) or "")


@pytest.mark.parametrize(
    ("product", "weights", "kv_cache"),
    [
        ("NVIDIA-A10G", "none", "bfloat16"),
        ("NVIDIA-A10G", "int8", "int8"),
        ("NVIDIA-L4", "fp8", "fp8"),
        ("NVIDIA-B200", "nvfp4", "fp8"),
    ],
)
def test_what_runs_there_is_not_refused(product: str, weights: str, kv_cache: str):
    assert refusal(find_product(product), engine="tensorrt", weights=weights, kv_cache=kv_cache) is None


def test_integers_on_blackwell_are_a_matter_of_the_engine_builder():
    assert refusal(find_product("NVIDIA-B200"), engine="pytorch", weights="int4_awq", kv_cache="bfloat16") is None
    assert "FP8 needs 8.9" in (
        refusal(find_product("NVIDIA-A10G"), engine="pytorch", weights="fp8", kv_cache="fp8") or ""
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "A10G",
            "--gpu A10G is no product known here; perhaps you meant 'NVIDIA-A10G'; use one of Tesla-V100-SXM2-16GB",
        ),
        ("NVIDIA-T4", "--gpu NVIDIA-T4 is no product known here; perhaps you meant 'Tesla-T4'; use one of "),
        ("NVIDIA-H100-SXM5-80GB", "perhaps you meant 'NVIDIA-H100-80GB-HBM3'"),
        ("quantum", "--gpu quantum is no product known here; use one of "),
        (
            "NVIDIA-A100-SXM4-40GB-MIG-1g.5gb",
            "is a share of a NVIDIA-A100-SXM4-40GB, and sizes are planned for whole GPUs",
        ),
        ("Tesla-T4-SHARED", "use --gpu Tesla-T4"),
    ],
)
def test_a_product_that_is_not_known_is_one_sentence(name: str, sentence: str):
    with pytest.raises(UsageError, match=re.escape(sentence)):
        find_product(name)


def test_the_gpu_of_this_machine_has_the_memory_its_driver_reports():
    here = Gpu(index=0, product="NVIDIA-RTX-A6000", compute_capability="8.6", memory_mib=49140)
    assert product_of([here]) == GpuProduct(product="NVIDIA-RTX-A6000", compute_capability="8.6", memory_mib=49140)
    assert product_of([]) is None
    assert product_of([Gpu(index=0, product="NVIDIA-GB10", compute_capability="12.1", memory_mib=None)]) is None
