"""The command line: options, sentences, exit codes, and what is left behind, whatever happens meanwhile.

Where it does not matter how an engine is compiled, a fake compiler writes a few bytes for one. The engines of the last
part are real, made of the bundled demo checkpoint.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import engines
import fake_compiler
import pytest
from errors import CompileError
from fake_compiler import FakeCompiler
from gpus import Gpu
from hub_server import HubServer, model_files

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = ROOT / "scripts/demo_checkpoint/demo-gpt2"
SOON_SECONDS = 30  # for what comes at once unless something is wrong


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """What --json printed; fails if anything else is on stdout."""
        return json.loads(self.out)

    @property
    def sentence(self) -> str:
        """The error, without the line's beginning."""
        last = self.err.splitlines()[-1]
        assert last.startswith("engines: ")
        return last.removeprefix("engines: ")


Cli = Callable[..., Ended]


@contextmanager
def logging_put_back() -> Iterator[None]:
    """engines.main sets up logging for the whole process."""
    root = logging.getLogger()
    names = ("engines", "checkpoint", "store", "compilers", "verify")
    handlers, level, levels = root.handlers[:], root.level, [logging.getLogger(name).level for name in names]
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for name, before in zip(names, levels, strict=True):
            logging.getLogger(name).setLevel(before)


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """engines.main in this process, in an empty folder, on a machine without GPU, with a store of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engines, "find_gpus", lambda: [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*options: str | Path, model: str | Path | None = DEMO) -> Ended:
        given = [] if model is None else ["--model", str(model)]
        capsys.readouterr()
        with logging_put_back():
            code = engines.main([*given, *map(str, options)])
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return run


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    fake = FakeCompiler()
    monkeypatch.setitem(sys.modules, fake_compiler.NAME, fake)
    return fake


def engines_in(cache: Path) -> list[str]:
    return sorted(path.parent.name for path in cache.glob("*/engine.json"))


def half_built_in(cache: Path) -> list[Path]:
    return list(cache.glob(".building/*"))


# --- options


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"engine": "openvino", "dtype": "float32", "quantization": "none", "trust_remote_code": False}),
        ([], {"tensor_parallel": 1, "pipeline_parallel": 1, "gpu": None}),
        (["--engine", "openvino"], {"engine": "openvino"}),
        (["--dtype", "float32"], {"dtype": "float32"}),
        (["--dtype", "bfloat16"], {"dtype": "bfloat16"}),
        (["--dtype", "float16"], {"dtype": "float16"}),
        (["--quantization", "int8"], {"quantization": "int8"}),
        (["--quantization", "int4"], {"quantization": "int4"}),
        (["--tp", "1", "--pp", "1"], {"tensor_parallel": 1, "pipeline_parallel": 1}),
        (["--trust-remote-code"], {"trust_remote_code": True}),
    ],
)
def test_an_option_is_in_the_plan(cli: Cli, compiler: FakeCompiler, options: list[str], expected: dict[str, Any]):
    plan = cli("--plan", "--json", *options).document["plan"]
    assert {name: plan[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "limits"),
    [
        ([], (16, 1023, 1024)),
        (["--max-batch-size", "3"], (3, 1023, 1024)),
        (["--max-seq-len", "100"], (16, 99, 100)),
        (["--max-input-len", "100"], (16, 100, 1024)),
        (["--max-input-len", "10", "--max-seq-len", "20"], (16, 10, 20)),
    ],
)
def test_a_limit_is_in_the_plan(cli: Cli, compiler: FakeCompiler, options: list[str], limits: tuple[int, ...]):
    planned = cli("--plan", "--json", *options).document["plan"]["limits"]
    assert (planned["max_batch_size"], planned["max_input_len"], planned["max_seq_len"]) == limits


def test_each_option_that_changes_the_engine_changes_its_key(cli: Cli, compiler: FakeCompiler):
    options = [["--dtype", "float16"], ["--quantization", "int8"], ["--max-batch-size", "3"], ["--max-seq-len", "9"]]
    keys = [cli("--plan", "--json", *option).document["key"] for option in [[], *options]]
    assert len(set(keys)) == len(keys)


def test_what_was_decided_is_said(cli: Cli, compiler: FakeCompiler):
    ended = cli("--plan")
    assert "engine: openvino (auto: no NVIDIA GPU here)\n" in ended.err
    assert ended.out.splitlines()[1:3] == [
        "engine         openvino, float32, quantization none, GPT2LMHeadModel",
        "limits         16 sequences, prompts of 1023 tokens, 1024 with the answer",
    ]


def test_a_gpu_decides_for_tensorrt(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    gpu = Gpu(index=0, product="NVIDIA-L4", compute_capability="8.9", memory_mib=23034)
    monkeypatch.setattr(engines, "find_gpus", lambda: [gpu])
    assert "engine: tensorrt (auto: this machine has NVIDIA-L4)\n" in cli("--plan").err


def test_gpus_are_not_looked_for_when_the_engine_is_named(
    cli: Cli, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
):
    def find_gpus() -> list[Gpu]:
        raise AssertionError("nvidia-smi may take long")

    monkeypatch.setattr(engines, "find_gpus", find_gpus)
    assert cli("--plan", "--engine", "openvino").code == 0


def test_help_states_the_defaults(cli: Cli, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        cli("--help", model=None)
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for default in ("(default: auto)", "(default: none)", "(default: 16)", "(default: main)"):
        assert default in text
    for option in re.findall(r"--[a-z-]+", " ".join(engines.__doc__.split())):
        assert option in text


# --- the model's name and places


@pytest.mark.parametrize("written", ["{}", "{}/", "{}/.", "{}/../demo-gpt2"])
def test_the_served_name_is_the_folders(cli: Cli, compiler: FakeCompiler, tmp_path: Path, written: str):
    report = cli("--json", model=written.format(DEMO)).document
    assert (report["served_name"], report["infer_name"]) == ("demo-gpt2", "demo-gpt2_infer")
    assert report["repository"] == str(tmp_path / "out/demo-gpt2")


def test_a_relative_folder_is_one_of_the_working_directory(cli: Cli, compiler: FakeCompiler, tmp_path: Path):
    (tmp_path / "models").symlink_to(DEMO.parent)
    assert cli("--json", model="models/demo-gpt2").document["model"] == str(DEMO)


def test_a_linked_folder_is_served_as_the_link_is_called(cli: Cli, compiler: FakeCompiler, tmp_path: Path):
    (tmp_path / "my-model").symlink_to(DEMO)
    report = cli("--json", model=tmp_path / "my-model").document
    assert (report["served_name"], report["model"]) == ("my-model", str(DEMO))


def test_the_home_folder_may_be_written_as_a_tilde(
    cli: Cli, compiler: FakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    report = cli("--json", "--output=~/served", "--cache-dir=~/engines").document
    assert report["repository"] == str(tmp_path / "home/served")
    assert report["engine"].startswith(str(tmp_path / "home/engines/openvino-"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


def test_without_a_home_folder_the_store_must_be_named(
    cli: Cli, compiler: FakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cli("--plan").sentence == (
        "this user has no home folder for the engine store; give a folder with --cache-dir"
    )
    assert cli("--plan", "--cache-dir", tmp_path / "engines").code == 0


def test_the_store_may_have_spaces_in_its_path(cli: Cli, compiler: FakeCompiler, tmp_path: Path):
    assert cli("--cache-dir", tmp_path / "my engines").code == 0
    assert len(engines_in(tmp_path / "my engines")) == 1


def test_the_checkpoint_may_have_spaces_in_its_path(cli: Cli, compiler: FakeCompiler, tmp_path: Path):
    (tmp_path / "my models").symlink_to(DEMO.parent)
    assert cli(model=tmp_path / "my models/demo-gpt2").code == 0


def test_the_end_says_how_to_serve_it(cli: Cli, compiler: FakeCompiler):
    lines = cli().out.splitlines()
    assert lines[3].startswith("repository     out/demo-gpt2 (built, ")
    assert lines[-1] == f"serve it with  python {ROOT}/scripts/serve.py out/demo-gpt2"


# --- errors


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--served-name", "my model"], 2, r"'my model' cannot be a Triton model's name; give one with --served-name"),
        (["--served-name", "tensorrt_llm"], 2, "'tensorrt_llm' is the name of a model that every repository has"),
        (["--served-name", "x_infer"], 2, "'x_infer' is the name of a model that every repository has"),
        (["--tp", "2"], 2, "--tp 2 splits a model over GPUs, .*; leave --tp out, or build with --engine tensorrt"),
        (["--pp", "2"], 2, "--pp 2 splits a model over GPUs, .*; leave --pp out, or build with --engine tensorrt"),
        (["--gpu", "NVIDIA-L4"], 2, "--gpu NVIDIA-L4 is for engines that run on a GPU, .*; leave it out"),
        (["--max-seq-len", "1025"], 2, "--max-seq-len 1025 is more than the model's 1024 positions; use at most 1024"),
        (["--max-input-len", "1024"], 2, "--max-input-len 1024 leaves no room for an answer .*; use at most 1023"),
        (["--revision", "v1"], 2, "--revision 'v1' is for hub ids, and .* is a local folder; leave it out"),
        (["--output", "my models/x"], 2, "--output '.*/my models/x' has ' ' in its path, and tritonserver cannot load"),
        (["--output", ""], 2, "argument --output: the path is empty"),
        (["--tp", "0"], 2, "argument --tp: '0' is not a whole number of 1 or more; --help lists the options"),
        (["--tp", "two"], 2, "argument --tp: 'two' is not a whole number of 1 or more"),
        (["--max-batch-size", "-1"], 2, "argument --max-batch-size: .*"),
        (["--engine", "onnx"], 2, "argument --engine: invalid choice: 'onnx' .*openvino"),
        (["--dtype", "fp16"], 2, "argument --dtype: invalid choice: 'fp16' .*float16"),
        (["--quantisation", "int8"], 2, "unrecognized arguments: --quantisation int8; --help lists the options"),
        (["--plan", "--tp"], 2, "argument --tp: expected one argument"),
        (
            ["--token-file", "none", "--model", "x/y"],
            3,
            "the token file of --token-file 'none' cannot be read: No such",
        ),
        (["--model", "./none"], 3, "folder './none' does not exist; --model takes a Hugging Face id or an existing"),
        (["--model", "a b"], 3, "'a b' is neither a folder here nor a Hugging Face id"),
        (["--model", ""], 3, "'' is neither a folder here nor a Hugging Face id"),
        (["--model", "x/y", "--offline"], 3, "'x/y' at 'main' is not in the cache .*; run once without --offline"),
        (
            ["--engine", "tensorrt"],
            4,
            "--engine tensorrt needs TensorRT-LLM, which is not installed here; build inside",
        ),
        (["--engine", "tensorrt", "--verify"], 2, "--verify runs CPU engines only, .*; leave it out, .*gpu_smoke.py"),
        (["--engine", "pytorch", "--verify"], 2, "--verify runs CPU engines only, .*; leave it out, .*gpu_smoke.py"),
        (["--engine", "pytorch", "--quantization", "fp8"], 2, "--quantization fp8 is made by the TensorRT builder"),
        (["--llm-args", "{}}"], 2, "argument --llm-args: the value is not JSON .*; write for instance"),
        (
            ["--llm-args", '{"stream_interval": 2}'],
            2,
            "--llm-args is for TensorRT-LLM's engines, and this .* openvino;",
        ),
        (["--engine", "pytorch", "--llm-args", '{"x": 2}'], 2, "--llm-args: x is no argument known here; known are"),
        (["--calibration-data", "none"], 2, "--calibration-data none is for TensorRT engines with .*; leave it out"),
        (["--output", "taken"], 6, "--output .*/taken exists and is not a repository of this program; give another"),
        (
            ["--cache-dir", "file"],
            6,
            "the engine store .*/file is not a folder; choose another folder with --cache-dir",
        ),
    ],
)
@pytest.mark.parametrize("as_json", [False, True], ids=["words", "json"])
def test_an_error_is_one_sentence(
    cli: Cli, compiler: FakeCompiler, tmp_path: Path, options: list[str], code: int, sentence: str, as_json: bool
):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.txt").write_text("years")
    (tmp_path / "file").write_text("")
    ended = cli(*options, *(["--json"] if as_json else []))
    assert ended.code == code
    assert re.match(sentence, ended.sentence)
    assert "Traceback" not in ended.err
    if as_json:
        assert ended.document["error"]["message"] == ended.sentence
        assert ended.document["error"]["exit_code"] == code
    else:
        assert ended.out == ""
    assert not compiler.plans
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "taken/thesis.txt").read_text() == "years"


def test_an_error_is_left_for_the_pods_status(
    cli: Cli, compiler: FakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TERMINATION_MESSAGE_PATH", str(tmp_path / "message"))
    ended = cli(model="/nowhere")
    assert (tmp_path / "message").read_text() == f"engines: {ended.sentence}"


def test_the_engine_in_the_repository_may_be_links_to_the_store(cli: Cli, compiler: FakeCompiler, tmp_path: Path):
    ended = cli("--engine", "openvino", "--output", tmp_path / "models/demo", "--symlink-engine", "--json")
    links = list((tmp_path / "models/demo/tensorrt_llm/1/engine").iterdir())
    assert links
    assert {link.readlink().parent for link in links} == {Path(ended.document["engine"])}


def test_a_model_must_be_named(cli: Cli):
    ended = cli("--json", model=None)
    assert ended.code == 2
    assert ended.sentence == "the following arguments are required: --model; --help lists the options"
    assert ended.document["error"]["kind"] == "UsageError"


def test_a_folder_whose_name_no_model_can_have_needs_a_served_name(cli: Cli, compiler: FakeCompiler, tmp_path: Path):
    (tmp_path / "my model").symlink_to(DEMO)
    assert cli(model="my model").sentence.startswith("'my model' cannot be a Triton model's name; give one with --serv")
    assert not compiler.plans
    assert cli("--served-name", "m", model="my model").code == 0


def test_an_output_that_cannot_be_written_is_found_before_compiling(
    cli: Cli, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    ended = cli()
    assert ended.code == 6
    assert "is read-only for user" in ended.sentence
    assert not compiler.plans


def test_a_compiler_that_fails_leaves_nothing(cli: Cli, compiler: FakeCompiler, tmp_path: Path):
    def fail() -> None:
        raise CompileError("no memory; use a machine with more")

    compiler.during = fail
    ended = cli("--json")
    assert (ended.code, ended.sentence) == (5, "no memory; use a machine with more")
    assert ended.document["error"]["kind"] == "CompileError"
    assert not (tmp_path / "out").exists()
    assert not half_built_in(tmp_path / "cache/triton-trtllm")


def test_a_defect_of_ours_is_a_sentence_too_and_a_traceback_on_request(cli: Cli, compiler: FakeCompiler):
    def fail() -> None:
        raise ZeroDivisionError("oops")

    compiler.during = fail
    ended = cli("--json")
    assert ended.code == 1
    assert ended.sentence == "unexpected ZeroDivisionError: oops; run again with -vv and report the traceback"
    assert "Traceback" not in ended.err
    assert ended.document["error"]["message"] == ended.sentence
    assert "Traceback" in cli("-vv").err


# --- what is done, and what is not done again


def test_json_is_one_document_and_all_of_stdout(cli: Cli, compiler: FakeCompiler, tmp_path: Path):
    report = cli("--json", "-vv", "--served-name", "m", "--output", "there").document
    assert report["repository"] == str(tmp_path / "there")
    assert report["was_stored"] is False
    assert Path(report["engine"], "engine.json").is_file()
    assert report.keys() == {
        *("model", "revision", "plan", "key", "engine", "was_stored"),
        *("repository", "served_name", "infer_name", "seconds"),
    }


def test_plan_builds_nothing(cli: Cli, compiler: FakeCompiler, tmp_path: Path):
    assert cli("--plan").out.endswith("in the store   no: a build would compile it\n")
    assert cli("--plan", "--json").document["stored"] is None
    assert not compiler.plans
    assert not (tmp_path / "out").exists()
    assert not engines_in(tmp_path / "cache/triton-trtllm")


def test_plan_says_what_is_there(cli: Cli, compiler: FakeCompiler):
    engine = cli("--json").document["engine"]
    assert cli("--plan", "--json").document["stored"] == engine
    assert f"in the store   {engine}\n" in cli("--plan").out


# --- sizes


CONFIG_OF_8B = {
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


@pytest.fixture
def only_config(tmp_path: Path) -> Callable[..., Path]:
    """A folder with nothing but a config.json."""

    def write(**changes: Any) -> Path:
        folder = tmp_path / "only-config"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(CONFIG_OF_8B | changes))
        return folder

    return write


@pytest.mark.parametrize("engine", ["tensorrt", "pytorch"])
def test_a_plan_for_gpus_needs_neither_gpus_nor_weights(
    cli: Cli, only_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, engine: str
):
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    monkeypatch.setitem(sys.modules, "torch", None)
    ended = cli("--plan", "--json", "--engine", engine, model=only_config())
    report = ended.document
    assert (ended.code, report["key"], report["stored"], report["plan"]["dtype"]) == (0, None, None, "bfloat16")
    sizing = report["sizing"]
    assert sizing["parameters"]["total"] == 8_030_261_248
    assert sizing["weights"]["bytes"] == 16_060_522_496
    assert sizing["kv_cache"]["bytes_per_token"] == 131_072
    assert {gpu["product"] for gpu in sizing["gpus"]} >= {"Tesla-T4", "NVIDIA-A10G", "NVIDIA-H100-80GB-HBM3"}


def test_a_gpu_that_is_named_is_planned_for(cli: Cli, only_config: Callable[..., Path]):
    ended = cli("--plan", "--gpu", "NVIDIA-A10G", model=only_config())
    assert "engine: tensorrt (auto: planned for NVIDIA-A10G)\n" in ended.err
    assert "--tp 1 --pp 1 fits on NVIDIA-A10G, with room for 9 sequences of 4096 tokens; all 16" in ended.out
    assert [line.split()[0] for line in ended.out.splitlines() if line.startswith("NVIDIA-")] == ["NVIDIA-A10G"]
    assert "in the store" not in ended.out


def test_the_gpu_of_this_machine_comes_first_with_its_own_memory(
    cli: Cli, only_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    gpu = Gpu(index=0, product="NVIDIA-L4", compute_capability="8.9", memory_mib=20000)
    monkeypatch.setattr(engines, "find_gpus", lambda: [gpu])
    sizing = cli("--plan", "--json", model=only_config()).document["sizing"]
    assert (sizing["detailed"], sizing["gpus"][0]["product"]) == ("NVIDIA-L4", "NVIDIA-L4")
    assert [each["memory_mib"] for each in sizing["gpus"] if each["product"] == "NVIDIA-L4"] == [20000]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            ["--gpu", "Tesla-T4"],
            4,
            "Tesla-T4 has compute capability 7.5, and TensorRT-LLM 1.2.1 needs 8.0; use a newer",
        ),
        (["--gpu", "A10G"], 2, "--gpu A10G is no product known here; perhaps you meant 'NVIDIA-A10G'; use one of "),
        (
            ["--engine", "tensorrt", "--tp", "5"],
            2,
            "--tp 5 does not divide the 32 attention heads of '.*'; use 1, 2, 4,",
        ),
        (["--engine", "pytorch", "--pp", "33"], 2, "--pp 33 is more than the 32 layers of '.*'; use at most 32"),
        (["--gpu", "NVIDIA-A10G", "--quantization", "fp8"], 4, "NVIDIA-A10G has compute capability 8.6, and FP8 needs"),
        (["--engine", "openvino", "--quantization", "fp8"], 2, "--quantization fp8 is computed by NVIDIA GPUs only; "),
        (["--engine", "openvino", "--kv-cache-dtype", "fp8"], 2, "--kv-cache-dtype fp8 is for engines on NVIDIA GPUs"),
    ],
)
def test_a_plan_that_cannot_be_is_one_sentence(
    cli: Cli, compiler: FakeCompiler, only_config: Callable[..., Path], options: list[str], code: int, message: str
):
    ended = cli("--plan", *options, model=only_config())
    assert (ended.code, ended.out) == (code, "")
    assert re.match(message, ended.sentence)


def test_an_architecture_without_sizes_is_refused_for_gpus_and_planned_for_the_cpu(
    cli: Cli, compiler: FakeCompiler, only_config: Callable[..., Path]
):
    folder = only_config(architectures=["FalconForCausalLM"])
    assert cli("--plan", "--engine", "tensorrt", model=folder).code == 4
    ended = cli("--plan", "--engine", "openvino", model=folder)
    assert ended.code == 0
    assert "is a FalconForCausalLM, whose tensors are not known here; sizes can be planned for " in ended.out


def test_a_plan_for_the_cpu_has_sizes_and_no_gpus(cli: Cli, compiler: FakeCompiler):
    sizing = cli("--plan", "--json").document["sizing"]
    assert sizing["parameters"]["total"] == 2_173_440
    assert sizing["weights"]["bytes"] == 4 * 2_173_440
    assert sizing["machine"]["fits"] is True
    assert "gpus" not in sizing
    assert "NVIDIA" not in cli("--plan").out


def test_a_plan_without_weights_has_no_key(cli: Cli, compiler: FakeCompiler, only_config: Callable[..., Path]):
    report = cli("--plan", "--json", "--engine", "openvino", model=only_config()).document
    assert (report["key"], report["stored"]) == (None, None)
    out = cli("--plan", "--engine", "openvino", model=only_config()).out
    assert out.endswith("in the store   no: there are no weights to compile\n")


def test_a_second_run_takes_the_stored_engine(cli: Cli, compiler: FakeCompiler):
    first, second = cli("--json").document, cli("--json", "--served-name", "again").document
    assert len(compiler.plans) == 1
    assert (second["was_stored"], second["engine"]) == (True, first["engine"])
    assert "(stored engine, " in cli().out


def test_force_builds_again(cli: Cli, compiler: FakeCompiler, tmp_path: Path):
    cli()
    assert cli("--json", "--force").document["was_stored"] is False
    assert len(compiler.plans) == 2
    assert (tmp_path / "out/demo-gpt2/tensorrt_llm/1/engine/openvino_model.xml").read_text() == "<net number='2'/>"


def test_the_manifest_is_the_plans(cli: Cli, compiler: FakeCompiler):
    report = cli("--json", "--dtype", "bfloat16", "--max-batch-size", "2").document
    manifest = json.loads(Path(report["engine"], "engine.json").read_text())
    assert manifest["limits"] == report["plan"]["limits"]
    assert (manifest["key"], manifest["dtype"], manifest["vocab_size"]) == (report["key"], "bfloat16", 512)
    assert manifest["files"].keys() == {"openvino_model.bin", "openvino_model.xml"}


# --- several processes, and those that are ended


@dataclass
class Builders:
    """Processes that run engines.main with the fake compiler, which compiles until `gate` exists."""

    folder: Path
    started: list[subprocess.Popen]

    @property
    def gate(self) -> Path:
        return self.folder / "gate"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def start(self, *options: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "tests/fakes/fake_compiler.py"), str(self.gate), "--model", str(DEMO)]
        command += ["--engine", "openvino", "--output", str(self.folder / "out/m"), "--cache-dir", str(self.cache)]
        process = subprocess.Popen(
            [*command, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT / "build")},
        )
        self.started.append(process)
        return process


@pytest.fixture
def builders(tmp_path: Path) -> Iterator[Builders]:
    builders = Builders(tmp_path, [])
    yield builders
    for process in builders.started:
        process.kill()
        process.communicate()


def wait_for_line(process: subprocess.Popen, text: str) -> None:
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"the process ended without a line with {text!r}")


def test_of_two_at_once_one_builds_and_the_other_says_that_it_waits(builders: Builders):
    first = builders.start("--json")
    wait_for_line(first, "compiling")
    second = builders.start("--json")
    wait_for_line(second, f"being built by process {first.pid}")
    builders.gate.touch()
    reports = [json.loads(process.communicate(timeout=SOON_SECONDS)[0]) for process in (first, second)]
    assert [report["was_stored"] for report in reports] == [False, True]
    assert len(engines_in(builders.cache)) == 1
    assert (builders.folder / "out/m/repository.json").is_file()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_build_leaves_nothing(builders: Builders, number: int, code: int):
    process = builders.start("--json")
    wait_for_line(process, "compiling")
    process.send_signal(number)
    out, err = process.communicate(timeout=SOON_SECONDS)
    assert process.returncode == code
    assert "Traceback" not in err
    if number == signal.SIGINT:
        assert err.splitlines()[-1] == "engines: interrupted; nothing half-built is left"
        assert json.loads(out)["error"]["exit_code"] == 130
    assert not engines_in(builders.cache)
    assert not half_built_in(builders.cache)
    assert not (builders.folder / "out").exists()


def test_the_hub_token_is_sent_and_never_shown(tmp_path: Path):
    token = "hf_a-token-of-nobody-0123456789"
    with HubServer() as hub:
        hub.add("org/secret", model_files())
        ended = subprocess.run(
            [
                sys.executable,
                ROOT / "build/engines.py",
                "--model",
                "org/secret",
                "--engine",
                "openvino",
                "-vv",
                "--json",
            ],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "HF_TOKEN": token},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=SOON_SECONDS,
            check=False,
        )
        assert any(token in request.headers.get("authorization", "") for request in hub.requests)
    assert ended.returncode == 3
    assert "does not know the token of HF_TOKEN" in ended.stderr
    assert "Traceback" in ended.stderr
    assert token not in ended.stdout + ended.stderr


# --- real engines


def run_real(folder: Path, *options: str) -> Ended:
    """In this process, as importing the libraries takes longer than the build, and on one thread: others only wait."""
    torch = pytest.importorskip("torch")
    num_threads, out, err = torch.get_num_threads(), io.StringIO(), io.StringIO()
    torch.set_num_threads(1)
    try:
        with logging_put_back(), redirect_stdout(out), redirect_stderr(err):
            code = engines.main([*real_options(folder), *options])
    finally:
        torch.set_num_threads(num_threads)
    return Ended(code, out.getvalue(), err.getvalue())


def real_options(folder: Path) -> list[str]:
    options = ["--model", str(DEMO), "--engine", "openvino", "--json"]
    return [*options, "--output", str(folder / "out/m"), "--cache-dir", str(folder / "cache")]


@dataclass(frozen=True)
class Killed:
    """What a builder left that was killed while it exported, and what the next one did."""

    folder: Path
    left_half_built: int
    left_engines: int
    left_repository: bool
    next: Ended


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    for package in ("torch", "optimum", "nncf", "openvino_genai"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, str(ROOT / "build/engines.py"), *real_options(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + SOON_SECONDS
        while not list(folder.glob("cache/.building/*/.export.*")):  # the tokenizer is written, the export goes on
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    left = (len(half_built_in(folder / "cache")), len(engines_in(folder / "cache")), (folder / "out").exists())
    return Killed(folder, *left, next=run_real(folder, "--verify"))


def test_a_killed_builder_leaves_neither_engine_nor_repository(killed: Killed):
    assert (killed.left_half_built, killed.left_engines, killed.left_repository) == (1, 0, False)


def test_the_next_build_works_and_cleans_up(killed: Killed):
    assert killed.next.code == 0
    assert killed.next.document["was_stored"] is False
    assert len(engines_in(killed.folder / "cache")) == 1
    assert not half_built_in(killed.folder / "cache")
    assert (killed.folder / "out/m/tensorrt_llm/1/engine/openvino_model.bin").stat().st_size > 1_000_000


def test_the_demo_engine_says_what_transformers_says(killed: Killed):
    verified = killed.next.document["verified"]
    assert verified["exact"] is True
    assert verified["num_equal"] == verified["num_tokens"] > 100


def test_with_a_stored_engine_nothing_large_is_imported(killed: Killed):
    code = (
        "import sys, engines; code = engines.main(sys.argv[1:]); "
        "large = {'torch', 'transformers', 'openvino', 'optimum', 'nncf', 'numpy', 'huggingface_hub'}; "
        "print(sorted(large & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", code, *real_options(killed.folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "build")},
        capture_output=True,
        text=True,
        timeout=SOON_SECONDS,
        check=True,
    )
    assert json.loads(ended.stdout)["was_stored"] is True
    assert ended.stderr.splitlines()[-1] == "[]"
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("quantization", "dtype", "least_share", "most_bytes"),
    [("int8", "float16", 0.8, 3_000_000), ("int4", "bfloat16", 0.6, 2_200_000)],
)
def test_an_engine_of_fewer_bits_is_verified_by_share(
    killed: Killed, quantization: str, dtype: str, least_share: float, most_bytes: int
):
    ended = run_real(killed.folder, "--quantization", quantization, "--dtype", dtype, "--verify")
    report = ended.document
    verified = report["verified"]
    num_alike = verified["num_equal"] + len(verified["ties"])
    assert (ended.code, verified["exact"], verified["least_share"]) == (0, False, least_share)
    assert len(verified["differences"]) == verified["num_tokens"] - num_alike
    assert least_share <= num_alike / verified["num_tokens"] <= 1
    assert f"verify: {100 * num_alike / verified['num_tokens']:.1f} % of {verified['num_tokens']} tokens" in ended.err
    assert (report["plan"]["quantization"], report["plan"]["dtype"]) == (quantization, dtype)
    assert sum(path.stat().st_size for path in Path(report["engine"]).iterdir()) < most_bytes
