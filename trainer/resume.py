"""Where a start begins: at step 0, or at a checkpoint of the same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from model.card import ModelCard, read_card
from model.config import ConfigError
from model.manifest import UnsoundCheckpoint, verify
from trainer.checkpoint import STATE
from trainer.config import RunConfig
from trainer.distributed import World
from trainer.exits import ProofError
from trainer.export import final_step
from trainer.retention import checkpoints, newest_sound, step_of
from trainer.schema import to_tables
from trainer.sources import RunData
from trainer.stages import Place, resume_place
from trainer.tables import stage_tables

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
    "data.on_bad_sample",
    "train.max_steps",
    "train.epochs",
    "model.cache_dir",
)
LENGTH = ("train.max_steps", "train.epochs")


def choose(config: RunConfig, world: World) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from and what to tell about damaged ones. Rank 0 looks, all obey. Collective."""
    answer: dict[str, Any] = {"path": None, "damaged": [], "error": None}
    if world.is_main:
        try:
            path, damaged = _choose(config)
            answer |= {"path": str(path) if path else None, "damaged": damaged}
        except (ConfigError, ProofError) as error:
            answer["error"] = [type(error).__name__, str(error)]
    answer = world.broadcast_json(answer)
    if answer["error"]:
        name, text = answer["error"]
        raise ConfigError(text) if name == "ConfigError" else ProofError(text)
    return Path(answer["path"]) if answer["path"] else None, answer["damaged"]


def _choose(config: RunConfig) -> tuple[Path | None, list[str]]:
    folder, resume = Path(config.output_dir), config.checkpoint.resume
    if resume == "auto":
        return newest_sound(folder)
    if resume == "none":
        if found := checkpoints(folder):
            raise ConfigError(
                f"checkpoint.resume = 'none', but {folder} holds {found[-1].name}: use another output_dir, or resume = 'auto'"
            )
        return None, []
    path = Path(resume)
    if not path.is_dir():
        raise ConfigError(f"checkpoint.resume = {resume!r}: no such folder")
    try:
        verify(path)
    except UnsoundCheckpoint as error:
        raise ProofError(f"checkpoint.resume = {resume!r} is damaged: {error}") from error
    return path, []


def run_state(place: Place, lengths: str) -> dict[str, Any]:
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


def read_state(path: Path, root: RunConfig, finished: Collection[str] = ()) -> dict[str, Any]:
    """The state of a checkpoint; ConfigError with every difference when it is of another run.

    `finished`: stages whose length is settled.
    """
    state = json.loads((path / STATE).read_text())
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


def left_of(checkpoint: Path, places: list[Place], world: World) -> tuple[list[Place], dict[str, Any] | None]:
    """Stages that a run resumed from `checkpoint` has still to do, and the state in which the first of them goes on. Collective."""
    # Its files were verified when it was chosen.
    place = resume_place(places, json.loads((checkpoint / STATE).read_text()))
    step, after = step_of(checkpoint), places[place.number :]
    # A stage is over when its final/ is proven; the last one is asked again, as it may have been made longer.
    over = bool(after) and bool(world.broadcast_json(final_step(place.folder) == step))
    state = read_state(checkpoint, place.root, [earlier.name for earlier in places[: place.number - (not over)]])
    return ([replace(after[0], first_step=step), *after[1:]], None) if over else ([place, *after], state)


def check_state(path: Path, state: dict[str, Any], data: RunData) -> None:
    """ConfigError when the data or the model of the stage that goes on have changed since the checkpoint."""
    if state["lengths"] != digest_of(data):
        raise ConfigError(f"{path}: the data of this run has changed since (number or lengths of records): use another output_dir")
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


def flat(tables: Any, path: str = "") -> dict[str, Any]:
    """Nested tables as one level of dotted keys."""
    if (isinstance(tables, dict) and tables) or (isinstance(tables, list) and any(isinstance(item, dict) for item in tables)):
        items = tables.items() if isinstance(tables, dict) else enumerate(tables)
        return {k: v for key, value in items for k, v in flat(value, f"{path}.{key}" if path else str(key)).items()}
    return {path: tables}
