"""Which checkpoints a run folder holds, which of them is the one to go on from, and which may go."""

from __future__ import annotations

import shutil
from pathlib import Path

from model.manifest import UnsoundCheckpoint, verify
from trainer.exits import ProofError

PREFIX = "checkpoint-"


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep`."""
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path)


def checkpoints(folder: Path) -> list[Path]:
    """Folders named checkpoint-N, oldest first."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))


def set_aside(folder: Path, step: int) -> list[str]:
    """Rename checkpoints beyond `step`: a run that goes back there takes another way, and would mistake them for its own."""
    told = []
    for path in checkpoints(folder):
        if step_of(path) > step:
            aside = path.with_name(f"abandoned-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            told.append(f"{path} is beyond step {step}; moved to {aside.name}")
    return told


def newest_sound(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every file is as its manifest says, and what was wrong with newer ones, which are moved away.

    ProofError when there are checkpoints and none is sound: that is never a fresh start.
    """
    damaged: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            verify(path)
            return path, damaged
        except UnsoundCheckpoint as error:
            aside = path.with_name(f"damaged-{path.name}")
            if aside.exists():
                shutil.rmtree(aside)
            path.rename(aside)
            damaged.append(f"{error}; moved to {aside.name}")
    if damaged or any(folder.glob(f"damaged-{PREFIX}*")):
        raise ProofError(
            f"{folder} has checkpoints and none is sound: {'; '.join(damaged) or 'all were moved aside before'}. "
            "Restore one from a copy, use another output_dir, or remove the damaged- folders to start anew"
        )
    return None, []
