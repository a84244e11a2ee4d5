"""Fingerprint of the data of a run or stage at its beginning, in data.json: a resumed start with other data stops and says so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data.fingerprint import changed_files, data_fingerprint
from model.errors import ConfigError
from model.files.tensor_files import dump_json
from model.files.untrusted import Json
from trainer.distributed.main_rank import on_main_rank
from trainer.distributed.world import World
from trainer.errors import SaveError
from trainer.machine.atomic_files import replace_text
from trainer.machine.json_lines import append_lines
from trainer.records.run_data import RunData
from trainer.runfile.stages import Stage

NAME, CHANGES = "data.json", "data_changes.jsonl"
SHOWN = 8  # changes that a message names


def same_data(
    stage: Stage, data: RunData, world: World, step: int | None, on_progress: Callable[[str], object] = lambda at: None
) -> list[str]:
    """Compare the data with those that the run or stage began with, and return lines for people. Collective.

    `step`: completed steps of a resumed run; None at a first start, which only writes data.json. With data.on_change = "accept"
    a change is written down and, unless it changes the plan, the next start compares with the new data. Otherwise raises
    `ConfigError`, on all ranks alike.
    """

    def compared() -> list[str]:
        try:
            return _write_note(stage, data, on_progress) if step is None else _compare(stage, data, step, on_progress)
        except OSError as error:
            raise ConfigError(f"{error.filename}, which the data of this run are known by: {error.strerror}") from error

    return on_main_rank(world, compared)


def is_accepted(stage: Stage, data: RunData) -> bool:
    """Tell whether changed data are accepted and keep the order that the run was planned with.

    True with data.on_change = "accept" where the planned lengths and modalities are those of data.json.
    """
    return stage.config.data.on_change == "accept" and (read_data_json(stage.folder / NAME) or {}).get("plan") == _plan(data)


def _write_note(stage: Stage, data: RunData, on_progress: Callable[[str], object]) -> list[str]:
    found = {split: data_fingerprint(dataset, on_progress) for split, dataset in data.datasets.items()}
    path = stage.folder / NAME
    with _writing(path):
        replace_text(path, dump_json({"plan": _plan(data), "splits": found}))
    return []


def data_changes(before: Json, data: RunData, on_progress: Callable[[str], object] = lambda at: None) -> list[str]:
    """Return a line for each file that differs from `before`, the content of data.json. Writes nothing."""
    splits = data.datasets.items()
    each = [line for split, found in splits for line in changed_files(before["splits"].get(split, {}), found, on_progress)]
    return list(dict.fromkeys(each))  # what several sources hold is reported once


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise `SaveError` in place of an OSError: the fault is of the run folder, not of the data."""
    try:
        yield
    except OSError as error:
        raise SaveError(f"{path}, which says what the data are, cannot be written: {error.strerror}") from error


def _compare(stage: Stage, data: RunData, step: int, on_progress: Callable[[str], object]) -> list[str]:
    path = stage.folder / NAME
    before = read_data_json(path)
    if before is None:
        state = "is damaged" if path.exists() else "is not there"
        _write_note(stage, data, on_progress)
        return [f"{path} {state}: whether the data changed up to step {step} is unknown"]
    lines = data_changes(before, data, on_progress)
    if not lines:
        return []
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    listed = "".join(f"\n  - {line}" for line in [*lines[:SHOWN], *more])
    if stage.config.data.on_change != "accept":
        raise ConfigError(
            f"{stage.run_folder}: the data of this run has changed since it began; restore it, use another output_dir, or set "
            f"data.on_change = 'accept' to go on with what there is now:{listed}"
        )
    row = {"step": step, **({"stage": stage.name} if stage.name else {}), "changes": lines}
    with _writing(stage.run_folder / CHANGES):
        append_lines(stage.run_folder / CHANGES, [row])
    if before["plan"] == _plan(data):  # otherwise this start fails, and the next one must report the change again
        _write_note(stage, data, on_progress)
    return [f"data.on_change = 'accept': from step {step} on the run goes on with other data, as {CHANGES} says:{listed}"]


def _plan(data: RunData) -> str:
    """Return a digest of what decides the order of training: planned lengths and modalities."""
    arrays = () if data.train is None else (data.train.lengths, data.train.modalities)
    return hashlib.sha256(b"".join(np.ascontiguousarray(array, dtype=np.int32).tobytes() for array in arrays)).hexdigest()


def read_data_json(path: Path) -> Json | None:
    """Read data.json; return None for a file that is missing or has another format."""
    try:
        found = json.loads(path.read_bytes())
        is_valid = isinstance(found["plan"], str) and all(
            len(row) == width and all(type(v) is kind for v, kind in zip(row, (str, int, int, str, str)))
            for split in found["splits"].values()
            for source in split.values()
            for key, width in (("files", 5), ("media", 4))
            for row in source[key]
        )
        return dict(found) if is_valid else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
