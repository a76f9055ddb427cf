"""Arguments for TensorRT-LLM are known by name and type before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llm_arguments
import pytest
from errors import UsageError
from llm_arguments import ARGUMENTS, SET_ELSEWHERE, check, merged, read

CONTRACT = json.loads((Path(__file__).parent.parent / "fakes/tensorrt_llm/contract.json").read_text())
LLM_CLASSES = {"tensorrt": "LLM(TensorRT)", "pytorch": "LLM(PyTorch)"}
GROUPS = {
    "kv_cache_config": "KvCacheConfig",
    "scheduler_config": "SchedulerConfig",
    "cuda_graph_config": "CudaGraphConfig",
}


def known(entry: str) -> dict[str, str]:
    """Names of parameters and their types."""
    return {row[0]: row[1] for row in CONTRACT[entry]["parameters"]}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_each_argument_is_one_of_the_library(name: str):
    argument = ARGUMENTS[name]
    for engine in argument.engines:
        assert name in known(LLM_CLASSES[engine])
    if name in GROUPS:
        assert argument.values.keys() <= known(GROUPS[name]).keys()


@pytest.mark.parametrize(
    "name", [name for name, argument in ARGUMENTS.items() if argument.engines == llm_arguments.PYTORCH]
)
def test_an_argument_of_one_kind_is_none_of_the_other_or_set_by_the_server(name: str):
    # The engine's own config.json has the first two; the others are for classes that the engine backend has not.
    assert name not in known("LLM(TensorRT)") or name in (
        *("max_num_tokens", "enable_chunked_prefill"),
        *("enable_attention_dp", "moe_tensor_parallel_size", "moe_expert_parallel_size", "load_format"),
    )


@pytest.mark.parametrize(
    ("engine", "arguments"),
    [
        ("tensorrt", {}),
        ("tensorrt", {"kv_cache_config": {"free_gpu_memory_fraction": 0.8, "host_cache_size": 1 << 34}}),
        ("tensorrt", {"kv_cache_config": {"free_gpu_memory_fraction": 1, "enable_block_reuse": False}}),
        ("tensorrt", {"kv_cache_config": {"max_tokens": None, "max_attention_window": [4096, 8192]}}),
        ("tensorrt", {"scheduler_config": {"capacity_scheduler_policy": "MAX_UTILIZATION"}}),
        ("pytorch", {"scheduler_config": {"context_chunking_policy": None}}),
        ("pytorch", {"max_num_tokens": 4096, "enable_chunked_prefill": False, "stream_interval": 4}),
        ("pytorch", {"cuda_graph_config": None, "attn_backend": "FLASHINFER", "enable_autotuner": False}),
        ("pytorch", {"cuda_graph_config": {"batch_sizes": [1, 2, 8], "max_batch_size": 8, "enable_padding": True}}),
        ("pytorch", {"moe_expert_parallel_size": 2, "allreduce_strategy": "NCCL", "load_format": "dummy"}),
    ],
)
def test_what_is_right_is_let_through(engine: str, arguments: dict[str, Any]):
    check(arguments, engine)


@pytest.mark.parametrize(
    ("engine", "arguments", "sentence"),
    [
        (
            "tensorrt",
            {"kv_cash_config": {}},
            "kv_cash_config is no argument known here; perhaps you meant kv_cache_config",
        ),
        (
            "pytorch",
            {"kv_cache_config": {"free_gpu_memory_fractoin": 0.5}},
            "kv_cache_config.free_gpu_memory_fractoin is no argument known here; perhaps you meant "
            "kv_cache_config.free_gpu_memory_fraction",
        ),
        (
            "tensorrt",
            {"scheduler_config": {"zzz": 1}},
            "is no argument known here; known are capacity_scheduler_policy, ",
        ),
        (
            "tensorrt",
            {"stream_interval": 2},
            "stream_interval is for --engine pytorch, and this engine is tensorrt; leave",
        ),
        ("tensorrt", {"cuda_graph_config": None}, "cuda_graph_config is for --engine pytorch, and this engine is"),
        ("tensorrt", {"max_num_tokens": 8}, "max_num_tokens is for --engine pytorch"),
        ("tensorrt", {"tensor_parallel_size": 2}, "tensor_parallel_size is not for here; use --tp"),
        ("pytorch", {"max_batch_size": 2}, "max_batch_size is not for here; use --max-batch-size"),
        (
            "pytorch",
            {"kv_cache_config": {"dtype": "fp8"}},
            "kv_cache_config.dtype is not for here; use --kv-cache-dtype",
        ),
        (
            "pytorch",
            {"skip_tokenizer_init": True},
            "skip_tokenizer_init is not for here; leave it out: the server sets",
        ),
        ("tensorrt", {"kv_cache_config": 3}, "kv_cache_config is 3, and must be an object"),
        ("tensorrt", {"kv_cache_config": None}, "kv_cache_config is null, and must be an object"),
        ("pytorch", {"cuda_graph_config": True}, "cuda_graph_config is true, and must be an object, or null"),
        (
            "tensorrt",
            {"kv_cache_config": {"free_gpu_memory_fraction": 1.5}},
            "kv_cache_config.free_gpu_memory_fraction is 1.5, and must be a number from 0 to 1",
        ),
        (
            "tensorrt",
            {"kv_cache_config": {"free_gpu_memory_fraction": None}},  # the library's own check fails for it
            "kv_cache_config.free_gpu_memory_fraction is null, and must be a number from 0 to 1",
        ),
        (
            "tensorrt",
            {"kv_cache_config": {"enable_block_reuse": 1}},
            "enable_block_reuse is 1, and must be true or false",
        ),
        (
            "tensorrt",
            {"kv_cache_config": {"max_tokens": True}},
            "is true, and must be a whole number of 1 or more, or null",
        ),
        (
            "tensorrt",
            {"kv_cache_config": {"max_tokens": 1.5}},
            "is 1.5, and must be a whole number of 1 or more, or null",
        ),
        ("tensorrt", {"kv_cache_config": {"max_attention_window": []}}, "must be a list of whole numbers of 1 or more"),
        (
            "tensorrt",
            {"kv_cache_config": {"max_attention_window": [0]}},
            "must be a list of whole numbers of 1 or more",
        ),
        (
            "pytorch",
            {"attn_backend": "flash"},
            'attn_backend is "flash", and must be one of TRTLLM, FLASHINFER, VANILLA',
        ),
        ("pytorch", {"attn_backend": 3}, "attn_backend is 3, and must be a string"),
        (
            "pytorch",
            {"cuda_graph_config": {"batch_sizes": [1, 4], "max_batch_size": 8}},
            "cuda_graph_config.max_batch_size is 8, and must be the largest of batch_sizes, 4, where both are given",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence(engine: str, arguments: dict[str, Any], sentence: str):
    with pytest.raises(UsageError) as raised:
        check(arguments, engine)
    assert str(raised.value).startswith("--llm-args: ")
    assert sentence in str(raised.value)


@pytest.mark.parametrize("name", SET_ELSEWHERE)
def test_what_is_set_elsewhere_cannot_be_set_here_too(name: str):
    group, dot, inner = name.partition(".")
    arguments = {group: {inner: None}} if dot else {name: None}
    with pytest.raises(UsageError, match=r"is not for here; (use|leave)"):
        check(arguments, "pytorch")


def test_an_object_is_read_from_the_command_line_or_a_file(tmp_path: Path):
    (tmp_path / "arguments.json").write_text('{"stream_interval": 2}')
    assert read('{"stream_interval": 2}') == read(f"@{tmp_path / 'arguments.json'}") == {"stream_interval": 2}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stream_interval=2", "the value is not JSON (Expecting value: line 1 column 1 (char 0)); write for instance"),
        ("[1]", "the value is not a JSON object; write for instance"),
        ("@none.json", "the file none.json cannot be read: No such file or directory; give a file with a JSON object"),
        ('{"a": 1, "a": 2}', "the value is not JSON ('a' is there twice)"),
        ("[" * 100_000, "the value is not JSON ("),
        ("", "the value is not JSON ("),
    ],
)
def test_what_is_no_object_is_one_sentence(text: str, sentence: str):
    with pytest.raises(UsageError) as raised:
        read(text)
    assert sentence in str(raised.value)


def test_groups_are_merged_field_by_field():
    defaults = {"max_num_tokens": 8192, "kv_cache_config": {"dtype": "fp8"}}
    arguments = {"kv_cache_config": {"max_tokens": 5}, "cuda_graph_config": None}
    assert merged(defaults, arguments) == {
        "max_num_tokens": 8192,
        "kv_cache_config": {"dtype": "fp8", "max_tokens": 5},
        "cuda_graph_config": None,
    }
