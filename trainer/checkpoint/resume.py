"""Where a start begins: at step 0, or at a checkpoint of the same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.check.measured_lengths import FROZEN
from model.card import ModelCard, read_card
from model.errors import ConfigError
from trainer.checkpoint.retention import STATE, checkpoints, newest_sound, step_of, verify_together
from trainer.checkpoint.write_final import final_step
from trainer.config import RunConfig
from trainer.distributed.world import World
from trainer.errors import ProofError, SaveError
from trainer.machine.atomic_files import clean_leftovers
from trainer.records.run_data import RunData
from trainer.runfile.merge_tables import stage_tables
from trainer.runfile.schema import flat, to_tables
from trainer.runfile.stages import Stage, resume_place

MAY_CHANGE = (
    "output_dir",
    "parallel.",
    "batch.micro_batch_",
    "checkpoint.",
    "log.",
    "validation.",
    "faults.",
    "data.workers",
    "data.max_bad_fraction",
    "data.max_too_long_fraction",
    "data.on_bad_sample",
    "data.on_change",
    "train.max_steps",
    "train.epochs",
    "model.cache_dir",
)
LENGTH = ("train.max_steps", "train.epochs")


def choose(config: RunConfig, world: World) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and what to tell of what was not finished or damaged. Collective.

    Rank 0 looks at names, all ranks read the files. What an earlier start left unfinished is removed first.
    """
    folder, resume = Path(config.output_dir), config.checkpoint.resume
    told = _cleaned(folder, world)
    if resume == "auto":
        path, damaged = newest_sound(folder, world)
        return path, told + damaged
    problem = ""
    if resume == "none":
        if world.is_main and (found := checkpoints(folder)):
            problem = f"'none', but {folder} holds {found[-1].name}: use another output_dir, or resume = 'auto'"
    elif world.is_main and not Path(resume).is_dir():
        problem = f"{resume!r}: no such folder"
    if problem := world.broadcast_json(problem):
        raise ConfigError(f"checkpoint.resume = {problem}")
    if resume == "none":
        return None, told
    if problem := verify_together(Path(resume), world):
        raise ProofError(f"checkpoint.resume = {resume!r} is damaged: {problem}")
    return Path(resume), told


def _cleaned(folder: Path, world: World) -> list[str]:
    """Rank 0 removes what is unfinished; on every rank what was. SaveError when it cannot. Collective."""
    problem, told = "", []
    if world.is_main:
        try:
            told = clean_leftovers(folder)
        except OSError as error:
            problem = f"what an earlier start left in {folder} cannot be removed: {error.strerror}: {error.filename}"
    problem, told = world.broadcast_json([problem, told])
    if problem:
        raise SaveError(problem)
    return list(told)


def run_state(place: Stage, lengths: str) -> dict[str, Any]:
    """What a checkpoint remembers of the run, to go on in the right stage and to refuse going on with another run.

    `lengths`: their `digest_of`.
    """
    state = {"config": to_tables(place.root), "lengths": lengths}
    return {**state, "stage": place.name, "first_step": place.first_step} if place.name else state


def digest_of(data: RunData) -> str:
    """Fingerprint of what decides the order of the data, planned lengths and modalities, and of the sizes of the records.

    The planned lengths were frozen at the first start: they alone would not notice that a file was edited since.
    """
    if data.train is None:
        return ""
    digest = hashlib.sha256()
    for array in (data.train.lengths, data.train.modalities, *(index.lengths for index in data.train.indexes)):
        digest.update(np.ascontiguousarray(array, dtype=np.int32).tobytes())
    return digest.hexdigest()


def load_state(path: Path) -> dict[str, Any]:
    """What stands in a checkpoint beside its tensors. ProofError when it is not what a run of ours writes."""
    try:
        state = json.loads((path / STATE).read_bytes())
        parts = {"config": dict, "lengths": str, "meter": dict, "optimizer_steps": dict, "step": int}
        if wrong := [key for key, kind in parts.items() if not isinstance(state[key], kind)]:
            raise ProofError(
                f"{path / STATE}: {wrong[0]} is a {type(state[wrong[0]]).__name__}; it is no checkpoint of this trainer"
            )
        return dict(state)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProofError(f"{path / STATE} is not what this trainer writes ({type(error).__name__}: {str(error)[:200]})") from error


def read_state(path: Path, root: RunConfig, finished: Collection[str] = ()) -> dict[str, Any]:
    """The state of a checkpoint; ConfigError with every difference when it is of another run.

    `finished`: stages whose length is settled.
    """
    state = load_state(path)
    before, now = (stage_tables(tables) for tables in (state["config"], to_tables(root)))
    lines = []
    for name in dict.fromkeys([*before, *now]):
        old, new = flat(before.get(name, {})), flat(now.get(name, {}))
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key) and ((name in finished and key in LENGTH) or not key.startswith(MAY_CHANGE)):
                where = f"stage {name}: " if name else ""
                lines.append(f"{where}{key}: {old.get(key)!r} in the checkpoint, {new.get(key)!r} now")
    if lines:
        told = "".join(f"\n  - {line}" for line in lines)
        raise ConfigError(f"{path} is of a run with other settings; use them, or another output_dir:{told}")
    return state


def left_of(checkpoint: Path, places: list[Stage], world: World) -> tuple[list[Stage], dict[str, Any] | None]:
    """Stages that a run resumed from `checkpoint` has still to do, and the state in which the first of them goes on. Collective."""
    place = resume_place(places, load_state(checkpoint))
    step, after = step_of(checkpoint), places[place.number :]
    # A stage is over when its final/ is proven; the last one is asked again, as it may have been made longer.
    over = bool(after) and bool(world.broadcast_json(final_step(place.folder) == step))
    state = read_state(checkpoint, place.root, [earlier.name for earlier in places[: place.number - (not over)]])
    return ([replace(after[0], first_step=step), *after[1:]], None) if over else ([place, *after], state)


def check_state(path: Path, state: dict[str, Any], data: RunData, accepted: bool = False) -> None:
    """ConfigError when the data or the model of the stage that goes on have changed since the checkpoint.

    `accepted`: other lengths of as many records are wished for.
    """
    if state["lengths"] != digest_of(data) and not accepted:
        raise ConfigError(
            f"{path}: the data of this run has changed since (number or lengths of records), or {FROZEN}, which it is "
            "planned by, was lost: restore it, or use another output_dir"
        )
    check_same_model(path, data.card)


def check_same_model(path: Path, card: ModelCard) -> None:
    """What the configuration names by path is still the same: bases, tokenizer, pictures' preparation, the run it came from."""
    saved = read_card(path)
    for key in ("bases", "hugging_face", "tokens", "vocabulary", "stop_ids", "specs"):
        if getattr(saved, key) != getattr(card, key):
            raise ConfigError(
                f"{path}: {key} of the model changed since ({getattr(saved, key)} in the checkpoint, {getattr(card, key)} now): "
                "restore the files that model.*.path and model.init_from name, or use another output_dir"
            )
