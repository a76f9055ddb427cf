"""An engine and `model_repo/` become a Triton model repository that loads as it is, wherever it is moved to."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from errors import StoreError, UsageError

MODEL_REPO = Path(__file__).resolve().parent.parent / "model_repo"
STEPS = ("preprocessing", "tensorrt_llm", "postprocessing")
RECORD = "repository.json"  # a file among the model folders: Triton looks only at folders

_SERVED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Triton's Python backend hands a model's path to a shell, unquoted, and to a Python that reads it as ASCII.
_NOT_IN_PATHS = re.compile(r"[^\w/.,:=+@%~#-]", re.ASCII)
_ANOTHER = "give another folder with --output"
_NOT_COPIED = ("__pycache__", ".gitkeep")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a repository's models are told beside the engine. Written into the models' settings.json."""

    default_max_tokens: int = 256  # for requests that do not say; less where the engine has less room
    exclude_input_in_output: bool = True  # NVIDIA's repository echoes the prompt unless told not to; ours does not
    responses_per_second: float | None = None  # all streams together; None: what the machine affords, see pacing.py
    hang_seconds: float = 120.0  # an engine that has work and says nothing for so long is given up
    # Requests that wait for the engine wait in Triton's queue, unless one of these is set; see waiting_room.py.
    max_queue_size: int = 0  # 0: no limit
    queue_timeout_seconds: float = 0.0  # 0: no limit
    priority_levels: int = 0  # 1 is the highest; 0: first come, first served


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A Triton model repository. `served_name` streams; `infer_name` answers plain infer()."""

    path: Path
    served_name: str
    infer_name: str
    engine: str  # its kind
    engine_key: str


def check_served_name(name: str) -> None:
    if not _SERVED_NAME.fullmatch(name):
        raise UsageError(
            f"'{name}' cannot be a Triton model's name; give one with --served-name, of "
            "letters, digits, '.', '_' and '-', at most 100, beginning with a letter or digit"
        )
    if name in STEPS or name.endswith("_infer"):
        raise UsageError(
            f"'{name}' is the name of a model that every repository has beside yours, or like it; "
            f"give another with --served-name, neither {', '.join(STEPS)} nor one that ends in _infer"
        )


def check_output(output: Path) -> None:
    """Refuse a place that cannot hold the repository; costs nothing, so it comes before the compiler.

    Raises UsageError for a path that Triton cannot load from, StoreError for one that is taken or cannot be written.
    """
    output = Path(os.path.realpath(output))
    if found := _NOT_IN_PATHS.search(str(output)):
        raise UsageError(
            f"--output '{output}' has {found[0]!r} in its path, and tritonserver cannot load a repository from there; "
            "give a path of ASCII letters, digits, '/', '.', '_' and '-'"
        )
    try:
        problem = _problem_with(output)
    except OSError as error:
        problem = f"cannot be used: {error.strerror}"
    if problem:
        raise StoreError(f"--output {output} {problem}; {_ANOTHER}")


def _problem_with(output: Path) -> str | None:
    if output.exists():
        if not output.is_dir():
            return "is not a folder"
        if any(output.iterdir()) and not _is_ours(output):
            return "exists and is not a repository of this program"
        if os.path.ismount(output):
            return "is a mount point, which cannot be replaced as a whole"
    parent = next(folder for folder in output.parents if folder.exists())
    if not parent.is_dir():
        return f"cannot be made: {parent} is not a folder"
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"cannot be written: {parent} is read-only for user {os.geteuid()}"
    return None


def _is_ours(folder: Path) -> bool:
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"served_name", "infer_name", "engine_key"} <= record.keys()


def assemble(
    engine: Path,
    served_name: str,
    output: Path,
    settings: Settings = Settings(),
    *,
    symlink_engine: bool = False,
) -> Repository:
    """Write the repository to `output`, replacing one that we wrote there before, and nothing else.

    Engine files are hard links, or copies where those do not reach; with `symlink_engine` they are symbolic links.
    Raises StoreError when `output` holds something else or cannot be written; it is complete or as it was.
    """
    check_served_name(served_name)
    output = Path(os.path.realpath(output))  # a link to a repository stays one
    manifest = json.loads((engine / "engine.json").read_text())
    repository = Repository(
        path=output,
        served_name=served_name,
        infer_name=f"{served_name}_infer",
        engine=manifest["engine"],
        engine_key=manifest["key"],
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _alone_in(output.parent):
            check_output(output)
            _remove_leftovers(output)
            with tempfile.TemporaryDirectory(prefix=_prefix(output), dir=output.parent) as folder:
                new = Path(folder) / "repository"
                _write(new, engine, repository, settings, os.symlink if symlink_engine else _link_or_copy)
                _swap(new, output, Path(folder) / "old")
    except OSError as error:
        raise StoreError(f"--output {output} cannot be written: {error.strerror or error}; {_ANOTHER}") from error
    return repository


def _write(
    folder: Path, engine: Path, repository: Repository, settings: Settings, link: Callable[[Path, Path], object]
) -> None:
    folder.mkdir()
    for step in STEPS:  # links between models become files: each model folder is complete
        _copy_folder(MODEL_REPO / step, folder / step, shutil.copyfile)
    names = {"ensemble": ("ensemble", repository.served_name), "infer": (repository.infer_name,)}
    for source, targets in names.items():
        for target in targets:
            _copy_folder(MODEL_REPO / source, folder / target, shutil.copyfile)
            _rename(folder / target / "config.pbtxt", source, target)
    for_prompts = {"default_max_tokens": settings.default_max_tokens}
    _write_json(folder / "preprocessing/1/settings.json", for_prompts)
    _write_json(folder / repository.infer_name / "1/settings.json", for_prompts)
    for_engine = {
        "exclude_input_in_output": settings.exclude_input_in_output,
        "responses_per_second": settings.responses_per_second,
        "hang_seconds": settings.hang_seconds,
        "max_queue_size": settings.max_queue_size,
        "queue_timeout_seconds": settings.queue_timeout_seconds,
        "priority_levels": settings.priority_levels,
    }
    _write_json(folder / "tensorrt_llm/1/settings.json", for_engine)
    _copy_folder(engine.absolute(), folder / "tensorrt_llm/1/engine", link)
    _write_json(folder / RECORD, asdict(repository) | {"path": None})


def _rename(config: Path, old: str, new: str) -> None:
    line = f'name: "{old}"\n'
    text = config.read_text()
    assert text.count(f"\n{line}") == 1, f"{config} must have one line {line!r}"
    config.write_text(text.replace(f"\n{line}", f'\nname: "{new}"\n'))


def _copy_folder(source: Path, target: Path, copy: Callable[[Path, Path], object]) -> None:
    """Contents without modes: of a read-only checkout comes a repository that can be written, and removed."""
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.name in _NOT_COPIED:
            continue
        if path.is_dir():
            _copy_folder(path, target / path.name, copy)
        else:
            copy(path, target / path.name)


def _link_or_copy(source: Path, target: Path) -> None:
    """Engines are large and never change: one copy on disk serves the store and the repository."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _swap(new: Path, output: Path, old: Path) -> None:
    """For a moment there is no repository; whatever happens then, the old one comes back."""
    try:
        if output.exists():
            os.replace(output, old)
        os.replace(new, output)
    finally:
        if old.exists() and not output.exists():
            os.replace(old, output)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Builders that assemble into one folder take turns. The kernel unlocks it however its holder ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # NFS does not lock folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _prefix(output: Path) -> str:
    return f".{output.name}.new."


def _remove_leftovers(output: Path) -> None:
    for path in output.parent.iterdir():
        if path.name.startswith(_prefix(output)):  # of a builder that was killed
            shutil.rmtree(path, ignore_errors=True)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
