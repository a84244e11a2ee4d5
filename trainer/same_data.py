"""data.json: what the sources of a run or stage held when it began; a start that goes on with something else says so, and stops."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data.fingerprint import changes, fingerprint
from model.config import ConfigError
from model.files import dump_json
from trainer.disk import replace_text
from trainer.distributed import World
from trainer.exits import SaveError
from trainer.quarantine import TRAIN, VALIDATION
from trainer.sources import RunData
from trainer.stages import Place

NAME, CHANGES = "data.json", "data_changes.jsonl"
SHOWN = 8  # changes that a message names


def same_data(place: Place, data: RunData, world: World, step: int | None) -> list[str]:
    """What to tell. ConfigError, on all ranks alike, when the data of a run that goes on are others than before, unless
    data.on_change = "accept": then it is written down, and what they are now is what the next start compares with. Collective.

    `step`: completed ones of the run that goes on; None at a first start, which notes what there is.
    """
    problem, cannot_write, told = "", False, []
    if world.is_main:
        try:
            told = _noted(place, data) if step is None else _compared(place, data, step)
        except (ConfigError, SaveError) as error:
            problem, cannot_write = str(error), isinstance(error, SaveError)
        except OSError as error:
            problem = f"{error.filename}, which the data of this run are known by: {error.strerror}"
    problem, cannot_write, told = world.broadcast_json([problem, cannot_write, told])
    if problem:
        raise SaveError(problem) if cannot_write else ConfigError(problem)
    return list(told)


def is_accepted(place: Place, data: RunData) -> bool:
    """Whether records of other lengths are wished for, as many of them as before, in the order that the run was planned with."""
    return place.config.data.on_change == "accept" and (read_note(place.folder / NAME) or {}).get("plan") == _plan(data)


def _noted(place: Place, data: RunData) -> list[str]:
    found = {split: fingerprint(dataset) for split, dataset in _splits(data).items()}
    path = place.folder / NAME
    with _writing(path):
        replace_text(path, dump_json({"plan": _plan(data), "splits": found}))
    return []


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """SaveError in place of an OSError: of a run folder, not of the data."""
    try:
        yield
    except OSError as error:
        raise SaveError(f"{path}, which says what the data are, cannot be written: {error.strerror}") from error


def _compared(place: Place, data: RunData, step: int) -> list[str]:
    path = place.folder / NAME
    before = read_note(path)
    if before is None:
        state = "is damaged" if path.exists() else "is not there"
        _noted(place, data)
        return [f"{path} {state}: whether the data changed up to step {step} is unknown"]
    each = [line for split, found in _splits(data).items() for line in changes(before["splits"].get(split, {}), found)]
    lines = list(dict.fromkeys(each))  # what several sources hold is told once
    if not lines:
        return []
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    listed = "".join(f"\n  - {line}" for line in [*lines[:SHOWN], *more])
    if place.config.data.on_change != "accept":
        raise ConfigError(
            f"{place.run_folder}: the data of this run has changed since it began; restore it, use another output_dir, or set "
            f"data.on_change = 'accept' to go on with what there is now:{listed}"
        )
    row = {"step": step, **({"stage": place.name} if place.name else {}), "changes": lines}
    with _writing(place.run_folder / CHANGES), (place.run_folder / CHANGES).open("a") as out:
        out.write(json.dumps(row) + "\n")
    if before["plan"] == _plan(data):  # else the start ends, and is to say so again
        _noted(place, data)
    return [f"data.on_change = 'accept': from step {step} on the run goes on with other data, as {CHANGES} says:{listed}"]


def _splits(data: RunData) -> dict[str, Any]:
    splits = {TRAIN: data.train, VALIDATION: data.validation}
    return {split: dataset for split, dataset in splits.items() if dataset is not None}


def _plan(data: RunData) -> str:
    """Digest of what decides the order of training: planned lengths and modalities."""
    arrays = () if data.train is None else (data.train.lengths, data.train.modalities)
    return hashlib.sha256(b"".join(np.ascontiguousarray(array, dtype=np.int32).tobytes() for array in arrays)).hexdigest()


def read_note(path: Path) -> dict[str, Any] | None:
    """None for a file that is not there, or is none of ours."""
    try:
        found = json.loads(path.read_bytes())
        sound = isinstance(found["plan"], str) and all(
            len(row) == width and all(type(v) is kind for v, kind in zip(row, (str, int, int, str, str)))
            for split in found["splits"].values()
            for source in split.values()
            for key, width in (("files", 5), ("media", 4))
            for row in source[key]
        )
        return dict(found) if sound else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
