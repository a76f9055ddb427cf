"""Every config.pbtxt is what Triton reads, and the models fit each other."""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Collection, Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chunk_header import ChunkHeader
from chunks import CONSTANT_ARRAYS, Chunk, SequenceChunk, chunk_arrays
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

MODEL_REPO = Path(__file__).resolve().parents[2] / "model_repo"
MODELS = sorted(path.parent.name for path in MODEL_REPO.glob("*/config.pbtxt"))
PYTHON_MODELS = ["infer", "postprocessing", "preprocessing", "tensorrt_llm"]

# Inputs that a model takes and leaves alone, with the reason.
UNREAD_INPUTS = {
    "tensorrt_llm": {
        "return_perf_metrics",  # \
        "return_num_input_tokens",  # these outputs are always there
        "return_num_output_tokens",  # /
    },
}

Tensor = tuple[int, tuple[int, ...]]  # data type and dims

NUMPY_TYPES = {
    DataType.TYPE_STRING: np.object_,
    DataType.TYPE_INT32: np.int32,
    DataType.TYPE_INT64: np.int64,
    DataType.TYPE_FP32: np.float32,
}


def load(model: str) -> ModelConfig:
    return text_format.Parse((MODEL_REPO / model / "config.pbtxt").read_text(), ModelConfig())


def inputs(model: str) -> dict[str, Tensor]:
    return {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in load(model).input}


def outputs(model: str) -> dict[str, Tensor]:
    return {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in load(model).output}


every_model = pytest.mark.parametrize("model", MODELS)


# ---- each by itself ----------------------------------------------------------------------------------------------


def test_these_are_the_models():
    assert set(MODELS) == {"ensemble", *PYTHON_MODELS}


def test_every_folder_is_a_model():
    """Triton takes each folder of a repository for one, and does not start if it is none."""
    assert {path.name for path in MODEL_REPO.iterdir() if path.is_dir()} == set(MODELS)


@every_model
def test_a_folder_has_its_models_name(model: str):
    assert load(model).name == model


@every_model
def test_a_model_has_version_1(model: str):
    assert (MODEL_REPO / model / "1").is_dir()
    assert [path.name for path in (MODEL_REPO / model).iterdir() if path.is_dir()] == ["1"]


@every_model
def test_a_model_has_a_platform_or_a_backend_and_the_file_it_needs(model: str):
    config, folder = load(model), MODEL_REPO / model / "1"
    assert (config.platform, config.backend) in {("ensemble", ""), ("", "python")}
    assert (folder / "model.py").is_file() == (config.backend == "python")
    assert (folder / ".gitkeep").is_file() == (config.platform == "ensemble")  # git keeps no empty folder


@every_model
def test_a_config_has_no_holes(model: str):
    text = (MODEL_REPO / model / "config.pbtxt").read_text()
    assert "$" not in text
    for line in text.splitlines():
        assert not line.startswith("#") or "TODO" not in line


@every_model
def test_tensors_have_names_types_and_dims_and_no_name_comes_twice(model: str):
    for tensors in (load(model).input, load(model).output):
        names = [tensor.name for tensor in tensors]
        assert len(set(names)) == len(names)
        for tensor in tensors:
            assert tensor.data_type != DataType.TYPE_INVALID, tensor.name
            assert tensor.dims, tensor.name
            assert all(size == -1 or size > 0 for size in tensor.dims), tensor.name


@every_model
def test_batches_are_as_large_everywhere(model: str):
    assert load(model).max_batch_size == 64


@pytest.mark.parametrize("model", PYTHON_MODELS)
def test_a_model_runs_in_one_process_on_the_cpu(model: str):
    (group,) = load(model).instance_group
    assert (group.count, group.kind) == (1, group.KIND_CPU)


@every_model
def test_only_the_engine_streams(model: str):
    assert load(model).model_transaction_policy.decoupled == (model == "tensorrt_llm")


@pytest.mark.parametrize("model", ["tensorrt_llm", "infer"])
def test_a_model_that_waits_for_the_engine_takes_one_request_at_a_time(model: str):
    """The others stay in Triton's queue, where they are counted."""
    batching = load(model).dynamic_batching
    assert list(batching.preferred_batch_size) == [1]
    assert batching.max_queue_delay_microseconds == 0


@pytest.mark.parametrize("model", ["preprocessing", "postprocessing"])
def test_other_models_have_no_queue_of_their_own(model: str):
    assert not load(model).HasField("dynamic_batching")


# ---- the ensemble ------------------------------------------------------------------------------------------------


def steps() -> dict[str, tuple[Mapping[str, str], Mapping[str, str]]]:
    """Model -> input map and output map, both from the step's tensor to the ensemble's."""
    return {
        step.model_name: (dict(step.input_map), dict(step.output_map))
        for step in load("ensemble").ensemble_scheduling.step
    }


def test_the_steps_are_text_to_ids_to_ids_to_text():
    assert list(steps()) == ["preprocessing", "tensorrt_llm", "postprocessing"]


@pytest.mark.parametrize("model", ["preprocessing", "tensorrt_llm", "postprocessing"])
def test_a_step_maps_tensors_that_its_model_has(model: str):
    input_map, output_map = steps()[model]
    assert input_map.keys() <= inputs(model).keys()
    assert output_map.keys() <= outputs(model).keys()


def made_by(model: str) -> dict[str, Tensor]:
    """What a step adds to the ensemble's tensors."""
    return {name: outputs(model)[tensor] for tensor, name in steps()[model][1].items()}


def test_a_tensor_is_made_once_and_before_it_is_used():
    made = inputs("ensemble").keys()
    for model, (input_map, _) in steps().items():
        assert set(input_map.values()) <= made
        assert not made & made_by(model).keys()
        made = made | made_by(model).keys()
    assert outputs("ensemble").keys() <= made


@pytest.mark.parametrize("model", ["preprocessing", "tensorrt_llm", "postprocessing"])
def test_a_steps_inputs_have_the_type_and_dims_of_what_they_are_made_from(model: str):
    tensors = inputs("ensemble")
    for other in steps():
        tensors |= made_by(other)
    for tensor, name in steps()[model][0].items():
        assert inputs(model)[tensor] == tensors[name], (tensor, name)


def test_the_ensembles_outputs_have_the_type_and_dims_of_the_steps():
    made = {name: tensor for model in steps() for name, tensor in made_by(model).items()}
    for name, tensor in outputs("ensemble").items():
        assert tensor == made[name], name


def test_every_input_of_the_ensemble_goes_to_one_step():
    used = [name for input_map, _ in steps().values() for name in input_map.values()]
    for name in inputs("ensemble"):
        assert used.count(name) == 1, name


@pytest.mark.parametrize("model", ["preprocessing", "tensorrt_llm", "postprocessing"])
def test_the_ensemble_feeds_every_input_that_is_needed(model: str):
    needed = {tensor.name for tensor in load(model).input if not tensor.optional}
    assert needed <= steps()[model][0].keys()


def test_the_ensemble_leaves_out_only_inputs_for_those_who_send_ids():
    assert inputs("tensorrt_llm").keys() - steps()["tensorrt_llm"][0].keys() == {"stop", "stop_words_list"}


def test_every_output_of_the_engine_goes_on():
    assert outputs("tensorrt_llm").keys() == steps()["tensorrt_llm"][1].keys()


def test_every_input_of_the_ensemble_is_optional():
    """Triton only counts inputs; our own sentence says what is missing."""
    assert all(tensor.optional for tensor in load("ensemble").input)


def test_infer_takes_and_gives_what_the_ensemble_does():
    ensemble, infer = load("ensemble"), load("infer")
    assert list(infer.input) == list(ensemble.input)
    assert list(infer.output) == list(ensemble.output)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("text_input", (DataType.TYPE_STRING, (1,))),
        ("max_tokens", (DataType.TYPE_INT32, (1,))),
        ("stream", (DataType.TYPE_BOOL, (1,))),
        ("stop_words", (DataType.TYPE_STRING, (-1,))),
        ("bad_words", (DataType.TYPE_STRING, (-1,))),
        ("end_id", (DataType.TYPE_INT32, (1,))),
        ("pad_id", (DataType.TYPE_INT32, (1,))),
        ("top_k", (DataType.TYPE_INT32, (1,))),
        ("top_p", (DataType.TYPE_FP32, (1,))),
        ("temperature", (DataType.TYPE_FP32, (1,))),
        ("length_penalty", (DataType.TYPE_FP32, (1,))),
        ("repetition_penalty", (DataType.TYPE_FP32, (1,))),
        ("min_tokens", (DataType.TYPE_INT32, (1,))),
        ("presence_penalty", (DataType.TYPE_FP32, (1,))),
        ("frequency_penalty", (DataType.TYPE_FP32, (1,))),
        ("seed", (DataType.TYPE_UINT64, (1,))),
        ("return_log_probs", (DataType.TYPE_BOOL, (1,))),
        ("return_context_logits", (DataType.TYPE_BOOL, (1,))),
        ("return_generation_logits", (DataType.TYPE_BOOL, (1,))),
        ("num_return_sequences", (DataType.TYPE_INT32, (1,))),
        ("beam_width", (DataType.TYPE_INT32, (1,))),
        ("exclude_input_in_output", (DataType.TYPE_BOOL, (1,))),
    ],
)
def test_an_input_is_what_clients_of_nvidias_repository_send(name: str, tensor: Tensor):
    assert inputs("ensemble")[name] == tensor


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("text_output", (DataType.TYPE_STRING, (-1,))),
        ("cum_log_probs", (DataType.TYPE_FP32, (-1,))),
        ("output_log_probs", (DataType.TYPE_FP32, (-1, -1))),
        ("context_logits", (DataType.TYPE_FP32, (-1, -1))),
        ("generation_logits", (DataType.TYPE_FP32, (-1, -1, -1))),
        ("batch_index", (DataType.TYPE_INT32, (1,))),
        ("sequence_index", (DataType.TYPE_INT32, (1,))),
        ("num_input_tokens", (DataType.TYPE_INT32, (1,))),
        ("num_output_tokens", (DataType.TYPE_INT32, (1,))),
    ],
)
def test_an_output_is_what_clients_of_nvidias_repository_read(name: str, tensor: Tensor):
    assert outputs("ensemble")[name] == tensor


# ---- configs and code --------------------------------------------------------------------------------------------


def strings_in(path: Path) -> set[str]:
    """All string constants of a Python file, without importing it."""
    tree = ast.parse(path.read_text())
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def constant(path: Path, name: str) -> Any:
    """The value of a constant of a Python file, which uses nothing but itself."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return eval(compile(ast.Expression(node.value), str(path), "eval"), {"__builtins__": {}})
    raise AssertionError(f"{path} has no {name}")


def test_the_engines_model_reads_every_input_or_leaves_it_for_a_reason():
    read = constant(MODEL_REPO / "tensorrt_llm/1/model.py", "INPUTS")
    assert len(set(read)) == len(read)
    assert {*read, "stop"} == inputs("tensorrt_llm").keys() - UNREAD_INPUTS["tensorrt_llm"]


def test_the_request_reader_knows_every_input_that_it_gets():
    read = constant(MODEL_REPO / "tensorrt_llm/1/model.py", "INPUTS")
    assert set(read) <= strings_in(MODEL_REPO / "tensorrt_llm/1/request_reading.py")


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("preprocessing", "model.py"),
        ("tensorrt_llm", "chunks.py"),
        ("postprocessing", "model.py"),
    ],
)
def test_every_output_is_written(model: str, file: str):
    assert outputs(model).keys() <= strings_in(MODEL_REPO / model / "1" / file)


def test_a_chunk_has_the_types_and_dims_of_the_config():
    sequence = SequenceChunk(
        header=ChunkHeader(key=1, context=[5, 6]),
        token_ids=[1, 2, 3],
        num_output_tokens=3,
        log_probs=[-1.0, -2.0, -3.0],
        cumulative_log_prob=-6.0,
        finish_reason="stop",
    )
    chunk = Chunk(
        batch_index=0, sequence_index=0, num_input_tokens=2, sequences=[sequence, sequence], times_ns=(1, 2, 3, 4)
    )
    arrays = {**CONSTANT_ARRAYS, **chunk_arrays(chunk)}
    assert arrays.keys() == outputs("tensorrt_llm").keys()
    for name, (data_type, dims) in outputs("tensorrt_llm").items():
        assert arrays[name].dtype == NUMPY_TYPES[data_type], name
        batch, *shape = arrays[name].shape
        assert batch == 1
        assert len(shape) == len(dims), name
        assert all(size in (-1, actual) for size, actual in zip(dims, shape, strict=True)), name


def test_preprocessing_has_the_names_that_the_ensemble_connects():
    model = MODEL_REPO / "preprocessing/1/model.py"
    assert constant(model, "_INPUTS") == steps()["preprocessing"][0]
    to_engine = {name: tensor for tensor, name in steps()["tensorrt_llm"][0].items()}
    connected = {to_engine[name]: tensor for tensor, name in steps()["preprocessing"][1].items()}
    assert constant(model, "_OUTPUTS") == connected


def test_infer_gives_the_engine_what_the_ensemble_does():
    from_client = {name: tensor for tensor, name in steps()["tensorrt_llm"][0].items() if name in inputs("ensemble")}
    assert constant(MODEL_REPO / "infer/1/model.py", "ENGINE_NAMES") == from_client


@pytest.mark.parametrize("model", ["preprocessing", "postprocessing"])
def test_every_input_is_read(model: str):
    assert inputs(model).keys() <= strings_in(MODEL_REPO / model / "1/model.py")


def helpers(model: str) -> Collection[str]:
    return [path.stem for path in (MODEL_REPO / model / "1").glob("*.py") if path.name != "model.py"]


@pytest.mark.parametrize("model", PYTHON_MODELS)
def test_no_installed_package_takes_the_place_of_a_helper(model: str):
    """Triton puts a model's folder behind the installed packages, so a package of the same name would win, silently."""
    installed = [path for path in sys.path if path and not Path(path).is_relative_to(MODEL_REPO.parent)]
    for helper in helpers(model):
        assert helper not in sys.stdlib_module_names
        assert not hasattr(builtins, helper)
        assert PathFinder.find_spec(helper, installed) is None, helper


def test_a_helper_of_two_models_is_one_file():
    files: dict[str, set[Path]] = {}
    for model in PYTHON_MODELS:
        for helper in helpers(model):
            files.setdefault(helper, set()).add((MODEL_REPO / model / "1" / f"{helper}.py").resolve())
    assert {helper: paths for helper, paths in files.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("model", PYTHON_MODELS)
def test_a_model_has_every_helper_that_it_imports(model: str):
    everywhere = {helper for other in PYTHON_MODELS for helper in helpers(other)}
    for path in (MODEL_REPO / model / "1").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in everywhere:
                assert node.module in helpers(model), f"{path} imports {node.module}"
