"""Names that a run folder uses: each is a file or a folder of this trainer, and nothing else may have that name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from trainer.errors import SaveError
from trainer.machine.atomic_files import places

FOLDERS = ("index", "final", "best", "stages", "stacks", "check", "tensorboard", "wandb")
FILES = (
    *("run.toml", "start.json", "exit.json", "metrics.jsonl", "faults.jsonl", "quarantine.jsonl", "previous-quarantine.jsonl"),
    *("generations.jsonl", "ledger.json", "trainer_state.json", "samples.bin", "samples.json", "planned_lengths.npz"),
    *("data.json", "data_changes.jsonl", ".lock", ".lease"),
)
NUMBERED = re.compile(r"checkpoint-\d+|\d\d-[a-z0-9_-]+")
"""Names of checkpoints and of the folders of stages."""


def check_folder(folder: Path) -> None:
    """Check that nothing else stands in place of the run folder, or of a folder above it. Raises SaveError that names it."""
    for path in (folder, *folder.parents):
        if os.path.lexists(path) and not path.is_dir():
            raise SaveError(f"output_dir = {str(folder)!r}: {path} is no folder; move it away, or use another output_dir")


def check_names(folder: Path) -> None:
    """Check that no file has the name of a folder of the run, nor the other way round. Raises SaveError with the path otherwise."""
    for place in {folder, folder / "stages", *places(folder)}:
        found = {name for name in os.listdir(place) if NUMBERED.fullmatch(name)} if place.is_dir() else set()
        for name in (*FOLDERS, *sorted(found)):
            path = place / name
            if os.path.lexists(path) and not path.is_dir():
                raise SaveError(f"{path} is in the way: {name}/ will be a folder; remove it, or use another output_dir")
        for name in FILES:
            if (place / name).is_dir():
                raise SaveError(f"{place / name} is in the way: {name} will be a file; remove it, or use another output_dir")
