"""What stands in a run folder, by name: each is a file or a folder of ours, and nothing else may have its name."""

from __future__ import annotations

import os
import re
from pathlib import Path

from trainer.disk import places
from trainer.exits import SaveError

FOLDERS = ("index", "final", "stages", "stacks", "check")
FILES = (
    *("run.toml", "exit.json", "metrics.jsonl", "faults.jsonl", "quarantine.jsonl", "previous-quarantine.jsonl"),
    *("ledger.json", "trainer_state.json", "samples.bin", "samples.json", "planned_lengths.npz", ".lock", ".lease"),
    *("data.json", "data_changes.jsonl"),
)
NUMBERED = re.compile(r"checkpoint-\d+|\d\d-[a-z0-9_-]+")
"""Checkpoints, and the folders of stages."""


def check_names(folder: Path) -> None:
    """SaveError, with the path, where a file stands that is to be a folder, or the other way round."""
    for place in {folder, folder / "stages", *places(folder)}:
        found = {name for name in os.listdir(place) if NUMBERED.fullmatch(name)} if place.is_dir() else set()
        for name in (*FOLDERS, *sorted(found)):
            path = place / name
            if os.path.lexists(path) and not path.is_dir():
                raise SaveError(f"{path} is in the way: {name}/ will be a folder; remove it, or use another output_dir")
        for name in FILES:
            if (place / name).is_dir():
                raise SaveError(f"{place / name} is in the way: {name} will be a file; remove it, or use another output_dir")
