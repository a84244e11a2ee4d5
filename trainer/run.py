"""The table of contents of a run: data, model, resume, plan, loop, final, in this order, each proven before the next."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from model.errors import ConfigError
from trainer import errors
from trainer.checkpoint.restore import restore
from trainer.checkpoint.resume import check_state, find_resume_point, remaining_stages
from trainer.checkpoint.retention import set_aside, step_of
from trainer.checkpoint.write_final import final_step, publish, write_final
from trainer.config import RunConfig
from trainer.distributed.world import World
from trainer.faults import exit_report, signals
from trainer.faults.requests import STOP
from trainer.loop import Loop
from trainer.machine.atomic_files import make_folder, replace_text
from trainer.machine.open_files import check_limit
from trainer.memory.rehearsal import rehearse
from trainer.records.later_stages import check_later_stages
from trainer.records.quarantine import NAME as QUARANTINE
from trainer.records.quarantine import drop_old_rows, read_rows
from trainer.records.quick_check import quick_check
from trainer.records.run_data import certify_all, open_data, with_base_digests
from trainer.records.same_data import is_accepted, same_data
from trainer.report import describe_run
from trainer.runfile.schema import to_tables
from trainer.runfile.stages import Stage, check_stages, describe_stages, list_stages
from trainer.runfile.toml_files import to_toml
from trainer.setup import PreparedRun, build_run, make_deterministic, resolve_config
from trainer.state import CheckpointState


def train(root: RunConfig, world: World, progress: exit_report.RunStatus) -> None:
    """Train every stage that is left of a run, one after the other; most runs are one stage. Collective."""
    check_limit(root.data)  # before a file that cannot be opened is taken for one that is not there
    make_deterministic(root)
    checkpoint, damaged = find_resume_point(root, world)
    places = [replace(place, config=resolve_config(place.config, world)) for place in list_stages(root)]
    check_stages(places)
    for line in (*describe_stages(places), *signals.launcher_lines(root.faults.grace_seconds)):
        say(world, line)
    state = None
    if checkpoint:
        places, state = remaining_stages(checkpoint, places, world)
    progress.watch.mark("index")
    for line in check_later_stages(root, places[1:], world):
        say(world, line)
    first_step = places[0].first_step
    for place in places:
        start = ResumePoint(checkpoint, state, damaged)
        first_step = train_stage(replace(place, first_step=first_step), start, world, progress)
        progress.steering.heeded = False
        if not place.is_last and progress.steering.take_between(STOP, world):
            raise errors.StopRequested(f"stopped on request after {place}, whose final/ is written; the same command goes on")
        checkpoint, state, damaged = None, None, []


@dataclass(frozen=True)
class ResumePoint:
    """State that a stage begins with."""

    checkpoint: Path | None
    state: CheckpointState | None  # of the checkpoint; None when the stage begins at its first step
    damaged: list[str]  # lines about checkpoints that were moved aside


def train_stage(place: Stage, start: ResumePoint, world: World, progress: exit_report.RunStatus) -> int:
    """Open data, build the model, resume, print the plan, train and write final/. Return the run's completed steps. Collective."""
    config, checkpoint, state = place.config, start.checkpoint if start.state else None, start.state
    if world.is_main:
        make_folder(place.folder)
        if not state:
            drop_old_rows(place.run_folder, [stage.name for stage in place.root.stage[: place.number - 1]])
    watch = progress.watch
    watch.mark("index")
    data = with_base_digests(open_data(config, world, first_start=state is None, place=place, alive=watch.alive), world)
    watch.mark("certify")
    certificates = certify_all(data, config, watch.alive)
    check_limit(config.data)
    watch.mark("check")
    for line in quick_check(data, config, world, watch.alive):
        say(world, f"data      {line}")
    for line in same_data(place, data, world, state["step"] if state else None):
        say(world, f"data      {line}")
    if checkpoint and state:
        check_state(checkpoint, state, data, is_accepted(place, data))
        if config.train.max_steps == 0:
            raise ConfigError(
                f"train.max_steps = 0 builds a model without training, but {config.output_dir} holds {checkpoint.name}: use "
                "another output_dir; tools load and export from a checkpoint as from final/"
            )
    watch.mark("load")
    setup = build_run(place, data, world, watch.alive)
    first_step = state["step"] - place.first_step if state else 0
    progress.step = place.first_step + first_step
    if checkpoint and state and setup.trained:
        watch.mark("restore")
        restore(checkpoint, setup.trained, state["optimizer_steps"], watch.alive)
    if world.is_main:
        if start.checkpoint and config.checkpoint.resume not in ("auto", "none"):
            start.damaged.extend(set_aside(place.run_folder, step_of(start.checkpoint)))
        replace_text(Path(config.output_dir, "run.toml"), to_toml(to_tables(place.root)))
        print(describe_run(setup, certificates, checkpoint, start.damaged), flush=True)
    if setup.trained and first_step < setup.total_steps:
        watch.at("heaviest", place.first_step + first_step)
        say(world, rehearse(setup, first_step))
        Loop(setup, first_step, state["meter"] if state else None, progress).run()
    watch.mark("final")
    return finish(setup, first_step, world)


def finish(setup: PreparedRun, first_step: int, world: World) -> int:
    """Write final/, unless an earlier start of this run has and nothing was trained since. Returns the run's completed steps."""
    place = setup.place
    step = place.first_step + max(first_step, setup.total_steps)
    finished = first_step > 0 and first_step >= setup.total_steps and final_step(place.folder) == step
    if world.broadcast_json(finished):
        say(world, f"nothing left to do: {place.folder / 'final'} holds step {step}, the run asks for {setup.total_steps}")
    else:
        target = write_final(setup.model, setup.data.card, setup.data.processor, place.folder, step, world, bool(place.name))
        if num_left_out := len(read_rows(place.run_folder, place.name)):
            say(world, f"{num_left_out} records could not be used: {place.run_folder / QUARANTINE} says why")
        say(world, f"wrote and proved {target}")
    if place.name and place.is_last:
        publish(place.folder / "final", place.run_folder / "final", world)
        say(world, f"it is {place.run_folder / 'final'} as well")
    return step


def say(world: World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)
