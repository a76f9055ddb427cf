"""What TensorRT-LLM is told about an engine, and what is refused before it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trtllm_installation
import trtllm_llm
from engine_manifest import EngineManifest, ManifestError, list_files
from generation import EngineError
from gpus import Gpu
from library_environment import library_environment
from manifests import TENSORRT
from trtllm_environment import make
from trtllm_llm import LlmPlan, check_installation, import_library, plan_llm

RUNTIME = Path(trtllm_llm.__file__).parent
GPUS = [Gpu(index=index, product="NVIDIA-L4", compute_capability="8.9", memory_mib=23034) for index in (3, 5, 6, 7)]
LIMITS = {"max_batch_size": 8, "max_input_len": 1000, "max_seq_len": 1024, "max_beam_width": 1}
MANIFEST = replace(TENSORRT, tensor_parallel=2, limits=LIMITS)
ENGINE_CONFIG = {
    "version": "1.2.1",
    "pretrained_config": {"mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1}},
    "build_config": {**LIMITS, "max_num_tokens": 4096, "plugin_config": {"use_paged_context_fmha": True}},
}
MakeEngine = Callable[..., tuple[Path, EngineManifest]]


@pytest.fixture
def make_engine(tmp_path: Path) -> MakeEngine:
    """An engine folder as the build leaves it; `change` changes TensorRT-LLM's config.json, `manifest` ours."""

    def make_one(
        change: Callable[[dict], Any] = lambda config: None, users: dict | None = None, **manifest: Any
    ) -> tuple[Path, EngineManifest]:
        config = json.loads(json.dumps(ENGINE_CONFIG))
        change(config)
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "llm_args.json").write_text(json.dumps(users or {}))
        for rank in range(2):
            (tmp_path / f"rank{rank}.engine").write_bytes(b"plan")
        return tmp_path, replace(MANIFEST, files=list_files(tmp_path), **manifest)

    return make_one


@pytest.fixture
def library_version(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.setattr(trtllm_llm, "pytorch_architectures", lambda: frozenset({"GPT2LMHeadModel"}))

    def set_version(version: str) -> None:
        monkeypatch.setattr(trtllm_llm, "versions", lambda: {"tensorrt_llm": version})

    set_version("1.2.1")
    return set_version


# ---- the engine's own record -------------------------------------------------------------------------------------


def test_every_limit_is_passed_as_the_engine_was_built(make_engine: MakeEngine):
    """TensorRT-LLM resolves its defaults before it reads config.json: 8192 tokens and one beam, whatever was built."""
    folder, manifest = make_engine()
    arguments = plan_llm(folder, manifest, GPUS).arguments
    expected = {**LIMITS, "max_num_tokens": 4096, "tensor_parallel_size": 2, "pipeline_parallel_size": 1}
    assert expected.items() <= arguments.items()
    assert arguments["model"] == str(folder)
    assert arguments["skip_tokenizer_init"] is True
    assert arguments["gpus_per_node"] == 2


@pytest.mark.parametrize("has_paged_context", [True, False])
def test_kv_reuse_and_chunked_prefill_need_paged_context_attention(make_engine: MakeEngine, has_paged_context: bool):
    def change(config: dict) -> None:
        config["build_config"]["plugin_config"]["use_paged_context_fmha"] = has_paged_context

    arguments = plan_llm(*make_engine(change), GPUS).arguments
    assert arguments["enable_chunked_prefill"] is has_paged_context
    assert arguments["kv_cache_config"] == {"enable_block_reuse": has_paged_context}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["pretrained_config"]["mapping"].update(tp_size=1, pp_size=2), r"layout \(TP, PP\) \(1, 2\)"),
        (lambda c: c.update(version="1.1.0"), "TensorRT-LLM version 1.1.0, and engine.json says 1.2.1"),
        (lambda c: c["build_config"].update(max_seq_len=512), "max_seq_len 512, and engine.json says 1024"),
        (lambda c: c["build_config"].update(max_batch_size=4), "max_batch_size 4, and engine.json says 8"),
        (lambda c: c["build_config"].update(max_beam_width=4), "max_beam_width 4, and engine.json says 1"),
        (lambda c: c.pop("build_config"), r"not that of a TensorRT-LLM engine \('build_config' is missing\)"),
        (lambda c: c["build_config"].pop("max_num_tokens"), "'max_num_tokens' is missing"),
        (lambda c: c.update(pretrained_config=None), "not that of a TensorRT-LLM engine"),
    ],
)
def test_a_config_that_is_not_the_manifests_is_refused(make_engine: MakeEngine, change: Callable, says: str):
    folder, manifest = make_engine(change)
    with pytest.raises(ManifestError, match=says) as error:
        plan_llm(folder, manifest, GPUS)
    assert str(folder) in str(error.value) and "build it again with --force" in str(error.value)


def test_an_engine_with_too_few_ranks_is_refused(make_engine: MakeEngine):
    folder, manifest = make_engine()
    files = {name: record for name, record in manifest.files.items() if name != "rank1.engine"}
    with pytest.raises(ManifestError, match=r"ranks 1, and engine.json says 2"):
        plan_llm(folder, replace(manifest, files=files), GPUS)


@pytest.mark.parametrize("name", ["config.json", "llm_args.json"])
@pytest.mark.parametrize(
    ("content", "says"), [(None, "is missing"), (b"{", "is not JSON"), (b"[]", "is not a JSON obj")]
)
def test_a_damaged_file_is_named(make_engine: MakeEngine, name: str, content: bytes | None, says: str):
    folder, manifest = make_engine()
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ManifestError, match=rf"{name} {says}"):
        plan_llm(folder, manifest, GPUS)


# ---- arguments ---------------------------------------------------------------------------------------------------


def test_what_the_user_gave_comes_on_top(make_engine: MakeEngine):
    users = {"kv_cache_config": {"free_gpu_memory_fraction": 0.5}, "max_num_tokens": 2048}
    arguments = plan_llm(*make_engine(users=users), GPUS).arguments
    assert arguments["kv_cache_config"] == {"enable_block_reuse": True, "free_gpu_memory_fraction": 0.5}
    assert arguments["max_num_tokens"] == 2048


def test_a_pytorch_engine_takes_its_limits_from_the_manifest(make_engine: MakeEngine, library_version: Callable):
    users = {"max_num_tokens": 8192, "enable_chunked_prefill": True}
    arguments = plan_llm(*make_engine(users=users, engine="pytorch", gpu=None), GPUS).arguments
    assert {**LIMITS, **users, "dtype": MANIFEST.dtype, "enable_iter_perf_stats": True}.items() <= arguments.items()


def test_one_gpu_per_rank(make_engine: MakeEngine):
    assert [gpu.index for gpu in plan_llm(*make_engine(), GPUS).gpus] == [3, 5]


@pytest.mark.parametrize(
    ("version", "users", "sampler", "more"),
    [
        ("1.2.1", {}, "TRTLLMSampler", {"bad_words", "penalties", "seed"}),
        ("1.2.1", {"sampler_type": "TorchSampler"}, "TorchSampler", set()),
        ("1.2.1", {"sampler_type": "auto"}, "auto", set()),
        ("1.3.0", {}, "auto", {"penalties", "seed"}),
        ("1.3.0", {"sampler_type": "TRTLLMSampler"}, "TRTLLMSampler", {"bad_words", "penalties", "seed"}),
        ("2.0", {}, "auto", {"penalties", "seed"}),
    ],
)
def test_what_a_sampler_would_ignore_is_no_capability(
    make_engine: MakeEngine, library_version: Callable, version: str, users: dict, sampler: str, more: set
):
    library_version(version)
    plan = plan_llm(*make_engine(users=users, engine="pytorch", gpu=None), GPUS)
    assert plan.arguments["sampler_type"] == sampler
    assert plan.capabilities == {"log_probs", "min_tokens", "no_end_id"} | more


def test_an_architecture_that_the_library_does_not_have_is_refused(
    make_engine: MakeEngine, library_version: Callable, monkeypatch: pytest.MonkeyPatch
):
    folder, manifest = make_engine(engine="pytorch", gpu=None)
    monkeypatch.setattr(trtllm_llm, "pytorch_architectures", lambda: frozenset({"LlamaForCausalLM"}))
    with pytest.raises(
        ManifestError, match=r"a GPT2LMHeadModel, which the PyTorch backend of TensorRT-LLM 1\.2\.1 here"
    ):
        plan_llm(folder, manifest, GPUS)
    monkeypatch.setattr(trtllm_llm, "pytorch_architectures", lambda: None)  # nobody knows: the library decides
    plan_llm(folder, manifest, GPUS)


def test_log_probs_of_tensorrt_engines_are_refused(make_engine: MakeEngine):
    """They need gather_generation_logits, and aborting a stream that has them ends the process (see decisions)."""
    plan = plan_llm(*make_engine(), GPUS)
    assert "log_probs" not in plan.capabilities
    assert "gather_generation_logits" not in plan.arguments


# ---- the installation --------------------------------------------------------------------------------------------


def test_a_machine_without_tensorrt_llm_is_told_where_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trtllm_llm, "versions", dict)
    for kind in ("tensorrt", "pytorch"):
        with pytest.raises(ManifestError, match=f"of the kind {kind} and TensorRT-LLM is not installed here; serve it"):
            check_installation(replace(MANIFEST, engine=kind))


def test_a_release_without_the_engine_backend_is_told_the_other_kind(
    monkeypatch: pytest.MonkeyPatch, library_version: Callable
):
    library_version("1.4.0")
    monkeypatch.setattr(trtllm_llm, "has_engine_backend", lambda: False)
    with pytest.raises(
        ManifestError, match=r"TensorRT-LLM 1\.4\.0 here runs none any more; rebuild with --engine pyto"
    ):
        check_installation(MANIFEST)
    check_installation(replace(MANIFEST, engine="pytorch"))


@pytest.mark.parametrize("engine_backend", [True, False])
def test_the_engine_backend_is_found_without_importing_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine_backend: bool
):
    environment = make(tmp_path / "environment", engine_backend=engine_backend)
    code = (
        "import sys, trtllm_installation as t; print(t.has_engine_backend(), t.versions());"
        "assert 'tensorrt_llm' not in sys.modules and 'tensorrt' not in sys.modules"
    )
    variables = environment.variables | {"PYTHONPATH": f"{environment.site}:{RUNTIME}"}
    done = subprocess.run([environment.python, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{engine_backend} {{'tensorrt_llm': '1.2.1', 'tensorrt': '10.14.1.48'}}"


def test_a_tensorrt_without_a_record_is_asked_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt/__init__.py").write_text("__version__ = '10.99.1'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert trtllm_installation.versions() == {"tensorrt": "10.99.1"}


def test_a_tensorrt_that_cannot_be_imported_has_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt/__init__.py").write_text("raise ImportError('libnvinfer.so.10')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert trtllm_installation.versions() == {}


# ---- the process -------------------------------------------------------------------------------------------------

PLAN = LlmPlan(engine="pytorch", gpus=GPUS[:2], arguments={}, capabilities=frozenset())


def test_the_library_is_imported_when_its_process_is_set_up(tmp_path: Path):
    """A server that mpirun started hands its rank on; devices are those of the engine, by nvidia-smi's numbers."""
    (tmp_path / "tensorrt_llm/llmapi").mkdir(parents=True)
    (tmp_path / "tensorrt_llm/llmapi/__init__.py").write_text("class RequestError(RuntimeError): pass\n")
    (tmp_path / "tensorrt_llm/__init__.py").write_text(
        "import json, os\nfrom . import llmapi\nLLM = SamplingParams = None\nprint(json.dumps(dict(os.environ)))\n"
    )
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "PMIX_NAMESPACE": "x", "PMI_FD": "3", "OMPI_MCA_orte_x": "1", "ORTE_y": "1"}
    configuration = {"OMPI_MCA_btl": "tcp", "PMIX_MCA_gds": "hash", "CUDA_VISIBLE_DEVICES": "0"}
    code = (
        "from gpus import Gpu; from trtllm_llm import *\n"
        "gpus = [Gpu(index=n, product='x', compute_capability='9.0', memory_mib=1) for n in (3, 5)]\n"
        "import_library(LlmPlan(engine='pytorch', gpus=gpus, arguments={}, capabilities=frozenset()))\n"
    )
    variables = {**os.environ, **mpi, **configuration, "PYTHONPATH": f"{tmp_path}:{RUNTIME}"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert not mpi.keys() & seen.keys()
    assert (seen["OMPI_MCA_btl"], seen["PMIX_MCA_gds"]) == ("tcp", "hash")
    assert (seen["CUDA_VISIBLE_DEVICES"], seen["TRTLLM_VISIBLE_DEVICES"]) == ("3,5", "3,5")
    assert seen["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_a_process_that_has_the_library_is_not_used_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorrt_llm", object())
    with pytest.raises(EngineError, match=r"has run TensorRT-LLM before, which can be started once per process"):
        import_library(PLAN)


def test_a_library_that_cannot_be_imported_is_told_in_a_sentence(tmp_path: Path):
    (tmp_path / "tensorrt_llm.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')\n")
    code = (
        "from trtllm_llm import *\n"
        "try: import_library(LlmPlan(engine='pytorch', gpus=[], arguments={}, capabilities=frozenset()))\n"
        "except EngineError as error: print(error)\n"
    )
    variables = {**os.environ, "PYTHONPATH": f"{tmp_path}:{RUNTIME}"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("TensorRT-LLM cannot be imported: OSError: libcuda.so.1: cannot open")


def test_a_home_that_can_be_written_stays(tmp_path: Path):
    environment = library_environment({"HOME": str(tmp_path), "HF_HOME": "/models"})
    assert (environment["HOME"], environment["HF_HOME"]) == (str(tmp_path), "/models")


@pytest.mark.parametrize("home", [None, "/does/not/exist"])
def test_without_a_home_the_librarys_caches_get_a_folder(home: str | None):
    """flashinfer writes into it while it is imported, and an OSError of its ends the import of tensorrt_llm."""
    environment = library_environment({"HF_HOME": "/models"} | ({"HOME": home} if home else {}))
    made = Path(environment["HOME"])
    assert made.is_dir() and os.access(made, os.W_OK)
    assert environment["FLASHINFER_WORKSPACE_BASE"] == environment["TRITON_CACHE_DIR"] == str(made)
    assert environment["HF_HOME"] == "/models"
    made.rmdir()
