"""Install what a base image lacks of some groups of pyproject.toml, at this project's versions, below a prefix.

    python3 add_missing.py PREFIX GROUP...

What the base image has stays as it is: TensorRT-LLM, torch and the rest were built for each other.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path


def main(prefix: str, *groups: str) -> int:
    here = Path(__file__).parent
    there = {_canonical(package.name) for package in metadata.distributions()}
    tables = tomllib.loads((here / "pyproject.toml").read_text())["dependency-groups"]
    pins = [line for line in (here / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    missing = [pin for group in groups for pin in _pins(tables, group) if _name(pin) not in there]
    Path(prefix).mkdir(parents=True, exist_ok=True)
    print("missing in the base image:", " ".join(missing) or "nothing", flush=True)
    if not missing:
        return 0
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(pin for pin in pins if _name(pin) not in there))
        constraints.flush()
        options = ["--no-cache-dir", "--prefix", prefix, "--constraint", constraints.name]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, *missing], check=True)
    (folder,) = Path(prefix).glob("lib/python*/site-packages")
    added = {_canonical(package.name) for package in metadata.distributions(path=[str(folder)])}
    if replaced := sorted(added & there):
        sys.exit(
            f"{', '.join(missing)} would replace {', '.join(replaced)} of the base image; "
            "use the base image that this project's versions are for, or change the versions"
        )
    return 0


def _pins(tables: dict, group: str) -> list[str]:
    return [
        pin
        for entry in tables[group]
        for pin in (_pins(tables, entry["include-group"]) if isinstance(entry, dict) else [entry])
    ]


def _name(pin: str) -> str:
    return _canonical(re.split(r"[=<>~!\[; ]", pin, maxsplit=1)[0])


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
