"""A past step of a run, found and made ready to be done again: the stage, the checkpoint before it, its data. Nothing is written.

Indexes are read through links from a folder of our own, so that even a missing or stale one is never written into the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from model.errors import ConfigError
from model.files.manifest import UnsoundCheckpoint
from model.files.untrusted import Json
from trainer.checkpoint.restore import restore, restore_loss_scale
from trainer.checkpoint.resume import check_state, load_state
from trainer.checkpoint.retention import checkpoints, is_whole, step_of, verify_together
from trainer.config import RunConfig
from trainer.distributed.world import World
from trainer.errors import ProofError
from trainer.machine.json_lines import read_valid_lines
from trainer.metrics import NAME as METRICS
from trainer.records.quarantine import Quarantine
from trainer.records.run_data import RunData, open_data, with_base_digests
from trainer.records.same_data import CHANGES, data_changes, read_data_json
from trainer.records.same_data import NAME as DATA
from trainer.records.sample_log import recorded_steps
from trainer.runfile.load import load_config, parse_config
from trainer.runfile.stages import Stage, list_stages
from trainer.setup import PreparedRun, build_run, resolve_config, set_arithmetic
from trainer.state import CheckpointState


@dataclass(frozen=True)
class PastStep:
    """One step that a run has trained, and where a replay of it begins. Steps count from 1, as in metrics.jsonl."""

    number: int
    stage: Stage
    checkpoint: Path | None  # None: the beginning of the stage
    num_ranks: int | None  # of the run, as its checkpoints tell; None: unknown

    @property
    def begins(self) -> int:
        """Return the completed steps of the run where the replay begins."""
        return step_of(self.checkpoint) if self.checkpoint else self.stage.first_step


class PastRecords:
    """Records that are left out of the steps up to one of them, as `trainer.feed.Feed` asks for them. Never written."""

    def __init__(self, data: RunData, stage: Stage, last: int) -> None:
        """Read the quarantine of the run up to 0-based step `last` of the stage: what was met later was still read then."""
        self.quarantine = Quarantine(stage.run_folder, data.num_records, 1.0, stage.name)
        self.quarantine.steps = {i: met for i, met in self.quarantine.steps.items() if met <= last}

    def flush(self, done: int) -> None:
        """Do nothing: what a replay finds is not written down."""


def find_past_step(run: Path, number: int, world: World, *, from_start: bool = False) -> PastStep:
    """Find the stage of step `number` and the newest checkpoint before it. Collective.

    `from_start`: without one, begin where the stage began. Raises `ConfigError` when the step was not trained, or no checkpoint is
    left, `ProofError` when the checkpoint is damaged.
    """
    if not (run / "run.toml").is_file():
        raise ConfigError(f"{run} is no folder of a run: it has no run.toml")
    stage = _stage_of(run, number)
    own = [path for path in checkpoints(run) if _is_of(path, stage)]
    before = [path for path in own if step_of(path) < number]
    if not before and not from_start and number - 1 > stage.first_step:
        kept = ", ".join(path.name for path in own) or "none"
        raise ConfigError(
            f"--step {number}: {run} holds no checkpoint at or before step {number - 1} (there: {kept}). "
            f"--from-start does the {number - stage.first_step} steps from the beginning of the stage again"
        )
    checkpoint = before[-1] if before else None
    if checkpoint and (problem := verify_together(checkpoint, world)):
        raise ProofError(f"{checkpoint} is damaged: {problem}")
    return PastStep(number, stage, checkpoint, _num_ranks([*before[-1:], *own]))


def _stage_of(run: Path, number: int) -> Stage:
    """Return the stage that trained step `number`, with the settings that it was trained with as far as they are known."""
    there = []
    for stage in list_stages(_settings(run, number)):
        if not (stage.folder / "samples.json").is_file():
            continue
        steps = recorded_steps(stage.folder)
        if number - 1 in steps:
            return replace(stage, first_step=steps.start)
        there.append(f"{steps.start + 1} to {steps.stop}" if steps else "none")
    known = ", ".join(there) or "none"
    raise ConfigError(f"--step {number} has not been trained: {run} has steps {known} on record, counted from 1 as in {METRICS}")


def _settings(run: Path, number: int) -> RunConfig:
    """Return the settings of the start that trained step `number`: the next checkpoint holds them, else run.toml does."""
    after = next((path for path in checkpoints(run) if step_of(path) >= number and is_whole(path)), None)
    config = parse_config(load_state(after)["config"], str(after)) if after else load_config(str(run / "run.toml"))
    return replace(config, output_dir=str(run))


def _is_of(path: Path, stage: Stage) -> bool:
    """Tell whether a checkpoint is whole and was written in this stage."""
    try:
        return is_whole(path) and load_state(path).get("stage", "") == stage.name and step_of(path) > stage.first_step
    except (UnsoundCheckpoint, ProofError):
        return False


def _num_ranks(paths: list[Path]) -> int | None:
    """Return the ranks that wrote the first of some checkpoints."""
    for path in paths:
        for file in path.glob("rank-*-of-*.safetensors"):
            return int(file.stem.rpartition("-of-")[2])
    return None


@contextmanager
def prepared_step(past: PastStep, world: World) -> Iterator[tuple[PreparedRun, CheckpointState | None]]:
    """Build the run as it stood where the replay begins; yield it with the state of the checkpoint. Collective.

    Raises `ConfigError` when the data have changed since the step.
    """
    stage = replace(past.stage, config=resolve_config(past.stage.config, world))
    set_arithmetic(stage.config)
    with TemporaryDirectory(prefix="replay-") as own:
        folder = Path(world.broadcast_json(own))
        if world.is_main:
            _link_index(stage.run_folder / "index", folder / "index")
        world.barrier()
        reading = replace(stage.config, output_dir=str(folder))
        data = with_base_digests(open_data(reading, world, stage=stage), world)
        check_unchanged(past, data)
        state = load_state(past.checkpoint) if past.checkpoint else None
        if past.checkpoint and state:
            check_state(past.checkpoint, state, data)
        prepared = build_run(stage, data, world)
        if prepared.trained is None:
            raise ConfigError(f"{stage.run_folder} trains nothing: there is no step to do again")
        if past.checkpoint and state:
            restore(past.checkpoint, prepared.trained, state["optimizer_steps"])
            restore_loss_scale(past.checkpoint, prepared.trained, state)
        yield prepared, state
        world.barrier()  # the links are there until every rank is done with them


def _link_index(found: Path, place: Path) -> None:
    place.mkdir()
    for file in found.iterdir() if found.is_dir() else ():
        (place / file.name).symlink_to(file.resolve())


def check_unchanged(past: PastStep, data: RunData) -> None:
    """Raise `ConfigError` when the data are not those that the step was trained on."""
    stage = past.stage
    noted = read_data_json(stage.folder / DATA)
    if noted is None:
        raise ConfigError(f"{stage.folder / DATA} is missing or damaged: whether the data are still those of the step is unknown")
    if lines := data_changes(noted, data):
        listed = "".join(f"\n  - {line}" for line in lines[:8])
        raise ConfigError(f"the data of {stage.run_folder} have changed since: step {past.number} cannot be done again:{listed}")
    later = [row for row in read_valid_lines(stage.run_folder / CHANGES, {"step": int}) if row["step"] >= past.number]
    if later:
        raise ConfigError(
            f"the data of {stage.run_folder} were changed at step {later[0]['step']}, after step {past.number}, as {CHANGES} says: "
            "the step cannot be done again"
        )


def recorded_rows(past: PastStep) -> dict[int, Json]:
    """Return the rows of metrics.jsonl about training, by their step, of the stage of the step."""
    name = past.stage.name
    try:
        rows = read_valid_lines(past.stage.run_folder / METRICS, {"step": int})
    except OSError:
        return {}
    return {row["step"]: row for row in rows if "train/loss" in row and row.get("stage", "") == name}
