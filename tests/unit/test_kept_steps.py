"""What a build leaves for the next one is there as a whole, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from compilers import kept_steps


@pytest.fixture
def rank(tmp_path: Path) -> Path:
    """A folder with an engine in it, as a step leaves it."""
    folder = tmp_path / "work/engine"
    folder.mkdir(parents=True)
    (folder / "rank0.engine").write_bytes(b"plan" * 1000)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    folder = tmp_path / "kept"
    folder.mkdir()
    return folder


def test_what_is_kept_is_found(kept: Path, rank: Path):
    place = kept_steps.keep(kept, "rank0", rank)
    assert kept_steps.find(kept, "rank0") == place == kept / "rank0"
    assert [path.name for path in kept_steps.files_of(place)] == ["config.json", "rank0.engine"]
    assert not rank.exists()


def test_what_was_not_kept_is_not_found(kept: Path):
    assert kept_steps.find(kept, "rank0") is None


def _flip(place: Path) -> None:
    content = bytearray((place / "rank0.engine").read_bytes())
    content[5] ^= 1
    (place / "rank0.engine").write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        lambda place: (place / "rank0.engine").write_bytes(b"plan"),
        lambda place: (place / "rank0.engine").unlink(),
        lambda place: (place / "more.engine").write_bytes(b"x"),
        lambda place: (place / kept_steps.NOTE).unlink(),
        lambda place: (place / kept_steps.NOTE).write_text("{"),
        lambda place: (place / kept_steps.NOTE).write_text("{}"),
        lambda place: (place / "link").symlink_to("rank0.engine"),
    ],
)
def test_what_is_damaged_is_removed_and_said(
    kept: Path, rank: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
):
    damage(kept_steps.keep(kept, "rank0", rank))
    assert kept_steps.find(kept, "rank0") is None
    assert "rank0 of an earlier build is damaged, and is made again" in caplog.messages
    assert not (kept / "rank0").exists()
