"""The double of TensorRT-LLM fails as the library would, and generates what the demo checkpoint should."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trtllm_environment
from tokenizers import Tokenizer
from trtllm_environment import TrtllmEnvironment

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "scripts/demo_checkpoint/demo-gpt2"
FACTS = ROOT.parent / "shared/facts/tensorrt-llm-1.2.1.json"
PROMPTS = [json.loads(line) for line in (DEMO.parent / "prompts.jsonl").read_text().splitlines()]
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
L4 = ("NVIDIA L4", "8.9", 23034)
B200 = ("NVIDIA B200", "10.0", 183359)
TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrtllmEnvironment]:
    """The double, importable in this process for the tests of this file only."""
    folder = tmp_path_factory.mktemp("double") / "environment"
    made = trtllm_environment.make(folder, pytorch_also=["GPT2LMHeadModel"])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(made.site)
        patch.setenv("TENSORRT_LLM_DOUBLE", str(made.settings))
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        _forget()
        yield made
    _forget()


@pytest.fixture(scope="module")
def trt(environment: TrtllmEnvironment) -> SimpleNamespace:
    """The names that the tests use."""
    modules = {
        "tensorrt_llm": ("BuildConfig", "KvCacheConfig", "LLM", "Mapping", "SamplingParams", "build"),
        "tensorrt_llm.models": ("MODEL_MAP", "AutoModelForCausalLM", "GPTForCausalLM", "LLaMAForCausalLM"),
        "tensorrt_llm.llmapi": ("QuantAlgo", "QuantConfig", "RequestError", "RequestOutput", "SchedulerConfig"),
        "tensorrt_llm.quantization": ("quantize_and_export",),
    }
    names = {name: getattr(importlib.import_module(path), name) for path, all_ in modules.items() for name in all_}
    engine = importlib.import_module("tensorrt_llm._tensorrt_engine")
    return SimpleNamespace(**names, TrtLLM=engine.LLM)


@pytest.fixture(autouse=True)
def _no_faults(environment: TrtllmEnvironment) -> Iterator[None]:
    yield
    environment.change(gpus=[trtllm_environment.H100] * 4, faults={}, tensorrt="10.14.1.48")


@pytest.fixture(scope="module")
def engines(trt: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Path]:
    parent = tmp_path_factory.mktemp("engines")
    return {layout: build_engine(trt, parent / "{}x{}".format(*layout), *layout) for layout in LAYOUTS}


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


def convert(trt: SimpleNamespace, tp_size: int = 1, pp_size: int = 1, rank: int = 0, **more: Any) -> Any:
    mapping = trt.Mapping(world_size=tp_size * pp_size, rank=rank, tp_size=tp_size, pp_size=pp_size)
    arguments = {"load_model_on_cpu": True, "gpt_variant": "gpt2", **more}
    return trt.GPTForCausalLM.from_hugging_face(str(DEMO), "float16", mapping, **arguments)


def build_engine(trt: SimpleNamespace, folder: Path, tp_size: int = 1, pp_size: int = 1, **limits: Any) -> Path:
    folder.mkdir()
    config = {"max_batch_size": 8, "max_num_tokens": 2048, "output_timing_cache": str(folder / "model.cache"), **limits}
    for rank in range(tp_size * pp_size):
        trt.build(convert(trt, tp_size, pp_size, rank), trt.BuildConfig(**config)).save(str(folder))
    return folder


def load(trt: SimpleNamespace, folder: Path, **arguments: Any) -> Any:
    return trt.TrtLLM(model=str(folder), **{"skip_tokenizer_init": True, "max_num_tokens": 2048, **arguments})


def load_pytorch(trt: SimpleNamespace, **arguments: Any) -> Any:
    return trt.LLM(model=str(DEMO), **{"skip_tokenizer_init": True, **arguments})


def sampling(trt: SimpleNamespace, **arguments: Any) -> Any:
    return trt.SamplingParams(**{"end_id": 0, "max_tokens": 8, "detokenize": False, **arguments})


async def ask(trt: SimpleNamespace, llm: Any, prompt: list[int], **arguments: Any) -> Any:
    result = llm.generate_async(prompt, sampling(trt, **arguments), streaming=True)
    async for _ in result:
        pass
    return result.outputs[0]


# --- the installation


def run_python(environment: TrtllmEnvironment, code: str) -> str:
    """With the interpreter alone, as Triton's stub takes no PYTHONPATH."""
    variables = {name: value for name, value in environment.variables.items() if name != "PYTHONPATH"}
    done = subprocess.run(["python3", "-c", code], env=variables, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


TELL = f"""
import sys
sys.path.insert(0, {str(ROOT / "build")!r})
import gpus, trtllm_installation
print(trtllm_installation.versions(), trtllm_installation.has_engine_backend(), len(gpus.find_gpus()))
"""


@pytest.mark.parametrize(
    ("settings", "answer"),
    [
        ({}, "{'tensorrt_llm': '1.2.1', 'tensorrt': '10.14.1.48'} True 4"),
        (
            {"tensorrt_llm": "1.3.0", "tensorrt": None, "engine_backend": False, "gpus": [L4]},
            "{'tensorrt_llm': '1.3.0'} False 1",
        ),
        ({"tensorrt_llm": None, "tensorrt": None, "gpus": ()}, "{} False 0"),
    ],
)
def test_installation_is_what_was_asked_for(tmp_path: Path, settings: dict[str, Any], answer: str) -> None:
    made = trtllm_environment.make(tmp_path / "environment", **settings)
    assert run_python(made, TELL).strip() == answer


def test_release_without_engine_backend_has_the_other_one(tmp_path: Path) -> None:
    made = trtllm_environment.make(tmp_path / "environment", tensorrt_llm="1.3.0", engine_backend=False)
    assert "1.3.0" in run_python(made, "from tensorrt_llm import LLM, SamplingParams, KvCacheConfig")
    assert "ImportError" in run_python(made, "from tensorrt_llm import BuildConfig")
    assert "No module named 'tensorrt_llm._tensorrt_engine'" in run_python(made, "import tensorrt_llm._tensorrt_engine")


def test_nvidia_smi_answers_any_list_of_fields(environment: TrtllmEnvironment) -> None:
    environment.change(gpus=[L4])
    query = ["nvidia-smi", "--query-gpu=index,name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, env=environment.variables, capture_output=True, text=True, check=True).stdout
    assert answer == "0, NVIDIA L4, 23034, 590.44.01\n"


def test_it_is_not_there_without_its_variable(environment: TrtllmEnvironment) -> None:
    made = TrtllmEnvironment(**{**vars(environment), "variables": {**environment.variables}})
    del made.variables["TENSORRT_LLM_DOUBLE"]
    assert "ModuleNotFoundError: No module named 'tensorrt_llm'" in run_python(made, "import tensorrt_llm")


# --- the contract


@pytest.mark.skipif(not FACTS.exists(), reason="the fact sheet that the contract was derived from is not here")
def test_contract_names_what_the_facts_name() -> None:
    contract = json.loads((trtllm_environment.DOUBLE / "contract.json").read_text())
    facts = json.loads(FACTS.read_text())
    for name in contract.keys() & facts.keys() - {"_meta"}:
        ours = {row[0]: tuple(row[2:]) for row in contract[name].get("parameters", ())}
        fact = facts[name]
        theirs = {
            it["name"]: (it.get("default"), it.get("kind", "keyword"))
            for it in (*fact["params"], *fact.get("extra_kwargs", ()))
        }
        private = {text.split("=")[0] for text in fact.get("private_init_params", ())}
        assert {key: row for key, row in ours.items() if key not in private} == theirs, name
        assert ours.keys() >= private, name
        values = contract[name].get("values", [])
        assert list(values) == fact["values"], name
    assert not contract.keys() - facts.keys() - {"Engine.save", "Engine.from_dir"}


BAD_CALLS: list[tuple[Callable[[SimpleNamespace], Any], str, str]] = [
    (lambda trt: trt.KvCacheConfig(free_gpu_memory=0.5), "ValidationError", "unexpected keyword argument"),
    (lambda trt: trt.KvCacheConfig(free_gpu_memory_fraction=None), "ValidationError", "between 0 and 1"),
    (lambda trt: trt.KvCacheConfig(max_tokens=np.int64(8)), "ValidationError", "int64, which is not Optional[int]"),
    (lambda trt: setattr(trt.KvCacheConfig(), "max_token", 8), "ValueError", 'no field "max_token"'),
    (lambda trt: trt.SchedulerConfig(capacity_scheduler_policy="SOON"), "ValidationError", "'SOON' is a str"),
    (lambda trt: trt.BuildConfig(max_batch_size="8"), "ValidationError", "'8' is a str"),
    (lambda trt: trt.BuildConfig(max_batch_size=True), "ValidationError", "True is a bool"),
    (lambda trt: trt.BuildConfig(plugin_config={"gemm_plugin": "float8"}), "ValidationError", "'float8' is a str"),
    (lambda trt: trt.SamplingParams(max_new_tokens=3), "TypeError", "unexpected keyword argument 'max_new_tokens'"),
    (lambda trt: trt.SamplingParams(3), "TypeError", "positional"),
    (lambda trt: trt.SamplingParams(top_k=-1), "ValueError", "top_k >= 0"),
    (lambda trt: trt.SamplingParams(top_p=1.5), "ValueError", "0 <= top_p <= 1"),
    (lambda trt: trt.SamplingParams(n=2), "ValueError", "Greedy decoding"),
    (lambda trt: setattr(trt.SamplingParams(), "beam_width", 2), "AttributeError", "beam_width"),
    (lambda trt: trt.Mapping(tp_size=2), "ValueError", "world_size must equal"),
    (lambda trt: trt.Mapping(2, 2, tp_size=2), "ValueError", "between 0 and 1, but got 2"),
    (lambda trt: trt.Mapping(world_size=2, tensor_parallel=2), "TypeError", "unexpected keyword"),
    (lambda trt: trt.GPTForCausalLM.from_hugging_face(DEMO), "TypeError", "PosixPath"),
    (lambda trt: trt.GPTForCausalLM.from_hugging_face(str(DEMO), "float8"), "KeyError", "float8"),
    (lambda trt: trt.LLaMAForCausalLM.from_hugging_face(SimpleNamespace()), "TypeError", "SimpleNamespace"),
    (lambda trt: trt.AutoModelForCausalLM.from_hugging_face("/nowhere"), "AssertionError", "provide a Hugging Face"),
    (lambda trt: trt.MODEL_MAP["OPTForCausalLM"].from_hugging_face(str(DEMO)), "AttributeError", "from_hugging_face"),
    (lambda trt: convert(trt, 3), "AssertionError", "num_attention_heads must be divisible"),
    (lambda trt: convert(trt, 1, 5), "AssertionError", "num_hidden_layers"),
    (lambda trt: convert(trt, quant_config=trt.QuantConfig("FP8")), "RuntimeError", "Required but not provided"),
    (lambda trt: trt.build(convert(trt)), "TypeError", "missing required argument: 'build_config'"),
    (lambda trt: trt.build(convert(trt), {"max_batch_size": 1}), "TypeError", "dict, which is not BuildConfig"),
    (lambda trt: trt.TrtLLM(str(DEMO), max_batch=3), "ValueError", "_TrtLLM got invalid argument: max_batch"),
    (lambda trt: trt.LLM(str(DEMO), max_batch=3), "ValueError", "LLM got invalid argument: max_batch"),
    (lambda trt: trt.LLM(str(DEMO), fast_build=True), "ValueError", "tensorrt_llm._tensorrt_engine"),
    (lambda trt: trt.LLM(str(DEMO), kv_cache_config={"max_token": 3}), "ValidationError", "'max_token'"),
    (lambda trt: trt.LLM(), "ValidationError", "missing required argument: 'model'"),
    (lambda trt: trt.RequestOutput(), "RuntimeError", "instantiated by the library"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS)
def test_bad_call_fails(trt: SimpleNamespace, call: Callable[..., Any], error: str, message: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the table says which
        call(trt)
    assert (type(caught.value).__name__, message in str(caught.value)) == (error, True), caught.value


def test_build_config_drops_what_it_does_not_know(trt: SimpleNamespace) -> None:
    assert not hasattr(trt.BuildConfig(max_batchsize=8), "max_batchsize")
    assert "max_batch_size" in trt.BuildConfig.model_fields


def test_unknown_keyword_of_a_conversion_becomes_an_attribute(
    trt: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(trt, load_on_cpu=True).config.load_on_cpu is True
    assert "Implicitly setting GPTConfig.load_on_cpu = True" in capsys.readouterr().out


def test_plugin_config_reads_auto_as_the_dtype(trt: SimpleNamespace) -> None:
    plugins = trt.BuildConfig(plugin_config={"gemm_plugin": "auto", "reduce_fusion": "enable"}).plugin_config
    plugins.dtype = "bfloat16"
    assert (plugins.gemm_plugin, plugins.reduce_fusion, plugins.lora_plugin) == ("bfloat16", True, None)


# --- building


def test_engine_folder_holds_every_rank_and_one_config(engines: dict[tuple[int, int], Path]) -> None:
    folder = engines[2, 2]
    assert {path.name for path in folder.glob("rank*")} == {f"rank{rank}.engine" for rank in range(4)}
    config = json.loads((folder / "config.json").read_text())
    assert config.keys() == {"version", "pretrained_config", "build_config"}
    assert config["version"] == "1.2.1"
    assert "rank" not in config["pretrained_config"]["mapping"]
    assert config["build_config"]["max_seq_len"] == 1024  # of the model, as none was given
    assert config["build_config"]["plugin_config"]["nccl_plugin"] == "float16"
    assert "dry_run" not in config["build_config"]


def test_only_rank_0_writes_config_and_timing_cache(trt: SimpleNamespace, tmp_path: Path) -> None:
    config = trt.BuildConfig(output_timing_cache=str(tmp_path / "model.cache"))
    trt.build(convert(trt, 2, rank=1), config).save(str(tmp_path / "engine"))
    assert [path.name for path in (tmp_path / "engine").iterdir()] == ["rank1.engine"]
    assert not (tmp_path / "model.cache").exists()
    assert config.max_seq_len is None  # build() works on a copy


def test_timing_cache_goes_to_the_current_directory(
    trt: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trt.build(convert(trt), trt.BuildConfig())
    assert (tmp_path / "model.cache").exists()
    with pytest.raises(AssertionError, match="Failed to save timing cache"):
        trt.build(convert(trt), trt.BuildConfig(output_timing_cache="no/such/folder"))


@pytest.mark.parametrize(
    ("asked", "built"),
    [
        ({"max_batch_size": 2, "max_seq_len": 100}, (100, 200)),  # max_input_len is 1024, max_num_tokens 8192
        ({"max_num_tokens": 8, "max_input_len": 8}, (8, 32)),
        ({}, (1024, 8192)),
    ],
)
def test_limits_that_do_not_fit_are_changed(
    trt: SimpleNamespace, tmp_path: Path, asked: dict[str, int], built: tuple[int, int]
) -> None:
    config = trt.BuildConfig(output_timing_cache=str(tmp_path / "model.cache"), **asked)
    result = trt.build(convert(trt), config).config.build_config
    assert (result.max_input_len, result.max_num_tokens) == built


def test_model_is_built_once(trt: SimpleNamespace, tmp_path: Path) -> None:
    model, config = convert(trt), trt.BuildConfig(output_timing_cache=str(tmp_path / "model.cache"))
    trt.build(model, config)
    with pytest.raises(RuntimeError, match="needs a fresh one"):
        trt.build(model, config)
    assert "IS_BUILDING" not in os.environ


def test_dry_run_makes_no_engine(trt: SimpleNamespace, tmp_path: Path) -> None:
    engine = trt.build(convert(trt), trt.BuildConfig(dry_run=True, output_timing_cache=str(tmp_path / "model.cache")))
    assert engine.engine is None
    with pytest.raises(TypeError):
        engine.save(str(tmp_path))


@pytest.mark.parametrize(
    ("gpus", "quantization", "message"),
    [
        ([], {}, "No CUDA GPUs are available"),
        ([("NVIDIA Tiny", "9.0", 1)], {}, "CUDA out of memory"),
        ([B200], {"quant_algo": "W8A16"}, "is not supported on SM100"),
    ],
)
def test_build_fails_on_a_machine_that_cannot(
    trt: SimpleNamespace,
    environment: TrtllmEnvironment,
    tmp_path: Path,
    gpus: list[Any],
    quantization: dict[str, str],
    message: str,
) -> None:
    environment.change(gpus=gpus)
    model = convert(trt, quant_config=trt.QuantConfig(**quantization))
    with pytest.raises(RuntimeError, match=message):
        trt.build(model, trt.BuildConfig(output_timing_cache=str(tmp_path / "model.cache")))


@pytest.mark.parametrize(
    ("quantization", "is_paged"),
    [({}, True), ({"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, True), ({"kv_cache_quant_algo": "FP8"}, False)],
)
def test_paged_context_attention_depends_on_the_kv_cache(
    trt: SimpleNamespace, tmp_path: Path, quantization: dict[str, str], is_paged: bool
) -> None:
    if quantization:
        trt.GPTForCausalLM.quantize(
            str(DEMO), str(tmp_path), quant_config=trt.QuantConfig(**quantization), calib_dataset=calibration(tmp_path)
        )
        model = trt.GPTForCausalLM.from_checkpoint(str(tmp_path))
    else:
        model = convert(trt)
    engine = trt.build(model, trt.BuildConfig(output_timing_cache=str(tmp_path / "model.cache")))
    assert engine.config.build_config.plugin_config.use_paged_context_fmha is is_paged


def calibration(folder: Path) -> str:
    (folder / "samples").mkdir()
    (folder / "samples/train.jsonl").write_text('{"text": "A sample."}\n')
    return str(folder / "samples")


@pytest.mark.parametrize(
    ("quantization", "arguments", "error", "message"),
    [
        ({"quant_algo": "W8A16"}, {}, ValueError, "does not require calibration, try GPTForCausalLM.from_hugging_face"),
        ({"quant_algo": "FP8"}, {"calib_dataset": "cnn_dailymail"}, ConnectionError, "cnn_dailymail"),
        ({"quant_algo": "FP8"}, {"calib_dataset": "/nowhere"}, NotImplementedError, "Unsupported dataset"),
        ({"quant_algo": "NVFP4"}, {}, RuntimeError, "needs SM 100"),
        ({"quant_algo": "W4A16_AWQ"}, {"tp_size": 4}, NotImplementedError, "block size 128"),
        ({"kv_cache_quant_algo": "INT8"}, {"tp_size": 2, "rank": 1}, AssertionError, "rank 0"),
    ],
)
def test_quantizing_refuses(
    trt: SimpleNamespace,
    tmp_path: Path,
    quantization: dict[str, str],
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    tp_size, rank = arguments.pop("tp_size", 1), arguments.pop("rank", 0)
    with pytest.raises(error, match=message):
        trt.GPTForCausalLM.quantize(
            str(DEMO),
            str(tmp_path / "checkpoint"),
            mapping=trt.Mapping(tp_size, rank, tp_size=tp_size),
            quant_config=trt.QuantConfig(**quantization),
            **{"calib_dataset": calibration(tmp_path), **arguments},
        )
    assert not (tmp_path / "checkpoint").exists()


def test_quantizing_writes_every_rank(trt: SimpleNamespace, environment: TrtllmEnvironment, tmp_path: Path) -> None:
    arguments = {"mapping": trt.Mapping(2, tp_size=2), "quant_config": trt.QuantConfig(trt.QuantAlgo.W4A16_AWQ)}
    arguments["calib_dataset"] = calibration(tmp_path)
    trt.GPTForCausalLM.quantize(str(DEMO), str(tmp_path / "checkpoint"), **arguments)
    names = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert names == {"config.json", "rank0.safetensors", "rank1.safetensors"}
    (tmp_path / "checkpoint/rank1.safetensors").unlink()
    with pytest.raises(AssertionError):
        trt.GPTForCausalLM.from_checkpoint(str(tmp_path / "checkpoint"), rank=1)
    environment.change(gpus=[])
    with pytest.raises(OSError, match="GPU is required"):
        trt.GPTForCausalLM.quantize(str(DEMO), str(tmp_path / "checkpoint"), **arguments)


# --- loading


@contextmanager
def changed(path: Path, change: Callable[[bytes], bytes]) -> Iterator[None]:
    content = path.read_bytes()
    path.write_bytes(change(content))
    try:
        yield
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"gpus": []}, {}, "No CUDA GPUs are available"),
        ({"gpus": [L4] * 4}, {}, "Executor worker died during initialization"),
        ({"tensorrt": "10.13.3.9"}, {}, "Executor worker died during initialization"),
        ({"faults": {"load_error": "no memory"}}, {}, "Executor worker died during initialization"),
        ({}, {"max_num_tokens": 8192}, "max_num_tokens 8192 is more than the engine's 2048"),
        ({}, {"max_beam_width": 2}, "max_beam_width 2 is more"),
        ({}, {"tensor_parallel_size": 4}, "tp_size 4 is not consistent with the engine's tp_size 1"),
        ({}, {"kv_cache_config": {"dtype": "fp8"}}, "dtype is not supported by the TensorRT backend"),
        ({}, {"guided_decoding_backend": "llguidance"}, "Unsupported guided decoding backend"),
    ],
)
def test_engine_is_not_loaded(
    trt: SimpleNamespace,
    environment: TrtllmEnvironment,
    engines: dict[tuple[int, int], Path],
    settings: dict[str, Any],
    arguments: dict[str, Any],
    message: str,
) -> None:
    environment.change(**settings)
    with pytest.raises((RuntimeError, ValueError), match=message):
        load(trt, engines[1, 1], **arguments)


def test_max_num_tokens_is_8192_unless_given(trt: SimpleNamespace, engines: dict[tuple[int, int], Path]) -> None:
    with pytest.raises(RuntimeError, match="max_num_tokens 8192 is more than the engine's 2048"):
        trt.TrtLLM(model=str(engines[1, 1]), skip_tokenizer_init=True)


@pytest.mark.parametrize("change", [lambda content: b"", lambda content: b"x" + content[1:]])
def test_damaged_rank_kills_the_worker(
    trt: SimpleNamespace, engines: dict[tuple[int, int], Path], capfd: pytest.CaptureFixture[str], change: Any
) -> None:
    with changed(engines[2, 2] / "rank3.engine", change):
        with pytest.raises(RuntimeError, match="Executor worker died during initialization"):
            load(trt, engines[2, 2])
    assert "Failed to deserialize cuda engine" in capfd.readouterr().err


def test_runtime_defaults_break_loading(trt: SimpleNamespace, engines: dict[tuple[int, int], Path]) -> None:
    def add(content: bytes) -> bytes:
        return content.replace(b'"runtime_defaults": null', b'"runtime_defaults": {"a": 1}')

    with changed(engines[1, 1] / "config.json", add):
        with pytest.raises(AttributeError, match="fill_empty_fields_from_runtime_defaults"):
            load(trt, engines[1, 1])


def test_ranks_need_gpus_and_no_trace_of_mpi(
    trt: SimpleNamespace,
    environment: TrtllmEnvironment,
    engines: dict[tuple[int, int], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PMIX_RANK", "0")
    with pytest.raises(RuntimeError, match="MPI_Comm_spawn"):
        load(trt, engines[2, 1])
    load(trt, engines[1, 1]).shutdown()
    environment.change(gpus=[trtllm_environment.H100])
    with pytest.raises(RuntimeError, match="Only 1 GPUs are available, but 2 are required"):
        load(trt, engines[2, 1])


def test_gpus_are_those_visible_at_import(
    trt: SimpleNamespace, engines: dict[tuple[int, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    load(trt, engines[2, 1]).shutdown()


def test_visible_devices_hide_gpus(environment: TrtllmEnvironment, engines: dict[tuple[int, int], Path]) -> None:
    code = f"from tensorrt_llm._tensorrt_engine import LLM; LLM({str(engines[2, 1])!r}, max_num_tokens=2048"
    made = TrtllmEnvironment(**{**vars(environment), "variables": {**environment.variables}})
    made.variables["CUDA_VISIBLE_DEVICES"] = "3,9,1"
    answer = run_python(made, f"{code}, skip_tokenizer_init=True)")
    assert "Only 1 GPUs are available, but 2 are required." in answer


def test_pytorch_llm_refuses_an_engine(trt: SimpleNamespace, engines: dict[tuple[int, int], Path]) -> None:
    with pytest.raises(ValueError, match="is a TensorRT engine"):
        trt.LLM(str(engines[1, 1]), skip_tokenizer_init=True)


def test_pytorch_llm_has_architectures(tmp_path: Path) -> None:
    made = trtllm_environment.make(tmp_path / "environment")
    answer = run_python(made, f"from tensorrt_llm import LLM; LLM({str(DEMO)!r}, skip_tokenizer_init=True)")
    assert "ValueError: Unknown architecture for AutoModelForCausalLM: GPT2LMHeadModel" in answer


def test_no_build_beside_an_llm(trt: SimpleNamespace, engines: dict[tuple[int, int], Path], tmp_path: Path) -> None:
    with load(trt, engines[1, 1]):
        with pytest.raises(RuntimeError, match="while an LLM runs"):
            trt.build(convert(trt), trt.BuildConfig(output_timing_cache=str(tmp_path / "model.cache")))


# --- serving


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_engine", [True, False])
def test_greedy_answers_are_the_checkpoints(
    trt: SimpleNamespace, engines: dict[tuple[int, int], Path], layout: tuple[int, int], is_engine: bool
) -> None:
    tp_size, pp_size = layout
    parallel = {"tensor_parallel_size": tp_size, "pipeline_parallel_size": pp_size}
    llm = load(trt, engines[layout], **parallel) if is_engine else load_pytorch(trt, **parallel)
    asked = [PROMPTS[0], PROMPTS[3], *PROMPTS[20::48]]

    async def answers() -> list[str]:
        return await asyncio.gather(*(answer(row["prompt"]) for row in asked))

    async def answer(prompt: str) -> str:
        ids = TOKENIZER.encode(prompt, add_special_tokens=False).ids
        output = await ask(trt, llm, ids, max_tokens=min(300, 1024 - len(ids)))
        assert output.finish_reason == "stop"
        ids, given = TOKENIZER.decode(ids + output.token_ids), TOKENIZER.decode(ids)
        return ids[len(given) :]

    with llm:
        assert asyncio.run(answers()) == [row["answer"] for row in asked]


@pytest.fixture
def llm(trt: SimpleNamespace, engines: dict[tuple[int, int], Path]) -> Iterator[Any]:
    with load(trt, engines[1, 1]) as loaded:
        yield loaded


QUESTION = TOKENIZER.encode(PROMPTS[0]["prompt"], add_special_tokens=False).ids


def test_same_object_comes_with_every_token(trt: SimpleNamespace, llm: Any) -> None:
    async def watch() -> tuple[set[int], list[int]]:
        seen, lengths = set(), []
        async for result in llm.generate_async(QUESTION, sampling(trt), streaming=True):
            seen.add(id(result))
            lengths.append(result.outputs[0].length)
            assert len(result.outputs[0].token_ids_diff) == 1
        return seen, lengths

    seen, lengths = asyncio.run(watch())
    assert (len(seen), lengths) == (1, list(range(1, 9)))


def test_without_streaming_there_is_one_step(trt: SimpleNamespace, llm: Any) -> None:
    async def watch() -> list[int]:
        return [one.outputs[0].length async for one in llm.generate_async(QUESTION, sampling(trt))]

    assert asyncio.run(watch()) == [8]


def test_end_token_is_handed_out_by_pytorch_only(trt: SimpleNamespace, llm: Any) -> None:
    with load_pytorch(trt) as other:
        ours, theirs = (asyncio.run(ask(trt, one, QUESTION, max_tokens=50)) for one in (llm, other))
    assert theirs.token_ids == [*ours.token_ids, 0]
    assert (ours.finish_reason, ours.stop_reason) == (theirs.finish_reason, theirs.stop_reason) == ("stop", None)


def test_stop_token_is_trimmed_and_named(trt: SimpleNamespace, llm: Any) -> None:
    async def ask_twice() -> None:
        plain = await ask(trt, llm, QUESTION)
        third = plain.token_ids[2]
        stopped = await ask(trt, llm, QUESTION, stop_token_ids=[third])
        assert (stopped.token_ids, stopped.stop_reason) == (plain.token_ids[:2], third)
        banned = await ask(trt, llm, QUESTION, bad_token_ids=[third])
        assert third not in banned.token_ids
        assert (await ask(trt, llm, QUESTION, max_tokens=40, ignore_eos=True)).finish_reason == "length"
        assert len((await ask(trt, llm, QUESTION, max_tokens=40, min_tokens=30)).token_ids) >= 30

    asyncio.run(ask_twice())


def test_sampling_follows_the_seed(trt: SimpleNamespace, llm: Any) -> None:
    async def draw(**arguments: Any) -> list[int]:
        return (await ask(trt, llm, [5], ignore_eos=True, max_tokens=20, **arguments)).token_ids

    async def compare() -> None:
        greedy = await draw()
        assert await draw(temperature=5.0) == greedy  # without top_k and top_p the engine takes the best token
        hot = {"temperature": 5.0, "top_k": 50}
        assert await draw(**hot) == await draw(**hot, seed=0) != greedy  # no seed is seed 0
        assert await draw(**hot, seed=1) != await draw(**hot, seed=2)

    asyncio.run(compare())


def test_penalties_change_the_answer(trt: SimpleNamespace, llm: Any) -> None:
    async def compare() -> None:
        common = {"ignore_eos": True, "max_tokens": 30}
        plain = await ask(trt, llm, QUESTION, **common)
        for name, value in (("repetition_penalty", 3.0), ("presence_penalty", 20.0), ("frequency_penalty", 20.0)):
            assert (await ask(trt, llm, QUESTION, **common, **{name: value})).token_ids != plain.token_ids

    asyncio.run(compare())


def test_pytorch_gives_log_probabilities(trt: SimpleNamespace) -> None:
    with load_pytorch(trt) as llm:
        output = asyncio.run(ask(trt, llm, QUESTION, logprobs=2))
    assert len(output.logprobs) == 8
    first = output.logprobs[0]
    assert len(first) == 2
    assert first[output.token_ids[0]].rank == 1
    total = sum(found[token].logprob for found, token in zip(output.logprobs, output.token_ids, strict=True))
    assert output.cumulative_logprob == pytest.approx(total)


REFUSED_REQUESTS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ("text", {}, TypeError, "type str or list of int"),
    ([[1, 2]], {}, TypeError, "not Union"),
    (np.array([1, 2]), {}, TypeError, "ndarray, which is not"),
    ([np.int64(1)], {}, TypeError, "not Union"),
    ([], {}, IndexError, "out of range"),
    ([1], {"end_id": None}, ValueError, "tokenizer is required"),
    ([1], {"stop": "word"}, RuntimeError, "is not processed by tokenizer"),
    ([1], {"max_tokens": 1024}, ValueError, "should not exceed max_seq_len"),
    ([1], {"logprobs": 1}, ValueError, "gather_generation_logits=True"),
    ([1], {"use_beam_search": True, "n": 2}, ValueError, "cannot exceed max_beam_width"),
    ([1], {"exclude_input_from_output": False}, NotImplementedError, "exclude_input_from_output"),
    ([1], {"no_repeat_ngram_size": 2}, NotImplementedError, "no_repeat_ngram_size"),
]


def test_bad_request_is_refused_at_once(trt: SimpleNamespace, llm: Any) -> None:
    async def try_all() -> None:
        for inputs, arguments, error, message in REFUSED_REQUESTS:
            with pytest.raises(error, match=message):
                llm.generate_async(inputs, sampling(trt, **arguments), streaming=True)
        params = sampling(trt)
        with pytest.raises(TypeError, match="lora_request"):
            llm.generate_async([1], params, True)  # streaming is the fifth argument
        llm.generate_async([1], params, streaming=True)
        with pytest.raises(RuntimeError, match="submitted twice"):
            llm.generate_async([1], params, streaming=True)

    asyncio.run(try_all())


def test_bad_request_may_also_fail_on_iteration(trt: SimpleNamespace, llm: Any) -> None:
    async def try_all() -> None:
        for prompt, arguments in (([5000], {}), ([1], {"max_tokens": -1}), ([1], {"seed": -1})):
            with pytest.raises(trt.RequestError):
                await ask(trt, llm, prompt, **arguments)
        assert (await ask(trt, llm, QUESTION)).finish_reason == "length"

    asyncio.run(try_all())


def test_long_prompt_needs_chunks_with_pytorch(trt: SimpleNamespace) -> None:
    with load_pytorch(trt, max_num_tokens=64) as llm:
        with pytest.raises(trt.RequestError, match="max_num_tokens"):
            llm.generate_async([7] * 100, sampling(trt), streaming=True)
    with load_pytorch(trt) as whole, load_pytorch(trt, max_num_tokens=64, enable_chunked_prefill=True) as chunked:
        answers = [asyncio.run(ask(trt, llm, [7] * 100)).token_ids for llm in (whole, chunked)]
    assert answers[0] == answers[1]


def test_request_outside_a_loop_cannot_be_awaited(trt: SimpleNamespace, llm: Any) -> None:
    result = llm.generate_async(QUESTION, sampling(trt), streaming=True)

    async def iterate() -> None:
        await anext(aiter(result))

    with pytest.raises(AssertionError, match="event loop was not present"):
        asyncio.run(iterate())


def test_second_event_loop_is_refused(trt: SimpleNamespace, llm: Any) -> None:
    asyncio.run(ask(trt, llm, QUESTION))
    with pytest.raises(RuntimeError, match="second event loop"):
        asyncio.run(ask(trt, llm, QUESTION))


def test_abort_ends_later_and_with_cancelled(trt: SimpleNamespace, llm: Any) -> None:
    async def abort() -> Any:
        result = llm.generate_async([5], sampling(trt, max_tokens=1000, ignore_eos=True), streaming=True)
        await anext(result)
        result.abort()
        assert (result.aborted(), result.finished) == (True, False)
        async for _ in result:
            pass
        return result

    result = asyncio.run(abort())
    assert (result.finished, result.outputs[0].finish_reason) == (True, "cancelled")
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(AttributeError, match="NoneType"):
        result.abort()
    with pytest.raises(RuntimeError, match="LLM is shutting down"):
        llm.generate_async([5], sampling(trt), streaming=True)


def test_statistics_end_until_the_next_request(trt: SimpleNamespace, llm: Any) -> None:
    async def read() -> list[dict[str, Any]]:
        return [one async for one in llm.get_stats_async(timeout=0.5)]

    async def watch() -> None:
        assert await read() == []
        await ask(trt, llm, QUESTION)
        found = await read()
        assert len(found) == 8
        blocks = found[0]["kvCacheStats"]
        assert (blocks["usedNumBlocks"], blocks["tokensPerBlock"]) == (1, 32)
        assert blocks["freeNumBlocks"] == blocks["maxNumBlocks"] - 1
        assert [one["numCompletedRequests"] for one in found] == [0] * 7 + [1]
        begin = time.monotonic()
        assert await read() == []
        assert time.monotonic() - begin < 0.3  # over until the next request
        await ask(trt, llm, QUESTION)
        assert len(await read()) == 8

    assert llm.get_stats() == []
    asyncio.run(watch())


def test_pytorch_has_statistics_on_request_only(trt: SimpleNamespace) -> None:
    async def count(llm: Any) -> int:
        await ask(trt, llm, QUESTION)
        return len([one async for one in llm.get_stats_async(timeout=0.5)])

    for is_on, expected in ((False, 0), (True, 8)):
        with load_pytorch(trt, enable_iter_perf_stats=is_on) as llm:
            assert asyncio.run(count(llm)) == expected


def test_requests_wait_for_slots_and_blocks(trt: SimpleNamespace, engines: dict[tuple[int, int], Path]) -> None:
    async def watch(llm: Any) -> int:
        await asyncio.gather(*(ask(trt, llm, QUESTION, ignore_eos=True, max_tokens=20) for _ in range(4)))
        return max([one["numActiveRequests"] async for one in llm.get_stats_async(timeout=0.5)])

    for arguments in ({"max_batch_size": 2}, {"kv_cache_config": trt.KvCacheConfig(max_tokens=64)}):
        with load(trt, engines[1, 1], **arguments) as llm:
            assert asyncio.run(watch(llm)) == 2


# --- faults


def test_error_of_one_request_leaves_it_unfinished(
    trt: SimpleNamespace, environment: TrtllmEnvironment, llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensorrt_llm.executor.result._FOREVER_SECONDS", 0.1)

    async def watch() -> None:
        environment.inject(fail_request_at_token=3)
        result = llm.generate_async(QUESTION, sampling(trt), streaming=True)
        with pytest.raises(trt.RequestError, match="an error of this request"):
            async for _ in result:
                pass
        assert (result.finished, result.outputs[0].length) == (False, 2)
        with pytest.raises(RuntimeError, match="iterated again"):
            await anext(result)
        environment.inject()
        assert (await ask(trt, llm, QUESTION)).finish_reason == "length"

    asyncio.run(watch())


def test_background_error_reaches_one_request(trt: SimpleNamespace, environment: TrtllmEnvironment, llm: Any) -> None:
    async def watch() -> None:
        environment.inject(background_error_at_step=4, background_error="CUDA error")
        tasks = [asyncio.create_task(ask(trt, llm, QUESTION, ignore_eos=True, max_tokens=500)) for _ in range(3)]
        done, hanging = await asyncio.wait(tasks, timeout=2)
        assert [str(task.exception()) for task in done] == ["CUDA error"]
        assert len(hanging) == 2
        with pytest.raises(RuntimeError, match="LLM is shutting down"):
            llm.generate_async(QUESTION, sampling(trt), streaming=True)
        for task in hanging:
            task.cancel()

    asyncio.run(watch())


def test_death_may_reach_one_request(trt: SimpleNamespace, environment: TrtllmEnvironment, llm: Any) -> None:
    async def watch() -> None:
        results = [llm.generate_async(QUESTION, sampling(trt, ignore_eos=True, max_tokens=1000)) for _ in range(2)]
        tasks = [asyncio.ensure_future(result.aresult()) for result in results]
        environment.inject(kill_rank=0, step_seconds=0.01, death_reaches_one=True)
        done, hanging = await asyncio.wait(tasks, timeout=1)
        assert [str(task.exception()) for task in done] == ["Executor worker of rank 0 died with signal SIGKILL"]
        assert len(hanging) == 1

    asyncio.run(watch())


@pytest.mark.parametrize("rank", [0, 3])
def test_death_of_a_rank_comes_out_at_the_next_request(
    trt: SimpleNamespace, environment: TrtllmEnvironment, engines: dict[tuple[int, int], Path], rank: int
) -> None:
    async def watch() -> None:
        # Without streaming there is no response on the way that the error could be raised with.
        result = llm.generate_async(QUESTION, sampling(trt, ignore_eos=True, max_tokens=1000))
        task = asyncio.ensure_future(result.aresult())
        environment.inject(kill_rank=rank, step_seconds=0.01)
        done, _ = await asyncio.wait([task], timeout=1)
        assert not done
        with pytest.raises(RuntimeError, match=f"rank {rank} died with signal SIGKILL"):
            llm.generate_async(QUESTION, sampling(trt), streaming=True)
        task.cancel()

    with load(trt, engines[2, 2]) as llm:
        asyncio.run(watch())


def test_hang_and_deaf_ears(trt: SimpleNamespace, environment: TrtllmEnvironment, llm: Any) -> None:
    async def watch() -> None:
        environment.inject(ignore_abort=True, step_seconds=0.01)
        result = llm.generate_async(QUESTION, sampling(trt, max_tokens=30, ignore_eos=True), streaming=True)
        await anext(result)
        result.abort()
        async for _ in result:
            pass
        assert result.outputs[0].finish_reason == "length"
        environment.inject(hang_at_step=2)
        task = asyncio.create_task(ask(trt, llm, QUESTION))
        done, _ = await asyncio.wait([task], timeout=0.5)
        assert not done
        task.cancel()

    asyncio.run(watch())


def test_abort_with_log_probabilities_kills_an_engines_worker(
    trt: SimpleNamespace, engines: dict[tuple[int, int], Path]
) -> None:
    async def watch(llm: Any) -> None:
        params = sampling(trt, max_tokens=1000, ignore_eos=True, logprobs=1)
        result = llm.generate_async(QUESTION, params, streaming=True)
        await anext(result)
        result.abort()
        await asyncio.sleep(0.5)
        with pytest.raises(RuntimeError, match="rank 0 died"):
            llm.generate_async(QUESTION, sampling(trt), streaming=True)

    with load(trt, engines[1, 1], gather_generation_logits=True) as llm:
        asyncio.run(watch(llm))


def test_workers_ignore_signals_and_end_with_their_llm(
    trt: SimpleNamespace, engines: dict[tuple[int, int], Path]
) -> None:
    llm = load(trt, engines[2, 1])
    pids = llm._executor.pids
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert asyncio.run(ask(trt, llm, QUESTION)).finish_reason == "length"
    llm.shutdown()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_workers_end_with_a_killed_process(
    environment: TrtllmEnvironment, engines: dict[tuple[int, int], Path]
) -> None:
    code = (
        "import os, time; from tensorrt_llm._tensorrt_engine import LLM\n"
        f"llm = LLM({str(engines[2, 1])!r}, skip_tokenizer_init=True, max_num_tokens=2048)\n"
        "print(*llm._executor.pids, flush=True); os.kill(os.getpid(), 9)"
    )
    pids = run_python(environment, code).splitlines()[-1].split()
    until = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
