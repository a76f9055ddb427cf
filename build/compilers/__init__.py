"""What turns a checkpoint into an engine: one module per engine kind, each with the functions of `Compiler`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from checkpoint import Checkpoint
    from plan import BuildRequest, EnginePlan


@dataclass(frozen=True, kw_only=True)
class CompiledModel:
    """What only the compiled engine and its tokenizer can say, for the manifest."""

    vocab_size: int  # width of the logits; the tokenizer may know fewer ids
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # any of them ends an answer; empty if the model has none
    pad_token_id: int | None
    kv_bytes_per_token: int  # of all layers, at the precision that the server's cache has
    gpu: tuple[str, str] | None = None  # product and compute capability that it is for; None where any will do


class Compiler(Protocol):
    """A module of this folder."""

    def versions(self) -> dict[str, str]:
        """Of the packages that decide the engine's bytes. Cheap: imports none of them."""

    def check_request(self, request: BuildRequest) -> None:
        """Refuse, before anything is downloaded, what this kind can never build here.

        Raises UsageError for options, UnsupportedError for the machine.
        """

    def check(self, plan: EnginePlan, config: Mapping[str, Any]) -> None:
        """Refuse a model that this kind cannot build; `config` is the content of config.json.

        Raises UsageError for a layout, UnsupportedError for an architecture, a format or a GPU.
        """

    def compile(self, plan: EnginePlan, checkpoint: Checkpoint, folder: Path, kept: Path) -> CompiledModel:
        """Write the engine and its tokenizer into the empty `folder`.

        `kept` may be made, to hold what a build that fails or is killed need not do again; it is the engine's own, and
        the store removes it when the engine is complete. Raises UnsupportedError and CompileError.
        """
