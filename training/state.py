"""Saving and resuming a stage: written beside, fsynced with a manifest of hashes, renamed, and only then rotated.

It does not know what the state holds: a dictionary of tensors and plain values, read back with weights_only.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..pipeline.checkpoint import file_hash, write_text


def save(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Writes `folder/step-<step>` whole or not at all, then removes all but the newest `keep`. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = folder / f"step-{step:08d}", folder / f".writing-{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    with open(temporary / "state.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    write_text(temporary / "manifest.json", json.dumps({"step": step, "state.pt": file_hash(temporary / "state.pt")}))
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    for old in [path for path in complete(folder) if path != final][: 1 - keep or None]:
        shutil.rmtree(old)
    return final


def complete(folder: Path) -> list[Path]:
    """The checkpoints that have a manifest, oldest first. A half-written folder is not among them."""
    return sorted(path.parent for path in folder.glob("step-*/manifest.json"))


def _is_whole(path: Path) -> bool:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        return file_hash(path / "state.pt") == manifest["state.pt"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint whose hash agrees with its manifest, or None where there is none at all.

    Raises ValueError where there are checkpoints but all are damaged: starting anew must be the user's choice.
    """
    for path in reversed(complete(folder)):
        if _is_whole(path):
            return torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    if complete(folder):
        raise ValueError(f"{folder}: every checkpoint is damaged; move them away to start anew")
    return None
