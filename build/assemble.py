"""An engine and `model_repo/` become a Triton model repository that loads as it is, wherever it is moved to."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from errors import StoreError, UsageError

MODEL_REPO = Path(__file__).resolve().parent.parent / "model_repo"
STEPS = ("preprocessing", "tensorrt_llm", "postprocessing")
RECORD = "repository.json"  # a file among the model folders: Triton looks only at folders

_SERVED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a repository's models are told beside the engine. Written into the models' settings.json."""

    default_max_tokens: int = 256  # for requests that do not say; less where the engine has less room
    exclude_input_in_output: bool = True  # NVIDIA's repository echoes the prompt unless told not to; ours does not
    responses_per_second: float = 1000.0  # all streams together; see dispatcher.py


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A Triton model repository. `served_name` streams; `infer_name` answers plain infer()."""

    path: Path
    served_name: str
    infer_name: str
    engine_key: str


def check_served_name(name: str) -> None:
    if not _SERVED_NAME.fullmatch(name):
        raise UsageError(
            f"--served-name '{name}' cannot be a Triton model's name; "
            "use letters, digits, '.', '_' and '-', beginning with a letter or digit"
        )
    if name in STEPS or name.endswith("_infer"):
        raise UsageError(f"--served-name '{name}' is taken by a model of the repository itself; choose another name")


def assemble(engine: Path, served_name: str, output: Path, settings: Settings = Settings()) -> Repository:
    """Write the repository to `output`, replacing one that we wrote there before, and nothing else.

    Raises StoreError when `output` holds something else or cannot be written; it is complete or as it was.
    """
    check_served_name(served_name)
    output = output.absolute()
    if output.exists() and not (output / RECORD).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise StoreError(f"--output {output} exists and is not a repository of this program; give another folder")
    engine_key = json.loads((engine / "engine.json").read_text())["key"]
    repository = Repository(
        path=output, served_name=served_name, infer_name=f"{served_name}_infer", engine_key=engine_key
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.new.", dir=output.parent) as folder:
            new = Path(folder) / "repository"
            _write(new, engine, repository, settings)
            _swap(new, output, Path(folder) / "old")
    except OSError as error:
        raise StoreError(f"the repository {output} cannot be written: {error.strerror or error}") from error
    return repository


def _write(folder: Path, engine: Path, repository: Repository, settings: Settings) -> None:
    ignore = shutil.ignore_patterns("__pycache__", ".gitkeep")
    for step in STEPS:  # links between models become files: each model folder is complete
        shutil.copytree(MODEL_REPO / step, folder / step, ignore=ignore)
    names = {"ensemble": ("ensemble", repository.served_name), "infer": (repository.infer_name,)}
    for source, targets in names.items():
        for target in targets:
            shutil.copytree(MODEL_REPO / source, folder / target, ignore=ignore, dirs_exist_ok=True)
            _rename(folder / target / "config.pbtxt", source, target)
    for_prompts = {"default_max_tokens": settings.default_max_tokens}
    _write_json(folder / "preprocessing/1/settings.json", for_prompts)
    _write_json(folder / repository.infer_name / "1/settings.json", for_prompts)
    for_engine = {
        "exclude_input_in_output": settings.exclude_input_in_output,
        "responses_per_second": settings.responses_per_second,
    }
    _write_json(folder / "tensorrt_llm/1/settings.json", for_engine)
    shutil.copytree(engine, folder / "tensorrt_llm/1/engine", copy_function=_link_or_copy)
    _write_json(folder / RECORD, asdict(repository) | {"path": None})


def _rename(config: Path, old: str, new: str) -> None:
    line = f'name: "{old}"\n'
    text = config.read_text()
    assert text.count(f"\n{line}") == 1, f"{config} must have one line {line!r}"
    config.write_text(text.replace(f"\n{line}", f'\nname: "{new}"\n'))


def _link_or_copy(source: str, target: str) -> None:
    """Engines are large and never change: one copy on disk serves the store and the repository."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _swap(new: Path, output: Path, old: Path) -> None:
    if output.exists():
        os.replace(output, old)
    os.replace(new, output)


def _remove_leftovers(output: Path) -> None:
    for leftover in output.parent.glob(f".{output.name}.new.*"):  # of a builder that was killed
        shutil.rmtree(leftover, ignore_errors=True)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
