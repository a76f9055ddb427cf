"""An installation of the double of TensorRT-LLM, on a machine with the GPUs and versions that a test wants.

    environment = make(tmp_path)
    subprocess.run([environment.python, "build/engines.py", ...], env=environment.variables)

The interpreter has the packages of the real environment and the double. Triton's stub takes its packages from the
python3 that is first on PATH, and serve.py puts its own interpreter there, so a server started with it has them, too.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOUBLE = Path(__file__).parent / "tensorrt_llm"
H100 = ("NVIDIA H100 80GB HBM3", "9.0", 81559)
DRIVER = "590.44.01"
# What a release without the engine backend lacks.
ENGINE_BACKEND = ("_tensorrt_engine", "builder.py", "models", "plugin")

_NVIDIA_SMI = '''#!{python}
"""Answers as nvidia-smi does, from the settings of the double."""

import json, sys

gpus = json.load(open({settings!r}))["gpus"] or ()
if not gpus:
    sys.exit(print("No devices were found") or 0)
options = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
if options.get("--format") != "csv,noheader,nounits" or "--query-gpu" not in options:
    sys.exit("the double of nvidia-smi answers --query-gpu=... --format=csv,noheader,nounits only")
for index, (name, capability, memory) in enumerate(gpus):
    values = dict(index=index, uuid=f"GPU-{{index:08d}}", name=name, compute_cap=capability, driver_version={driver!r})
    values |= {{"memory.total": memory, "memory.free": memory - 512, "memory.used": 512}}
    fields = options["--query-gpu"].split(",")
    if unknown := [field for field in fields if field.strip() not in values]:
        print(f'Field "{{unknown[0]}}" is not a valid field to query.')
        sys.exit(2)
    print(", ".join(str(values[field.strip()]) for field in fields))
'''


@dataclass(frozen=True, kw_only=True)
class TrtllmEnvironment:
    python: Path  # an interpreter in whose environment tensorrt_llm is the double
    variables: dict[str, str]  # to run anything in
    site: Path  # for sys.path of tests in this process: the double and what says that it is installed
    settings: Path  # read again by the double whenever it has changed

    def inject(self, **faults: Any) -> None:
        """These faults and no others, also in processes that run already.

        Building: build_seconds; build_dies_at_rank (the process ends with 139); build_fails_at_rank, build_error.
        Loading: load_seconds; load_error, which only the worker's log tells.
        Serving: step_seconds; fail_request_at_token (of every request that gets there), request_error;
        background_error_at_step, background_error; hang_at_step; kill_rank; ignore_abort; no_stats. Steps count from
        when the engine sees the fault, 1 is the next. After kill_rank nobody is told before the next request, unless
        death_reaches_one is given: then one of those that wait is.
        """
        self.change(faults=faults)

    def change(self, **settings: Any) -> None:
        """Another machine: gpus, tensorrt, tensorrt_llm (the versions that it tells), has_network."""
        _write(self.settings, {**json.loads(self.settings.read_text()), **settings})


def make(
    folder: Path,
    *,
    gpus: Sequence[tuple[str, str, int]] | None = (H100,) * 4,
    tensorrt_llm: str | None = "1.2.1",
    tensorrt: str | None = "10.14.1.48",
    engine_backend: bool = True,
    pytorch_also: Sequence[str] = (),
) -> TrtllmEnvironment:
    """`gpus` are (name, compute capability, MiB); None: not even a driver. No `tensorrt_llm`: not installed.

    `pytorch_also` are architectures that the PyTorch backend gets beside those that the library has.
    """
    folder = folder.absolute()
    settings, bin_, site = folder / "settings.json", folder / "bin", folder / "site"
    packages = folder / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    for made in (bin_, site, packages):
        made.mkdir(parents=True)
    _write(settings, {"gpus": gpus, "tensorrt_llm": tensorrt_llm, "tensorrt": tensorrt, "faults": {}})
    if tensorrt_llm is not None:
        _install_double(site, engine_backend=engine_backend)
        _register(site / "tensorrt_llm/_torch", pytorch_also)
    for name, version in (("tensorrt_llm", tensorrt_llm), ("tensorrt", tensorrt)):
        if version is not None:
            _record(site, name, version)
    # As `python -m venv` does, without its second: a link, and a file that says where the link leads.
    for name in ("python", "python3"):
        (bin_ / name).symlink_to(os.path.realpath(sys.executable))
    home = sysconfig.get_config_var("BINDIR")
    (folder / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = false\n")
    (packages / "double.pth").write_text(f"{site}\n{sysconfig.get_path('purelib')}\n")
    if gpus is not None:
        smi = bin_ / "nvidia-smi"
        smi.write_text(_NVIDIA_SMI.format(python=bin_ / "python", settings=str(settings), driver=DRIVER))
        smi.chmod(0o755)
    variables = {
        **os.environ,
        "PATH": f"{bin_}:{os.environ.get('PATH', os.defpath)}",
        "PYTHONPATH": str(site),
        "TENSORRT_LLM_DOUBLE": str(settings),
    }
    return TrtllmEnvironment(python=bin_ / "python", variables=variables, site=site, settings=settings)


def _install_double(site: Path, *, engine_backend: bool) -> None:
    package = site / "tensorrt_llm"
    package.mkdir()
    for entry in DOUBLE.iterdir():
        if entry.name != "__pycache__" and (engine_backend or entry.name not in ENGINE_BACKEND):
            (package / entry.name).symlink_to(entry.absolute())


def _register(torch_backend: Path, architectures: Sequence[str]) -> None:
    """A file more among those that register architectures."""
    original = torch_backend.resolve()
    torch_backend.unlink()
    (torch_backend / "models").mkdir(parents=True)
    for file in original.rglob("*.py"):
        (torch_backend / file.relative_to(original)).symlink_to(file)
    lines = [f'@register_auto_model("{name}")\n' for name in architectures]
    text = "from .modeling_utils import register_auto_model\n\n\n" + "".join(lines) + "class Also:\n    pass\n"
    (torch_backend / "models/modeling_also.py").write_text(text)


def _record(site: Path, name: str, version: str) -> None:
    """What importlib.metadata finds."""
    record = site / f"{name}-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def _write(path: Path, content: dict[str, Any]) -> None:
    """At once, since a running engine may read it."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=2))
    os.replace(new, path)
