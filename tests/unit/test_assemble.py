"""The repository that an engine and model_repo/ become: complete, ours alone, and replaced as a whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import assemble as assemble_module
import pytest
from assemble import MODEL_REPO, STEPS, Repository, Settings, assemble, check_output, check_served_name
from errors import StoreError, UsageError

google_text_format = pytest.importorskip("google.protobuf.text_format")
model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")

MODELS = {*STEPS, "ensemble", "tiny", "tiny_infer"}
OTHER_FILE_SYSTEM = Path("/dev/shm")


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return make_engine(tmp_path / "store/engine", key="ab" * 32)


def make_engine(folder: Path, *, key: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "engine.json").write_text(json.dumps({"key": key, "engine": "openvino"}))
    (folder / "openvino_model.bin").write_bytes(b"weights")
    return folder


@pytest.fixture
def repository(engine: Path, tmp_path: Path) -> Repository:
    return assemble(engine, "tiny", tmp_path / "out/tiny")


def config_of(model: Path):
    return google_text_format.Parse((model / "config.pbtxt").read_text(), model_config.ModelConfig())


def models_of(repository: Repository) -> dict[str, Path]:
    return {path.name: path for path in repository.path.iterdir() if path.is_dir()}


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is in it


def test_it_has_the_three_steps_and_the_model_under_three_names(repository: Repository):
    assert models_of(repository).keys() == MODELS
    assert (repository.served_name, repository.infer_name) == ("tiny", "tiny_infer")


@pytest.mark.parametrize("name", sorted(MODELS))
def test_each_config_parses_and_has_its_folders_name(repository: Repository, name: str):
    assert config_of(repository.path / name).name == name


@pytest.mark.parametrize("name", ["ensemble", "tiny"])
def test_the_ensembles_steps_are_models_of_the_repository(repository: Repository, name: str):
    steps = [step.model_name for step in config_of(repository.path / name).ensemble_scheduling.step]
    assert steps == list(STEPS)


@pytest.mark.parametrize(("name", "source"), [*((step, step) for step in STEPS), ("tiny_infer", "infer")])
def test_each_model_has_all_the_code_it_has_in_the_checkout(repository: Repository, name: str, source: str):
    wanted = {path.name: path.read_bytes() for path in (MODEL_REPO / source / "1").glob("*.py")}
    assert "model.py" in wanted
    assert {path.name: path.read_bytes() for path in (repository.path / name / "1").glob("*.py")} == wanted


def test_each_model_has_its_version_folder(repository: Repository):
    assert all((folder / "1").is_dir() for folder in models_of(repository).values())


def test_nothing_points_out_of_it(repository: Repository):
    assert [path for path in repository.path.rglob("*") if path.is_symlink()] == []


def test_what_python_and_git_left_in_the_checkout_is_not_in_it(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkout = tmp_path / "model_repo"
    shutil.copytree(MODEL_REPO, checkout)
    (checkout / "infer/1/__pycache__").mkdir(exist_ok=True)
    (checkout / "infer/1/__pycache__/model.pyc").write_bytes(b"")
    monkeypatch.setattr(assemble_module, "MODEL_REPO", checkout)
    repository = assemble(engine, "tiny", tmp_path / "out")
    assert not [path for path in repository.path.rglob("*") if path.name in ("__pycache__", ".gitkeep")]


def test_each_model_is_told_its_settings(engine: Path, tmp_path: Path):
    for_engine = {
        "exclude_input_in_output": False,
        "responses_per_second": 50.0,
        "hang_seconds": 7.0,
        "max_queue_size": 3,
        "queue_timeout_seconds": 2.5,
        "priority_levels": 4,
    }
    settings = Settings(default_max_tokens=7, **for_engine)
    path = assemble(engine, "tiny", tmp_path / "out", settings).path
    told = {name: json.loads(file.read_text()) for name in MODELS if (file := path / name / "1/settings.json").exists()}
    assert told == {
        "preprocessing": {"default_max_tokens": 7},
        "tiny_infer": {"default_max_tokens": 7},
        "tensorrt_llm": for_engine,
    }


def test_it_says_what_it_serves(repository: Repository):
    record = json.loads((repository.path / "repository.json").read_text())
    assert record == {
        "path": None,
        "served_name": "tiny",
        "infer_name": "tiny_infer",
        "engine": "openvino",
        "engine_key": "ab" * 32,
    }


def test_the_engine_is_not_a_second_copy_on_one_file_system(repository: Repository, engine: Path):
    placed = repository.path / "tensorrt_llm/1/engine"
    assert contents_of(placed) == contents_of(engine)
    assert all((placed / path.name).samefile(path) for path in engine.iterdir())


@pytest.mark.skipif(
    not OTHER_FILE_SYSTEM.is_dir() or OTHER_FILE_SYSTEM.stat().st_dev == Path("/tmp").stat().st_dev,
    reason="/dev/shm is no other file system here",
)
def test_the_engine_is_copied_to_another_file_system(tmp_path: Path):
    with_engine = OTHER_FILE_SYSTEM / f"test-assemble-{os.getpid()}"
    try:
        engine = make_engine(with_engine / "engine", key="ab" * 32)
        placed = assemble(engine, "tiny", tmp_path / "out").path / "tensorrt_llm/1/engine"
        assert contents_of(placed) == contents_of(engine)
    finally:
        shutil.rmtree(with_engine, ignore_errors=True)


def test_the_engine_is_copied_where_there_are_no_hard_links(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    placed = assemble(engine, "tiny", tmp_path / "out").path / "tensorrt_llm/1/engine"
    assert contents_of(placed) == contents_of(engine)
    assert not (placed / "openvino_model.bin").samefile(engine / "openvino_model.bin")


def test_of_a_read_only_checkout_comes_a_repository_that_can_be_written(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkout = tmp_path / "model_repo"
    shutil.copytree(MODEL_REPO, checkout)
    for path in [checkout, *checkout.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    monkeypatch.setattr(assemble_module, "MODEL_REPO", checkout)
    repository = assemble(engine, "tiny", tmp_path / "out")
    ours = [path for path in repository.path.rglob("*") if "engine" not in path.parts]
    assert all(path.stat().st_mode & 0o200 for path in ours)


# --- names


def test_served_as_ensemble_there_is_only_one(engine: Path, tmp_path: Path):
    repository = assemble(engine, "ensemble", tmp_path / "out")
    assert models_of(repository).keys() == {*STEPS, "ensemble", "ensemble_infer"}
    assert config_of(repository.path / "ensemble").name == "ensemble"


@pytest.mark.parametrize("name", ["gpt2", "Llama-3.1-8B", "a", "0", "x" * 100, "infer"])
def test_a_served_name_may_be(name: str):
    check_served_name(name)


@pytest.mark.parametrize("name", ["", "my model", "-x", ".x", "org/name", "x" * 101, "naïve", "a\n", "a;b"])
def test_a_served_name_is_a_short_word(name: str):
    with pytest.raises(UsageError, match="cannot be a Triton model's name; give one with --served-name"):
        check_served_name(name)


@pytest.mark.parametrize("name", [*STEPS, "gpt2_infer", "infer_infer"])
def test_a_served_name_is_none_of_the_repositorys_own(name: str):
    with pytest.raises(UsageError, match=f"'{name}' is the name of a model that every repository has"):
        check_served_name(name)


# --- where it is written


def test_a_second_one_replaces_the_first(repository: Repository, tmp_path: Path):
    other = make_engine(tmp_path / "store/other", key="cd" * 32)
    again = assemble(other, "other", repository.path)
    assert models_of(again).keys() == {*STEPS, "ensemble", "other", "other_infer"}
    assert again.engine_key == "cd" * 32
    assert [path.name for path in repository.path.parent.iterdir()] == ["tiny"]


def test_an_empty_folder_is_taken(engine: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    assert models_of(assemble(engine, "tiny", tmp_path / "out")).keys() == MODELS


def test_a_link_to_a_repository_stays_one(repository: Repository, engine: Path, tmp_path: Path):
    link = tmp_path / "current"
    link.symlink_to(repository.path)
    assert assemble(engine, "other", link).path == repository.path
    assert link.is_symlink()
    assert (link / "other").is_dir()


@pytest.mark.parametrize("name", ["notes.txt", "repository.json", ".hidden"])
def test_a_folder_of_others_is_left_alone(engine: Path, tmp_path: Path, name: str):
    output = tmp_path / "out"
    output.mkdir()
    (output / name).write_text('{"name": "of another program"}')
    with pytest.raises(StoreError) as caught:
        assemble(engine, "tiny", output)
    assert str(caught.value) == (
        f"--output {output} exists and is not a repository of this program; give another folder with --output"
    )
    assert contents_of(tmp_path / "out") == {name: b'{"name": "of another program"}'}


def test_a_file_is_left_alone(engine: Path, tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(StoreError, match=r"--output \S+/out is not a folder; give another"):
        assemble(engine, "tiny", tmp_path / "out")
    with pytest.raises(StoreError, match=r"--output \S+/out/x cannot be "):
        assemble(engine, "tiny", tmp_path / "out/x")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("name", ["my models", "tab\there", "a;b", "$HOME", "it's", "a(1)", "a&b", "a{b,c}", "naïve"])
def test_a_path_that_triton_cannot_load_from_is_refused(tmp_path: Path, name: str):
    with pytest.raises(UsageError, match="tritonserver cannot load a repository from there; give a path of ASCII"):
        check_output(tmp_path / name / "out")


@pytest.mark.parametrize("name", ["llama-3.1_8B", "x=y", "a+b,c:d", "50%", "h#x", "~x"])
def test_a_path_that_triton_can_load_from_is_not(tmp_path: Path, name: str):
    check_output(tmp_path / name / "out")


def test_a_folder_that_cannot_be_written_is_found_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(StoreError) as caught:
        check_output(tmp_path / "a/b")
    assert str(caught.value) == (
        f"--output {tmp_path}/a/b cannot be written: {tmp_path} is read-only for user {os.geteuid()}; "
        "give another folder with --output"
    )


def test_a_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(StoreError, match="is a mount point, which cannot be replaced as a whole; give another folder"):
        check_output(tmp_path)
    check_output(tmp_path / "inside")


# --- when something happens meanwhile


@pytest.mark.parametrize("event", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_happens_while_it_is_written_leaves_the_old_one(
    repository: Repository, engine: Path, monkeypatch: pytest.MonkeyPatch, event: BaseException
):
    before = contents_of(repository.path)

    def fail(path: Path, value: dict) -> None:
        raise event

    monkeypatch.setattr(assemble_module, "_write_json", fail)
    with pytest.raises((StoreError, KeyboardInterrupt)) as caught:
        assemble(engine, "other", repository.path)
    assert contents_of(repository.path) == before
    assert [path.name for path in repository.path.parent.iterdir()] == ["tiny"]
    if isinstance(event, OSError):
        assert str(caught.value) == (
            f"--output {repository.path} cannot be written: No space left on device; give another folder with --output"
        )


@pytest.mark.parametrize("event", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_what_happens_while_it_is_put_in_place_brings_the_old_one_back(
    repository: Repository, engine: Path, monkeypatch: pytest.MonkeyPatch, event: BaseException
):
    before, replace = contents_of(repository.path), os.replace

    def fail_for_the_new_one(source: Path, target: Path) -> None:
        if Path(source).name == "repository":
            raise event
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_for_the_new_one)
    with pytest.raises((StoreError, KeyboardInterrupt)):
        assemble(engine, "other", repository.path)
    assert contents_of(repository.path) == before
    assert [path.name for path in repository.path.parent.iterdir()] == ["tiny"]


def test_what_a_killed_one_left_is_removed(engine: Path, tmp_path: Path):
    for name in (".tiny.new.x1", ".other.new.x2"):
        (tmp_path / f"out/{name}/repository/ensemble").mkdir(parents=True)
    assemble(engine, "tiny", tmp_path / "out/tiny")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".other.new.x2", "tiny"]


def test_several_at_once_take_turns(engine: Path, tmp_path: Path):
    with ThreadPoolExecutor(max_workers=4) as pool:
        repositories = list(pool.map(lambda _: assemble(engine, "tiny", tmp_path / "out/tiny"), range(12)))
    assert models_of(repositories[-1]).keys() == MODELS
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny"]
