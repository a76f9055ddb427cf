"""The chart as `helm template` renders it, and the files that the tests compare with: `make chart` writes them anew."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "chart"
GOLDEN = Path(__file__).with_name("golden")
EXAMPLES = {path.stem: path for path in sorted((CHART / "examples").glob("*.yaml"))}

MONITORING = {"enabled": True, "rules": False, "dashboard": False, "labels": {"release": "prometheus"}}
SIGNALS = {"concurrency": 28, "queueComputeRatio": 1, "kvCache": 0.8}

# Every switch, on top of an example. Rules and dashboard are files of their own, which tests compare elsewhere.
SWITCHES = {
    "autoscaling": {"mode": "keda", "signals": SIGNALS},
    "client": {"enabled": True},
    "gateway": {"enabled": True, "name": "gateway", "host": "llm.example"},
    "imagePullSecrets": ["registry"],
    "ingress": {"enabled": True, "host": "llm.example", "tlsSecret": "tls", "className": "nginx"},
    "monitoring": MONITORING,
    "networkPolicy": {"enabled": True},
    "rollout": "inPlace",
    "serveArguments": ["--quiet"],
    "tritonArguments": ["--log-verbose=1"],
}
GOLDEN_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in EXAMPLES},
    "every-switch": ("llama-3.1-70b-4xh100", SWITCHES),
    "hpa": ("llama-3.1-8b-h100", {"autoscaling": {"mode": "hpa", "signals": SIGNALS}, "monitoring": MONITORING}),
    "baked": ("demo-cpu", {"engine": {"source": "image"}, "model": {"checkpoint": ""}}),
}


class RefusedError(Exception):
    """Helm refused the values; what it said."""


def render_text(helm: Path, example: str | None, values: dict[str, Any], *options: str) -> str:
    command = [str(helm), "template", "llm", str(CHART), "--namespace", "models", "--kube-version", "1.35.0", *options]
    if example:
        command += ["--values", str(EXAMPLES[example])]
    done = subprocess.run([*command, "--values", "-"], input=yaml.safe_dump(values), capture_output=True, text=True)
    if done.returncode:
        raise RefusedError(done.stderr)
    return done.stdout


def render(helm: Path, example: str | None = "demo-cpu", values: dict[str, Any] | None = None) -> dict[str, Any]:
    """ "Kind/name" -> object."""
    objects = [found for found in yaml.safe_load_all(render_text(helm, example, values or {})) if found]
    return {f"{found['kind']}/{found['metadata']['name']}": found for found in objects}


def write_golden(helm: Path) -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name, (example, values) in GOLDEN_CASES.items():
        (GOLDEN / f"{name}.yaml").write_text(render_text(helm, example, values))


if __name__ == "__main__":
    write_golden(Path(sys.argv[1] if len(sys.argv) > 1 else "helm"))
