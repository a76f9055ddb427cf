"""What engine.json says of an engine of each kind, without files."""

from __future__ import annotations

from dataclasses import replace

from engine_manifest import EngineManifest

MANIFEST = EngineManifest(
    key="ab" * 32,
    engine="openvino",
    model="gpt2",
    revision="607a30d783dfa663caf39e06633721c8d4cfcd7e",
    checkpoint_digest="cd" * 32,
    architecture="GPT2LMHeadModel",
    dtype="float32",
    quantization="none",
    kv_cache_dtype="auto",
    tensor_parallel=1,
    pipeline_parallel=1,
    limits={"max_batch_size": 16, "max_input_len": 1023, "max_seq_len": 1024, "max_beam_width": 4},
    vocab_size=50257,
    bos_token_id=50256,
    eos_token_ids=[50256],
    pad_token_id=None,
    kv_bytes_per_token=73728,
    gpu=None,
    versions={"openvino": "2026.4.1"},
    created="2026-11-24T02:00:00+00:00",
    files={},
)
TENSORRT = replace(
    MANIFEST,
    engine="tensorrt",
    gpu={"product": "NVIDIA-A10G", "compute_capability": "8.6"},
    versions={"tensorrt_llm": "1.2.1", "tensorrt": "10.14.1.48"},
)
PYTORCH = replace(MANIFEST, engine="pytorch", versions={"transformers": "4.57.6"})
