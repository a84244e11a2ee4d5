"""Choice of the start point of a run: step 0, or a checkpoint of the same run."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import cast

from data.check.measured_lengths import FROZEN
from model.card import ModelCard, read_card
from model.errors import ConfigError
from trainer.checkpoint.retention import STATE, checkpoints, newest_sound, step_of, verify_together
from trainer.checkpoint.write_final import final_step
from trainer.config import RunConfig
from trainer.distributed.main_rank import on_main_rank
from trainer.distributed.world import World
from trainer.errors import ProofError, SaveError
from trainer.machine.atomic_files import clean_leftovers
from trainer.records.run_data import RunData
from trainer.runfile.merge_tables import stage_tables
from trainer.runfile.schema import flatten_tables, to_tables
from trainer.runfile.stages import Stage, stage_of_checkpoint
from trainer.state import CheckpointState
from trainer.trackers.open_trackers import Trackers

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
DEFAULTS = flatten_tables({f.name: to_tables(f.default_factory()) for f in fields(RunConfig) if f.default_factory is not MISSING})
"""Settings that have a default, by dotted key."""


@dataclass(frozen=True)
class StageStart:
    """Beginning of a stage."""

    checkpoint: Path | None = None  # the newest one of the run, which may be of the stage before
    state: CheckpointState | None = None  # of the checkpoint; None when the stage begins at its first step
    notes: Sequence[str] = ()  # lines about checkpoints that were moved aside or removed
    trackers: Trackers = field(default_factory=Trackers)


def find_resume_point(config: RunConfig, world: World) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to resume from, or None, and lines about unfinished or damaged files. Collective.

    Rank 0 lists names, all ranks read the files. Unfinished files of an earlier start are removed first. Raises ConfigError or
    ProofError when checkpoint.resume cannot be followed.
    """
    folder, resume = Path(config.output_dir), config.checkpoint.resume
    notes = _clean(folder, world)
    if resume == "auto":
        path, damaged = newest_sound(folder, world)
        return path, notes + damaged

    def check_there() -> None:
        if resume != "none" and not Path(resume).is_dir():
            raise ConfigError(f"checkpoint.resume = {resume!r}: no such folder")
        if resume == "none" and (found := checkpoints(folder)):
            text = f"'none', but {folder} holds {found[-1].name}: use another output_dir, or resume = 'auto'"
            raise ConfigError(f"checkpoint.resume = {text}")

    on_main_rank(world, check_there)
    if resume == "none":
        return None, notes
    if problem := verify_together(Path(resume), world):
        raise ProofError(f"checkpoint.resume = {resume!r} is damaged: {problem}")
    return Path(resume), notes


def _clean(folder: Path, world: World) -> list[str]:
    """Remove unfinished files on rank 0; return on every rank what was removed. Collective.

    Raises SaveError when one cannot be removed.
    """

    def cleaned() -> list[str]:
        try:
            return clean_leftovers(folder)
        except OSError as error:
            raise SaveError(
                f"what an earlier start left in {folder} cannot be removed: {error.strerror}: {error.filename}"
            ) from error

    return on_main_rank(world, cleaned)


def load_state(path: Path) -> CheckpointState:
    """Read the state file of a checkpoint. Raises ProofError when it is not what this trainer writes."""
    try:
        state = json.loads((path / STATE).read_bytes())
        parts = {"config": dict, "lengths": str, "meter": dict, "optimizer_steps": dict, "step": int}
        if wrong := [key for key, kind in parts.items() if not isinstance(state[key], kind)]:
            raise ProofError(
                f"{path / STATE}: {wrong[0]} is a {type(state[wrong[0]]).__name__}; it is no checkpoint of this trainer"
            )
        return cast(CheckpointState, state)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProofError(f"{path / STATE} is not what this trainer writes ({type(error).__name__}: {str(error)[:200]})") from error


def read_state(path: Path, root: RunConfig, finished: Collection[str] = ()) -> CheckpointState:
    """Read the state of a checkpoint of this run. `finished`: stages whose length may not change any more.

    Raises ConfigError with every difference when its settings are those of another run.
    """
    state = load_state(path)
    before, now = (stage_tables(tables) for tables in (state["config"], to_tables(root)))
    lines = []
    for name in dict.fromkeys([*before, *now]):
        old, new = flatten_tables(before.get(name, {})), flatten_tables(now.get(name, {}))
        for key in sorted({*old, *new}):
            # A setting that is younger than the checkpoint had its default's effect.
            if old.get(key, DEFAULTS.get(key)) != new.get(key) and (
                (name in finished and key in LENGTH) or not key.startswith(MAY_CHANGE)
            ):
                where = f"stage {name}: " if name else ""
                lines.append(f"{where}{key}: {old.get(key)!r} in the checkpoint, {new.get(key)!r} now")
    if lines:
        differences = "".join(f"\n  - {line}" for line in lines)
        raise ConfigError(
            f"{path} is of a run with other settings:{differences}\nUse those of the checkpoint to go on with it, or start from "
            f"its weights with the new ones: output_dir=ANOTHER_FOLDER model.init_from={path}"
        )
    return state


def remaining_stages(checkpoint: Path, stages: list[Stage], world: World) -> tuple[list[Stage], CheckpointState | None]:
    """Return the stages still to do of a run resumed from `checkpoint`, and the state to resume the first of them from. Collective.

    The state is None when that stage has not begun.
    """
    stage = stage_of_checkpoint(stages, load_state(checkpoint))
    step, after = step_of(checkpoint), stages[stage.number :]
    # A stage is over when its final/ is proven; the last stage always continues, as its length may have been raised.
    over = bool(after) and bool(world.broadcast_json(final_step(stage.folder) == step))
    state = read_state(checkpoint, stage.root, [earlier.name for earlier in stages[: stage.number - (not over)]])
    return ([replace(after[0], first_step=step), *after[1:]], None) if over else ([stage, *after], state)


def check_state(path: Path, state: CheckpointState, data: RunData, accepted: bool = False) -> None:
    """Check that data and model of the resumed stage are those of the checkpoint. Raises ConfigError when they changed since.

    `accepted`: the user accepts other lengths of the same number of records.
    """
    if state["lengths"] != data.digest and not accepted:
        raise ConfigError(
            f"{path}: the data of this run has changed since (number or lengths of records), or {FROZEN}, which it is "
            "planned by, was lost: restore it, or use another output_dir"
        )
    check_same_model(path, data.card)


def check_same_model(path: Path, card: ModelCard) -> None:
    """Check that what the configuration names by path is unchanged: bases, tokenizer, image preparation, the run it came from.

    Raises ConfigError with the first difference.
    """
    saved = read_card(path)
    for key in ("bases", "hugging_face", "tokens", "vocabulary", "stop_ids", "specs"):
        if getattr(saved, key) != getattr(card, key):
            raise ConfigError(
                f"{path}: {key} of the model changed since ({getattr(saved, key)} in the checkpoint, {getattr(card, key)} now): "
                "restore the files that model.*.path and model.init_from name, or use another output_dir"
            )


def check_trains(config: RunConfig, checkpoint: Path) -> None:
    """Refuse to build a model without training where there is a checkpoint. Raises `ConfigError`."""
    if config.train.max_steps == 0:
        raise ConfigError(
            f"train.max_steps = 0 builds a model without training, but {config.output_dir} holds {checkpoint.name}: use "
            "another output_dir; tools load and export from a checkpoint as from final/"
        )
