"""What a build has finished so far, for the next one if this one dies: folders that appear whole, with a note each.

    KEPT/rank0/{rank0.engine, config.json, note.json}

The note has size and SHA-256 of every file. What does not match it is done again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

from engine_manifest import ManifestError, list_files

log = logging.getLogger(__name__)

NOTE = "note.json"


def keep(kept: Path, name: str, folder: Path) -> Path:
    """Move `folder`, which is complete, to its place, in one step."""
    files = list_files(folder)
    (folder / NOTE).write_text(json.dumps(files), encoding="utf-8")
    place = kept / name
    shutil.rmtree(place, ignore_errors=True)
    os.replace(folder, place)
    return place


def find(kept: Path, name: str) -> Path | None:
    """The folder, if it is there with every file to the last bit. A damaged one is removed."""
    place = kept / name
    if not place.exists():
        return None
    try:
        noted = json.loads((place / NOTE).read_text(encoding="utf-8"))
        found = {path: record for path, record in list_files(place).items() if path != NOTE}
    except (OSError, ValueError, ManifestError):
        noted, found = None, {}
    if noted and noted == found:
        return place
    log.warning("%s of an earlier build is damaged, and is made again", name)
    shutil.rmtree(place, ignore_errors=True)
    return None


def files_of(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.name != NOTE)
