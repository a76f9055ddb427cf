"""TensorRT engines, built on the double of TensorRT-LLM: one process per rank, as on a machine with GPUs.

What the library does with what it is told is the double's business; here it is told the right things, in the right
order, and what it does on its own is noticed.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import engines
import pytest
import tiny_checkpoints
from checkpoint import Checkpoint, resolve
from compilers import CompiledModel, kept_steps, tensorrt_compiler, tensorrt_rank, tensorrt_support
from compilers.step_processes import Step, StepFailedError
from engine_manifest import check_files, check_machine, read_manifest
from errors import BuildError, CompileError, UnsupportedError, UsageError
from gpus import find_gpus
from model_shape import model_shape
from plan import BuildRequest, EnginePlan, make_plan, read_config
from trtllm_environment import H100, TrtllmEnvironment, make

ROOT = Path(__file__).parent.parent.parent
DEMO, ENGINES = ROOT / "scripts/demo_checkpoint/demo-gpt2", ROOT / "build/engines.py"
L4 = ("NVIDIA L4", "8.9", 23034)
A100 = ("NVIDIA A100-SXM4-80GB", "8.0", 81920)
B200 = ("NVIDIA B200", "10.0", 183359)
T4 = ("Tesla T4", "7.5", 15360)

Machine = Callable[..., TrtllmEnvironment]


@dataclass(frozen=True, kw_only=True)
class Built:
    folder: Path
    kept: Path
    plan: EnginePlan
    compiled: CompiledModel

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def llm_arguments(self) -> dict[str, Any]:
        return json.loads((self.folder / "llm_args.json").read_text())


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Makes this process, and those that it starts, believe in a machine with TensorRT-LLM and such GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def become(*gpus: tuple[str, str, int], **options: Any) -> TrtllmEnvironment:
        environment = make(tmp_path / "machine", gpus=gpus or (H100,), **options)
        for name in ("PATH", "PYTHONPATH", "TENSORRT_LLM_DOUBLE"):
            monkeypatch.setenv(name, environment.variables[name])
        monkeypatch.syspath_prepend(environment.site)
        tensorrt_support._gpus.cache_clear()
        return environment

    yield become
    tensorrt_support._gpus.cache_clear()


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return resolve(str(DEMO))


def plan_for(checkpoint: Checkpoint, **request: Any) -> EnginePlan:
    gpu = tensorrt_compiler.target_gpus(request.pop("gpu", None))[0].product
    asked = BuildRequest(model=checkpoint.model, engine="tensorrt", gpu=gpu, **request)
    tensorrt_compiler.check_request(asked)
    return make_plan(asked, checkpoint, "tensorrt", tensorrt_compiler.versions())


def check(plan: EnginePlan, checkpoint: Checkpoint) -> None:
    tensorrt_compiler.check(plan, read_config(checkpoint))


def build(checkpoint: Checkpoint, parent: Path, **request: Any) -> Built:
    """As engines.py does. What an earlier build in `parent` has kept is taken."""
    plan = plan_for(checkpoint, **request)
    check(plan, checkpoint)
    number = len(list(parent.glob("engine-*")))
    folder, kept = parent / f"engine-{number}", parent / "kept"
    folder.mkdir(parents=True)
    compiled = tensorrt_compiler.compile(plan, checkpoint, folder, kept)
    return Built(folder=folder, kept=kept, plan=plan, compiled=compiled)


class Stop(Exception):
    """Instead of building."""


@pytest.fixture
def jobs_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """What the processes of the first steps would be told."""

    def jobs(checkpoint: Checkpoint, **request: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []

        def note(steps: list[Step], finished: Any) -> None:
            found.extend(step.job() for step in steps)
            raise Stop

        monkeypatch.setattr(tensorrt_compiler, "run", note)
        with pytest.raises(Stop):
            build(checkpoint, tmp_path / "jobs", **request)
        return found

    return jobs


def tiny(name: str, folder: Path, **config: Any) -> Checkpoint:
    return resolve(str(tiny_checkpoints.make(name, folder, **config)))


# --- the whole way


@pytest.mark.parametrize("num_gpus", [1, 2, 4])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_every_rank_is_built_on_as_many_gpus_as_there_are(
    machine: Machine,
    demo: Checkpoint,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    tp: int,
    pp: int,
    num_gpus: int,
):
    caplog.set_level(logging.INFO)
    machine(*[H100] * num_gpus)
    built = build(demo, tmp_path, tensor_parallel=tp, pipeline_parallel=pp)
    ranks = range(tp * pp)
    assert sorted(path.name for path in built.folder.glob("rank*")) == [f"rank{rank}.engine" for rank in ranks]
    mapping = built.config["pretrained_config"]["mapping"]
    assert (mapping["world_size"], mapping["tp_size"], mapping["pp_size"]) == (tp * pp, tp, pp)
    said = [re.fullmatch(r"rank (\d) of (\d): built in .* s, .*, GPU (\d)", line) for line in caplog.messages]
    places = {int(line[1]): int(line[3]) for line in said if line}
    assert places == {rank: rank % num_gpus for rank in ranks}


def test_the_engine_says_what_it_was_asked_for(machine: Machine, demo: Checkpoint, tmp_path: Path):
    machine(L4, L4)
    built = build(demo, tmp_path, max_batch_size=4, max_input_len=100, max_seq_len=200, dtype="bfloat16")
    limits = built.config["build_config"]
    assert (limits["max_batch_size"], limits["max_input_len"], limits["max_seq_len"]) == (4, 100, 200)
    # 4 sequences of 200 tokens: the library would cut more than that.
    assert (limits["max_beam_width"], limits["max_num_tokens"], limits["opt_batch_size"]) == (1, 800, 4)
    assert limits["plugin_config"]["use_paged_context_fmha"] is True
    assert limits["plugin_config"]["tokens_per_block"] == 32
    assert built.config["pretrained_config"]["dtype"] == "bfloat16"
    assert built.compiled.gpu == ("NVIDIA-L4", "8.9")
    assert built.compiled.vocab_size == 1280
    assert built.compiled.kv_bytes_per_token == 4 * 2 * 256 * 2  # layers, key and value, width, bytes
    assert built.compiled.eos_token_ids == (0,)
    assert dict(built.plan.compiler_versions)["tensorrt_llm"] == "1.2.1"
    assert dict(built.plan.compiler_versions)["tensorrt"] == "10.14.1.48"


def test_the_folder_holds_the_engine_and_the_tokenizer_and_nothing_else(
    machine: Machine, demo: Checkpoint, tmp_path: Path
):
    machine()
    built = build(demo, tmp_path, llm_arguments={"kv_cache_config": {"free_gpu_memory_fraction": 0.5}})
    assert sorted(path.name for path in built.folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "llm_args.json",
        "rank0.engine",
        "special_tokens.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert built.llm_arguments == {"kv_cache_config": {"free_gpu_memory_fraction": 0.5}}


def test_16_sequences_are_built_for_8(machine: Machine, demo: Checkpoint, jobs_of: Any):
    machine()
    assert jobs_of(demo)[0]["build_config"]["opt_batch_size"] == 8


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3"])
def test_other_families_are_built_too(machine: Machine, tmp_path: Path, name: str):
    machine()
    built = build(tiny(name, tmp_path / "checkpoint"), tmp_path, max_seq_len=16)
    assert (built.folder / "rank0.engine").exists()


# --- what the library is told


def test_a_rank_is_told_the_layout_and_its_number(machine: Machine, demo: Checkpoint, jobs_of: Any):
    machine()
    jobs = jobs_of(demo, tensor_parallel=2, pipeline_parallel=2)
    assert [job["rank"] for job in jobs] == [0, 1, 2, 3]
    assert all(job["mapping"] == {"world_size": 4, "tp_size": 2, "pp_size": 2} for job in jobs)


def test_gpt2_is_told_its_variant_and_to_keep_its_tables_whole(machine: Machine, demo: Checkpoint, jobs_of: Any):
    machine()
    assert jobs_of(demo)[0]["conversion"] == {
        "gpt_variant": "gpt2",
        "load_model_on_cpu": True,
        "use_parallel_embedding": False,
    }


@pytest.mark.parametrize(
    ("name", "keywords"),
    [("llama", {"load_model_on_cpu": True}), ("gemma", {"load_model_on_cpu": True}), ("phi3", {})],
)
def test_a_class_gets_no_keyword_that_it_does_not_read(
    machine: Machine, tmp_path: Path, jobs_of: Any, name: str, keywords: dict[str, Any]
):
    machine()
    assert jobs_of(tiny(name, tmp_path / "checkpoint"), max_seq_len=16)[0]["conversion"] == keywords


def test_full_weights_have_no_quant_config_at_all(machine: Machine, demo: Checkpoint, jobs_of: Any):
    machine()
    job = jobs_of(demo)[0]
    assert (job["quantization"], job["checkpoint"]) == ({}, None)


def test_the_dtype_is_never_left_open(machine: Machine, demo: Checkpoint, jobs_of: Any):
    machine()
    assert jobs_of(demo)[0]["dtype"] == "float16"  # the checkpoint's own is float32


def test_paths_do_not_say_which_model_it_is(machine: Machine, tmp_path: Path):
    machine()  # the double's LLaMA refuses a path with one of these words, as the library takes another model then
    folder = tmp_path / "llava-vila-exaone-prompts"
    built = build(tiny("llama", folder / "checkpoint"), folder, max_seq_len=16)
    assert (built.folder / "rank0.engine").exists()


def test_the_library_gets_no_code_that_nobody_trusted(machine: Machine, tmp_path: Path, monkeypatch: Any):
    machine()
    folder = tiny_checkpoints.make("gpt2", tmp_path / "checkpoint")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"auto_map": {"AutoConfig": "evil/repo--code.Config"}}))
    (folder / "code.py").write_text("raise SystemExit('ran')")
    checkpoint = resolve(str(folder))
    staged: dict[str, str] = {}

    def look(steps: list[Step], finished: Any) -> None:
        for path in (steps[0].folder / tensorrt_compiler.MODEL_PATH).resolve().iterdir():
            staged[path.name] = path.read_text(errors="replace") if path.suffix == ".json" else ""
        raise Stop

    monkeypatch.setattr(tensorrt_compiler, "run", look)
    with pytest.raises(Stop):
        build(checkpoint, tmp_path)
    assert "code.py" not in staged
    assert not [name for name, text in staged.items() if "evil" in text]
    assert json.loads(staged["config.json"])["architectures"] == ["GPT2LMHeadModel"]


def test_rank_0s_timings_are_known_to_the_ranks_after_it(machine: Machine, demo: Checkpoint, jobs_of: Any):
    machine()
    jobs = jobs_of(demo, tensor_parallel=2)
    assert "input_timing_cache" not in jobs[1]["build_config"]  # side by side
    for job in jobs:
        assert Path(job["build_config"]["output_timing_cache"]).is_absolute()


def test_ranks_that_are_built_later_use_the_timings(machine: Machine, demo: Checkpoint, tmp_path: Path, monkeypatch):
    machine()
    real, told = tensorrt_compiler.run, []

    def run(steps: list[Step], finished: Any) -> None:
        def noting(step: Step) -> Step:
            return replace(step, job=lambda: told.append(step.job()) or told[-1])

        real([noting(step) for step in steps], finished)

    monkeypatch.setattr(tensorrt_compiler, "run", run)
    built = build(demo, tmp_path, tensor_parallel=2)
    caches = [job["build_config"].get("input_timing_cache") for job in told]
    assert caches == [None, str(built.kept / "rank0/timing.cache")]
    assert not list(built.folder.glob("*.cache"))


def test_a_misspelled_limit_does_not_vanish(machine: Machine, demo: Checkpoint, tmp_path: Path, monkeypatch: Any):
    machine()
    real = tensorrt_compiler._limits
    monkeypatch.setattr(tensorrt_compiler, "_limits", lambda plan: real(plan) | {"max_batchsize": 4})
    with pytest.raises(CompileError, match=r"BuildConfig of this TensorRT-LLM has no field max_batchsize"):
        build(demo, tmp_path)


def test_a_build_without_an_engine_is_no_success(machine: Machine, demo: Checkpoint, tmp_path: Path, monkeypatch: Any):
    machine()
    real = tensorrt_compiler._limits
    monkeypatch.setattr(tensorrt_compiler, "_limits", lambda plan: real(plan) | {"dry_run": True})
    with pytest.raises(CompileError, match=r"rank 0 of 1 of '.*' cannot be built: RuntimeError: TensorRT built no"):
        build(demo, tmp_path)


# --- what the library changes on its own


def test_an_engine_that_could_not_take_its_prompts_is_refused(machine: Machine, demo: Checkpoint):
    machine()
    plan = plan_for(demo)
    limits = tensorrt_compiler._limits(plan) | {"max_num_tokens": 512}
    with pytest.raises(CompileError, match=r"prompts longer than 512 tokens could not be served; build with a shorter"):
        tensorrt_compiler._check_built(plan, "rank 0 of 1", {"limits": limits, "use_paged_context_fmha": False})


def test_limits_that_the_library_changed_are_no_success(machine: Machine, demo: Checkpoint):
    machine()
    plan = plan_for(demo)
    limits = tensorrt_compiler._limits(plan) | {"max_seq_len": 512}
    with pytest.raises(
        CompileError, match=r"built rank 1 of 2 of '.*' with max_seq_len 512 instead of 1024; build with"
    ):
        tensorrt_compiler._check_built(plan, "rank 1 of 2", {"limits": limits, "use_paged_context_fmha": True})


def test_what_the_loader_fails_on_is_given_in_another_way(machine: Machine, demo: Checkpoint, tmp_path: Path):
    machine()
    built = build(demo, tmp_path, llm_arguments={"kv_cache_config": {"sink_token_length": 4}})
    config = built.config
    config["pretrained_config"]["runtime_defaults"] = {"max_attention_window": [512, 1024], "sink_token_length": None}
    shape = model_shape(read_config(demo), "demo")
    tensorrt_compiler._write_llm_arguments(built.plan, shape, built.folder, config)
    assert built.config["pretrained_config"]["runtime_defaults"] is None
    assert built.llm_arguments == {"kv_cache_config": {"max_attention_window": [512, 1024], "sink_token_length": 4}}
    assert json.loads((built.kept / "rank0/config.json").read_text())["build_config"]  # not written through the link


def test_a_window_that_the_engine_does_not_keep_is_said(
    machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    machine()
    build(tiny("mistral", tmp_path / "checkpoint"), tmp_path)  # its window is 16
    assert "2 of 2 layers of '" in caplog.text and "or build with --max-seq-len 16" in caplog.text


# --- quantization


def texts(folder: Path, name: str = "texts") -> Path:
    """A data set as `datasets` reads one."""
    path = folder / name
    path.mkdir(exist_ok=True)
    column = "article" if "cnn_dailymail" in name else "text"
    (path / "train.jsonl").write_text("".join(json.dumps({column: f"text {n}"}) + "\n" for n in range(3)))
    return path


# Whether the builder leaves paged context attention on, with which prompts can be split.
PAGED, NOT_PAGED = True, False


@pytest.mark.parametrize(
    ("quantization", "kv_cache_dtype", "algorithms", "is_paged"),
    [
        ("int8", "auto", ("W8A16", None), PAGED),
        ("int4", "int8", ("W4A16", "INT8"), NOT_PAGED),
        ("fp8", "auto", ("FP8", None), PAGED),
        ("fp8", "fp8", ("FP8", "FP8"), PAGED),
        ("int4_awq", "fp8", ("W4A16_AWQ", "FP8"), NOT_PAGED),
        ("int8_sq", "auto", ("W8A8_SQ_PER_CHANNEL", None), PAGED),
        ("none", "fp8", (None, "FP8"), NOT_PAGED),
        ("none", "int8", (None, "INT8"), NOT_PAGED),
    ],
)
def test_a_format_takes_the_librarys_own_way_and_prompts_fit_into_a_step(
    machine: Machine,
    demo: Checkpoint,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    quantization: str,
    kv_cache_dtype: str,
    algorithms: tuple[str | None, str | None],
    is_paged: bool,
):
    machine(L4)
    monkeypatch.setattr(tensorrt_compiler, "MAX_NUM_TOKENS", 256)
    is_calibrated = quantization in ("fp8", "int4_awq", "int8_sq") or kv_cache_dtype != "auto"
    data = {"calibration_data": texts(tmp_path)} if is_calibrated else {}
    built = build(demo, tmp_path, quantization=quantization, kv_cache_dtype=kv_cache_dtype, **data)
    found, limits = built.config["pretrained_config"]["quantization"], built.config["build_config"]
    assert (found["quant_algo"], found["kv_cache_quant_algo"]) == algorithms
    assert (built.kept / "quantized").exists() is is_calibrated
    assert built.compiled.kv_bytes_per_token == 4 * 2 * 256 * (2 if kv_cache_dtype == "auto" else 1)
    assert limits["plugin_config"]["use_paged_context_fmha"] is is_paged
    assert limits["max_num_tokens"] == (256 if is_paged else 1023)
    assert ("TensorRT-LLM switched paged context attention off" in caplog.text) is not is_paged


def test_quantizing_is_done_once_for_all_ranks(
    machine: Machine, demo: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    machine(L4)
    built = build(
        demo, tmp_path, quantization="fp8", tensor_parallel=2, pipeline_parallel=2, calibration_data=texts(tmp_path)
    )
    assert len([line for line in caplog.messages if line.startswith("quantizing: done in ")]) == 1
    assert [path.name for path in sorted((built.kept / "quantized").glob("rank*"))] == [
        f"rank{rank}.safetensors" for rank in range(4)
    ]


def test_the_vocabulary_is_that_of_the_engine(machine: Machine, tmp_path: Path):
    machine(L4)  # AWQ pads it to a multiple of 64
    checkpoint = tiny("gpt2", tmp_path / "checkpoint", n_embd=128, vocab_size=650)
    data = texts(tmp_path)
    assert build(checkpoint, tmp_path, quantization="int4_awq", calibration_data=data).compiled.vocab_size == 704


@pytest.mark.parametrize(
    ("name", "dataset"),
    [("my-pileval-texts", "calibration"), ("texts", "calibration"), ("old cnn_dailymail", "cnn_dailymail")],
)
def test_a_folder_with_texts_is_taken_for_what_it_is(
    machine: Machine, demo: Checkpoint, tmp_path: Path, jobs_of: Any, name: str, dataset: str
):
    machine(L4)
    jobs = jobs_of(demo, quantization="fp8", calibration_data=texts(tmp_path, name))
    assert jobs[0]["calib_dataset"] == dataset


def test_without_texts_the_default_is_downloaded(
    machine: Machine, demo: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    machine(L4)
    with pytest.raises(
        CompileError, match=r"quantizing of '.*' cannot be built: ConnectionError: Couldn't reach 'cnn_d"
    ):
        build(demo, tmp_path, quantization="fp8")
    assert "calibrated with cnn_dailymail, from the hub unless it is in its cache" in caplog.text


def test_quantizing_that_leaves_nothing_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Silent:
        @classmethod
        def quantize(cls, *args: Any, **kwargs: Any) -> None:
            """As Gemma's does for a KV cache alone."""

    library = ModuleType("tensorrt_llm")
    library.Mapping = lambda **sizes: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt_llm", library)
    monkeypatch.setattr(tensorrt_rank, "_model_class", lambda job, method: Silent)
    monkeypatch.setattr(tensorrt_rank, "_quant_config", lambda names: None)
    job = {
        **{"architecture": "GemmaForCausalLM", "output": str(tmp_path), "model": "", "dtype": "float16"},
        **{"mapping": {"world_size": 2}, "quantization": {}, "calib_dataset": None},
    }
    with pytest.raises(RuntimeError, match=r"ended without config.json, rank0.safetensors, rank1.safetensors"):
        tensorrt_rank.quantize(job)


# --- what is refused, and when


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"dtype": "float32"}, "--dtype float32 is not computed by .*; use float16, bfloat16 or auto"),
        (
            {"quantization": "fp8", "kv_cache_dtype": "int8"},
            "--kv-cache-dtype int8 does not go with --quantization fp8 in TensorRT-LLM; use auto or fp8",
        ),
        (
            {"quantization": "int8", "kv_cache_dtype": "fp8"},
            "--kv-cache-dtype fp8 does not go with .*; use auto or int8",
        ),
        ({"llm_arguments": {"stream_interval": 2}}, "--llm-args: stream_interval is for --engine pytorch, and this"),
    ],
)
def test_options_that_no_engine_can_have(machine: Machine, request_: dict[str, Any], sentence: str):
    machine()
    with pytest.raises(UsageError, match=sentence):
        tensorrt_compiler.check_request(BuildRequest(model="gpt2", **request_))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"tensorrt_llm": None, "tensorrt": None},
            "--engine tensorrt needs TensorRT-LLM, which is not installed here; build inside NVIDIA's .*, or build for "
            "this machine's CPU with --engine openvino",
        ),
        (
            {"tensorrt_llm": "1.4.0", "engine_backend": False},
            "TensorRT-LLM 1.4.0 builds no TensorRT engines any more .*; build with --engine pytorch, which",
        ),
        ({"tensorrt": None}, "TensorRT-LLM 1.2.1 is installed here without TensorRT, .*; build with --engine pytorch"),
    ],
)
def test_what_is_not_installed_is_said(machine: Machine, options: dict[str, Any], sentence: str):
    machine(**options)
    with pytest.raises(UnsupportedError, match=sentence):
        tensorrt_compiler.check_request(BuildRequest(model="gpt2"))


def test_no_gpu_is_said(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    machine()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tensorrt_support._gpus.cache_clear()
    with pytest.raises(UnsupportedError, match=r"this machine shows no NVIDIA GPU; build on one .* --engine openvino"):
        tensorrt_compiler.check_request(BuildRequest(model="gpt2"))


def test_an_engine_is_for_the_gpus_of_this_machine(machine: Machine):
    machine(L4)
    with pytest.raises(
        UnsupportedError, match=r"--gpu NVIDIA-A10G is not in this machine, which has NVIDIA-L4, .* use"
    ):
        tensorrt_compiler.check_request(BuildRequest(model="gpt2", gpu="NVIDIA-A10G"))


def test_on_a_mixed_machine_the_product_is_chosen(machine: Machine, demo: Checkpoint, tmp_path: Path, caplog: Any):
    caplog.set_level(logging.INFO)
    machine(H100, L4, H100, L4)
    with pytest.raises(UsageError, match=r"has NVIDIA-H100-80GB-HBM3 and NVIDIA-L4, .*; choose it with --gpu"):
        tensorrt_compiler.check_request(BuildRequest(model="gpt2"))
    built = build(demo, tmp_path, gpu="NVIDIA-L4", tensor_parallel=2)
    assert built.compiled.gpu == ("NVIDIA-L4", "8.9")
    assert [index for index in range(4) if re.search(rf"built in .*, GPU {index}\b", caplog.text)] == [1, 3]


@pytest.mark.parametrize(
    ("gpu", "request_", "sentence"),
    [
        (T4, {}, "Tesla-T4 has compute capability 7.5, and TensorRT-LLM 1.2.1 needs 8.0; use a newer GPU"),
        (A100, {"quantization": "fp8"}, "has compute capability 8.0, and FP8 needs 8.9; use int8 or int4_awq weights"),
        (
            A100,
            {"kv_cache_dtype": "fp8"},
            "has compute capability 8.0, and FP8 needs 8.9; use int8 or int4_awq weights",
        ),
        (B200, {"quantization": "int8"}, "has compute capability 10.0, where TensorRT-LLM 1.2.1 builds nothing with"),
        (
            B200,
            {"quantization": "int8_sq"},
            "has compute capability 10.0, where TensorRT-LLM 1.2.1 builds nothing with",
        ),
        (B200, {"kv_cache_dtype": "int8"}, "has compute capability 10.0, where TensorRT-LLM 1.2.1 builds nothing with"),
        (H100, {"tensor_parallel": 3}, "--tp 3 does not divide the 4 attention heads of '.*'; use 1, 2 or 4"),
        (H100, {"pipeline_parallel": 5}, "--pp 5 is more than the 4 layers of '.*'; use at most 4"),
        (H100, {"quantization": "int4_awq", "tensor_parallel": 4}, "--tp 4 gives each rank 64 of the .*; use 1 or 2"),
        (
            ("NVIDIA L4", "8.9", 3),
            {},
            "a rank of '.*' at --tp 1 --pp 1 has 0.0 GB of weights, and NVIDIA-L4 has 0.0 GB",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_long(
    machine: Machine, demo: Checkpoint, gpu: tuple[str, str, int], request_: dict[str, Any], sentence: str
):
    machine(gpu)
    with pytest.raises((UsageError, UnsupportedError), match=sentence):
        check(plan_for(demo, **request_), demo)


def test_a_rank_that_is_too_large_is_told_the_layout_that_fits(machine: Machine, tmp_path: Path):
    machine(L4)
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 5120},
        **{"intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
        **{"num_key_value_heads": 40, "max_position_embeddings": 4096},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))  # Llama 2 13B
    checkpoint = Checkpoint(model="big", revision=None, path=tmp_path, digest="ab" * 32)
    sentence = (
        "a rank of 'big' at --tp 1 --pp 1 has 26.0 GB of weights, and NVIDIA-L4 has 24.2 GB of memory; use --tp 2 "
        "--pp 1 or --quantization"
    )
    with pytest.raises(UnsupportedError, match=re.escape(sentence)):
        check(plan_for(checkpoint), checkpoint)


def _prequantized(config: dict[str, Any]) -> None:
    config["quantization_config"] = {"quant_method": "fp8"}


@pytest.mark.parametrize(
    ("name", "change", "request_", "sentence"),
    [
        (
            "opt",
            None,
            {},
            "is a OPTForCausalLM, which TensorRT-LLM 1.2.1 does not convert from a Hugging Face .*pytorch",
        ),
        (
            "llama",
            _prequantized,
            {},
            r"is quantized already \(fp8\), and TensorRT engines .*; use --engine pytorch, or",
        ),
        (
            "gemma",
            None,
            {"kv_cache_dtype": "fp8"},
            "makes no fp8 KV cache for a GemmaForCausalLM with .* none; use --kv-cache-dtype auto, or --quantization f",
        ),
        (
            "phi3",
            None,
            {"kv_cache_dtype": "int8"},
            "makes no int8 KV cache for a Phi3ForCausalLM with .*; use .*, or --quantization int4_awq or int8_sq",
        ),
    ],
)
def test_models_that_have_no_way(
    machine: Machine, tmp_path: Path, name: str, change: Any, request_: dict[str, Any], sentence: str
):
    machine()
    folder = tiny_checkpoints.make(name, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    if change is not None:
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
    checkpoint = resolve(str(folder))
    with pytest.raises(UnsupportedError, match=sentence):
        check(plan_for(checkpoint, **request_), checkpoint)


def test_an_unknown_architecture_is_told_which_are_known(machine: Machine, tmp_path: Path):
    machine()
    (tmp_path / "config.json").write_text('{"architectures": ["KimiForCausalLM"], "vocab_size": 8}')
    checkpoint = Checkpoint(model="kimi", revision=None, path=tmp_path, digest="ab" * 32)
    with pytest.raises(UnsupportedError, match=r"is a KimiForCausalLM, .*; use one of GPT2LMHeadModel, .*pytorch"):
        check(plan_for(checkpoint), checkpoint)


@pytest.mark.parametrize(("version", "age"), [("1.1.0", "older"), ("1.3.0rc5", "newer"), ("1.2.0", None)])
def test_another_version_is_a_line_in_the_log(
    machine: Machine, demo: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture, version: str, age: str | None
):
    machine(tensorrt_llm=version)
    build(demo, tmp_path)
    line = f"TensorRT-LLM {version} is {age} than 1.2.1, which the build is written for; going on with it"
    assert (line in caplog.messages) is (age is not None)


# --- when it fails


def test_what_was_built_is_not_built_again(
    machine: Machine, demo: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    environment = machine()
    environment.inject(build_dies_at_rank=2)
    with pytest.raises(CompileError, match=r"rank 2 of 4 of '.*' cannot be built: its process ended with 139"):
        build(demo, tmp_path, tensor_parallel=2, pipeline_parallel=2)
    assert built_ranks(caplog) == [0, 1]
    assert not list(tmp_path.glob("engine-0/rank*"))
    caplog.clear()
    environment.inject()
    built = build(demo, tmp_path, tensor_parallel=2, pipeline_parallel=2)
    assert built_ranks(caplog) == [2, 3]
    assert len(list(built.folder.glob("rank*.engine"))) == 4
    assert "rank 0 of 4: built by an earlier build" in caplog.messages


def test_what_was_kept_and_is_damaged_is_built_again(
    machine: Machine, demo: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    machine()
    built = build(demo, tmp_path, tensor_parallel=2)
    engine = built.kept / "rank1/rank1.engine"
    content = bytearray(engine.read_bytes())
    engine.unlink()  # its other name is the finished engine's
    content[100] ^= 1
    engine.write_bytes(content)
    caplog.clear()
    build(demo, tmp_path, tensor_parallel=2)
    assert built_ranks(caplog) == [1]


def test_a_quantized_checkpoint_is_kept_too(
    machine: Machine, demo: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    environment, data = machine(L4), texts(tmp_path)
    environment.inject(build_fails_at_rank=0)
    with pytest.raises(CompileError):
        build(demo, tmp_path, quantization="fp8", calibration_data=data)
    environment.inject()
    build(demo, tmp_path, quantization="fp8", calibration_data=data)
    assert "quantizing: done by an earlier build" in caplog.messages


def built_ranks(caplog: pytest.LogCaptureFixture) -> list[int]:
    lines = [re.match(r"rank (\d+) of \d+: built in ", line) for line in caplog.messages]
    return sorted(int(line[1]) for line in lines if line)


def test_a_librarys_error_is_one_sentence_with_its_log(machine: Machine, demo: Checkpoint, tmp_path: Path):
    environment = machine()
    environment.inject(build_fails_at_rank=0, build_error="first line\nsecond line")
    with pytest.raises(CompileError) as raised:
        build(demo, tmp_path)
    log_file = tmp_path / "kept/rank0.log"
    assert str(raised.value) == (
        f"rank 0 of 1 of '{DEMO}' cannot be built: RuntimeError: second line; the whole log is {log_file}, and "
        "--engine pytorch needs no TensorRT"
    )
    assert "TensorRT LLM version: 1.2.1" in log_file.read_text()


def test_too_little_gpu_memory_is_said(machine: Machine, demo: Checkpoint, tmp_path: Path):
    environment = machine()
    plan = plan_for(demo)
    environment.change(gpus=[(H100[0], H100[1], 1)])
    (tmp_path / "engine").mkdir()
    with pytest.raises(
        CompileError, match=r"rank 0 of 1 .* ran out of memory on GPU 0, NVIDIA-H100-80GB-HBM3; end what"
    ):
        tensorrt_compiler.compile(plan, demo, tmp_path / "engine", tmp_path / "kept")


def failed_step(exit_code: int, error: dict[str, Any] | None, folder: Path, lines: list[str]) -> StepFailedError:
    folder.mkdir()
    step = Step(name="rank 1 of 2", folder=folder, gpus=tuple(find_gpus()), job=dict)
    step.log_file.write_text("\n".join(lines))
    return StepFailedError(step, exit_code, error, lines)


def explained(demo: Checkpoint, tmp_path: Path, failed: StepFailedError) -> BaseException:
    plan = plan_for(demo)
    kept = tmp_path / "kept"
    kept.mkdir()
    with pytest.raises((BuildError, OSError)) as raised:
        with tensorrt_compiler._explained(plan, model_shape(read_config(demo), "demo"), find_gpus(), kept):
            raise failed
    return raised.value


def test_too_little_memory_of_the_machine_is_guessed(machine: Machine, demo: Checkpoint, tmp_path: Path):
    machine()
    error = explained(demo, tmp_path, failed_step(-9, None, tmp_path / "rank1", []))
    assert re.search(
        "was killed by signal 9 on GPU 0, as happens when the machine's memory runs out; .* kept", str(error)
    )


def test_a_crash_is_told_with_the_logs_last_lines(machine: Machine, demo: Checkpoint, tmp_path: Path):
    machine()
    error = explained(demo, tmp_path, failed_step(-11, None, tmp_path / "rank1", ["a", "b", "c", "[TRT] [E] d"]))
    assert "its process was ended by signal 11 (its last lines: b | c | [TRT] [E] d); the whole log is" in str(error)


def test_a_full_disk_is_the_stores_affair(machine: Machine, demo: Checkpoint, tmp_path: Path):
    machine()
    said = {"type": "OSError", "message": "No space left on device", "errno": errno.ENOSPC}
    error = explained(demo, tmp_path, failed_step(1, said, tmp_path / "rank1", []))
    assert isinstance(error, OSError) and error.errno == errno.ENOSPC


def test_an_engine_of_another_layout_is_no_success(machine: Machine, demo: Checkpoint, tmp_path: Path):
    machine()
    built = build(demo, tmp_path)
    plan = replace(built.plan, tensor_parallel=2)
    kept_steps_folder = tmp_path / "kept/rank1"
    kept_steps_folder.mkdir()
    (tmp_path / "other").mkdir()
    with pytest.raises(CompileError, match=r"with layout .* and without rank1.engine, and .* was asked for"):
        tensorrt_compiler._assemble(plan, tmp_path / "other", tmp_path / "kept")
    assert kept_steps.files_of(kept_steps_folder) == []


# --- the command


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        return json.loads(self.out)


@pytest.fixture
def cli(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Ended]]:
    """engines.main in this process, with a store of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def run(*options: str) -> Ended:
        capsys.readouterr()
        code = engines.main(["--model", str(DEMO), "--json", *options])
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    yield run
    root.handlers[:], root.level = handlers, level


def test_the_manifest_says_what_the_engine_runs_on(machine: Machine, cli: Callable[..., Ended]):
    machine(L4, L4)
    report = cli("--engine", "tensorrt", "--tp", "2").report
    manifest = read_manifest(Path(report["engine"]))
    assert manifest.gpu == {"product": "NVIDIA-L4", "compute_capability": "8.9"}
    assert (manifest.engine, manifest.tensor_parallel, manifest.pipeline_parallel) == ("tensorrt", 2, 1)
    assert (manifest.limits["max_beam_width"], report["plan"]["gpu"]) == (1, "NVIDIA-L4")
    here = {"tensorrt_llm": "1.2.1", "tensorrt": "10.14.1.48"}
    check_machine(manifest, gpu=("NVIDIA-L4", "8.9"), versions=here, world_size=2)
    assert list(Path("cache/triton-trtllm/.kept").iterdir()) == []
    assert cli("--engine", "tensorrt", "--tp", "2").report["was_stored"]


def test_a_machine_with_a_gpu_gets_a_tensorrt_engine(machine: Machine, cli: Callable[..., Ended]):
    machine(L4)
    assert cli().report["plan"]["engine"] == "tensorrt"


def test_another_layout_product_or_argument_is_another_engine(machine: Machine, cli: Callable[..., Ended]):
    machine(L4, H100)
    options = [
        ["--gpu", "NVIDIA-L4"],
        ["--gpu", "NVIDIA-H100-80GB-HBM3"],
        ["--gpu", "NVIDIA-L4", "--tp", "2"],
        ["--gpu", "NVIDIA-L4", "--llm-args", '{"kv_cache_config": {"max_tokens": 999}}'],
    ]
    assert len({cli("--engine", "tensorrt", *each).report["key"] for each in options}) == 4


def test_offline_texts_must_be_given(machine: Machine, cli: Callable[..., Ended]):
    machine(L4)
    ended = cli("--engine", "tensorrt", "--quantization", "fp8", "--offline")
    assert ended.code == 2
    assert "quantizing downloads cnn_dailymail from the hub, and --offline was given; name a folder" in ended.err


def test_a_killed_build_goes_on_where_it_was(machine: Machine, cli: Callable[..., Ended], tmp_path: Path):
    environment = machine()
    environment.inject(build_seconds=1.0)
    command = [environment.python, ENGINES, "--model", DEMO, "--engine", "tensorrt", "--tp", "2", "--pp", "2"]
    builder = subprocess.Popen(
        command,
        env={**environment.variables, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert builder.stderr is not None
    for line in builder.stderr:
        if line.startswith("rank 1 of 4: built"):
            builder.kill()
    assert builder.wait() == -signal.SIGKILL
    environment.inject()
    ended = cli("--engine", "tensorrt", "--tp", "2", "--pp", "2")
    assert (ended.code, ended.report["was_stored"]) == (0, False)
    assert re.findall(r"rank (\d) of 4: built by an earlier build", ended.err) == ["0", "1"]
    assert re.findall(r"rank (\d) of 4: built in", ended.err) == ["2", "3"]
    check_files(Path(ended.report["engine"]), read_manifest(Path(ended.report["engine"])))
