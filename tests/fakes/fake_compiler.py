"""In place of compilers/openvino_compiler.py: the same functions, with files of a few bytes for an engine.

python tests/fakes/fake_compiler.py GATE --model ...    engines.main with it; compiling lasts until GATE exists
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import engines
from checkpoint import Checkpoint
from compilers import CompiledModel, openvino_compiler
from plan import BuildRequest, EnginePlan

NAME = "compilers.openvino_compiler"


@dataclass
class FakeCompiler:
    """To be put into sys.modules under NAME: importing that gives it then."""

    during: Callable[[], None] = lambda: None  # called when half of the files are written
    plans: list[EnginePlan] = field(default_factory=list)  # one per compilation

    def versions(self) -> dict[str, str]:
        return {"fake": "1.0"}

    def check_request(self, request: BuildRequest) -> None:
        openvino_compiler.check_request(request)

    def check(self, plan: EnginePlan, config: Mapping[str, Any]) -> None:
        openvino_compiler.check(plan, config)

    def compile(self, plan: EnginePlan, checkpoint: Checkpoint, folder: Path, kept: Path) -> CompiledModel:
        self.plans.append(plan)
        (folder / "openvino_model.bin").write_bytes(b"weights")
        self.during()
        (folder / "openvino_model.xml").write_text(f"<net number='{len(self.plans)}'/>")
        return CompiledModel(
            vocab_size=512, bos_token_id=None, eos_token_ids=(0,), pad_token_id=None, kv_bytes_per_token=64
        )


def main(gate: Path, argv: list[str]) -> int:
    def wait() -> None:
        print("compiling", file=sys.stderr, flush=True)
        while not gate.exists():
            time.sleep(0.02)

    sys.modules[NAME] = FakeCompiler(during=wait)  # type: ignore[assignment]
    return engines.main(argv)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
