"""The order of a run: resume point, data, model, printed plan, loop, final. Each part is checked before the next begins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from model.errors import ConfigError
from trainer import errors
from trainer.checkpoint.restore import restore, restore_loss_scale
from trainer.checkpoint.resume import check_state, find_resume_point, load_state, remaining_stages
from trainer.checkpoint.retention import set_aside, step_of
from trainer.checkpoint.write_final import FinalRun, final_step, publish, write_final
from trainer.config import RunConfig
from trainer.distributed.compile_environment import prepare_compiling
from trainer.distributed.world import World
from trainer.faults import exit_report, signals
from trainer.faults.phase_tracker import PhaseTracker
from trainer.faults.requests import STOP
from trainer.loop import Loop, LoopStart
from trainer.machine.atomic_files import make_folder, replace_text
from trainer.machine.open_files import check_limit
from trainer.memory.chosen_at_start import settle_recomputation
from trainer.memory.rehearsal import rehearse
from trainer.preference.reference import prepare_reference
from trainer.records.hub_look_ups import share_look_ups
from trainer.records.later_stages import check_later_stages
from trainer.records.look_beside import looking_beside
from trainer.records.quarantine import NAME as QUARANTINE
from trainer.records.quarantine import drop_old_rows, read_rows
from trainer.records.run_data import RunData, certify_all, open_data, with_base_digests
from trainer.records.same_data import is_accepted, same_data
from trainer.report import describe_run
from trainer.runfile.schema import to_tables
from trainer.runfile.stages import Stage, check_stages, describe_stages, list_stages
from trainer.runfile.toml_files import to_toml
from trainer.scores.best import BestValue, write_best
from trainer.scores.text_metrics import check_metrics
from trainer.setup import PreparedRun, build_run, resolve_config, set_arithmetic
from trainer.start_note import write_start
from trainer.state import BestState, CheckpointState
from trainer.trackers.open_trackers import Trackers, tracked


def train(root: RunConfig, world: World, status: exit_report.RunStatus) -> None:
    """Train every stage that is left of a run, one after the other; most runs are one stage. Collective."""
    check_limit(root.data)  # first: too few file handles would otherwise look like a missing file
    set_arithmetic(root)
    checkpoint, notes = find_resume_point(root, world)
    stages = [replace(stage, config=resolve_config(stage.config, world)) for stage in list_stages(root)]
    check_stages(stages)
    for stage in stages:
        check_metrics(stage.config.validation.metrics, "validation.metrics")
    share_look_ups((stage.config for stage in stages), world)
    for line in (*describe_stages(stages), *signals.launcher_lines(root.faults.grace_seconds)):
        say(world, line)
    for line in dict.fromkeys(prepare_compiling(stage.config.parallel, world.device) for stage in stages):
        if line:
            say(world, f"compile   {line}")
    state = None
    if checkpoint:
        stages, state = remaining_stages(checkpoint, stages, world)
    status.tracker.mark("index")
    for line in check_later_stages(root, stages[1:], world, status.tracker.report_progress):
        say(world, line)
    saved = load_state(checkpoint).get("trackers") if checkpoint else None
    with tracked(root, world, step_of(checkpoint) if checkpoint else 0, saved) as trackers:
        train_stages(stages, ResumePoint(checkpoint, state, notes, trackers), world, status)


def train_stages(stages: list[Stage], start: ResumePoint, world: World, status: exit_report.RunStatus) -> None:
    """Train `stages`, the first of them from `start`. Collective."""
    if start.trackers.text:
        say(world, f"tracked   {start.trackers.text}")
    first_step = stages[0].first_step
    for stage in stages:
        first_step = train_stage(replace(stage, first_step=first_step), start, world, status)
        status.requests.accepting = False
        if not stage.is_last and status.requests.consume_between_stages(STOP, world):
            raise errors.StopRequested(f"stopped on request after {stage}, whose final/ is written; the same command goes on")
        start = ResumePoint(None, None, [], start.trackers)


@dataclass(frozen=True)
class ResumePoint:
    """State that a stage begins with."""

    checkpoint: Path | None
    state: CheckpointState | None  # of the checkpoint; None when the stage begins at its first step
    notes: list[str]  # lines about checkpoints that were moved aside or removed
    trackers: Trackers


def train_stage(stage: Stage, start: ResumePoint, world: World, status: exit_report.RunStatus) -> int:
    """Open data, build the model, resume, print the plan, train and write final/. Return the run's completed steps. Collective."""
    config, checkpoint, state = stage.config, start.checkpoint if start.state else None, start.state
    if world.is_main:
        make_folder(stage.folder)
        if not state:
            drop_old_rows(stage.run_folder, [earlier.name for earlier in stage.root.stage[: stage.number - 1]])
    tracker = status.tracker
    tracker.mark("index")
    data = with_base_digests(
        open_data(config, world, first_start=state is None, stage=stage, on_progress=tracker.report_progress), world
    )
    tracker.mark("certify")
    certificates = certify_all(data, config, tracker.report_progress)
    check_limit(config.data)
    tracker.mark("check")
    changes = same_data(stage, data, world, state["step"] if state else None, tracker.report_progress)
    if checkpoint and state:
        check_state(checkpoint, state, data, is_accepted(stage, data))
        check_trains(config, checkpoint)
    stage, chosen = settle_recomputation(stage, data, world, state)
    if chosen:
        say(world, f"memory    {chosen}")
    prepared, found = build_and_look(stage, data, world, tracker)
    for line in (*found, *(f"data      {line}" for line in changes)):
        say(world, line)
    first_step = state["step"] - stage.first_step if state else 0
    status.step = stage.first_step + first_step
    if checkpoint and state and prepared.trained:
        tracker.mark("restore")
        restore(checkpoint, prepared.trained, state["optimizer_steps"], tracker.report_progress)
        restore_loss_scale(checkpoint, prepared.trained, state)
    if world.is_main:
        if start.checkpoint and config.checkpoint.resume not in ("auto", "none"):
            start.notes.extend(set_aside(stage.run_folder, step_of(start.checkpoint)))
        plan = describe_run(prepared, certificates, checkpoint, start.notes)
        write_settings(stage, chosen)
        write_start(prepared, first_step, plan)
        print(plan, flush=True)
    best = BestValue(config.checkpoint.best, state.get("best") if state else None)
    if prepared.trained and first_step < prepared.total_steps:
        tracker.begin("heaviest", stage.first_step + first_step)
        say(world, rehearse(prepared, first_step))
        loop = Loop(prepared, first_step, LoopStart(state, start.trackers), status)
        loop.run()
        best = loop.best
    tracker.mark("final")
    return finish(prepared, first_step, world, best.state)


def check_trains(config: RunConfig, checkpoint: Path) -> None:
    """Refuse to build a model without training where there is a checkpoint. Raises `ConfigError`."""
    if config.train.max_steps == 0:
        raise ConfigError(
            f"train.max_steps = 0 builds a model without training, but {config.output_dir} holds {checkpoint.name}: use "
            "another output_dir; tools load and export from a checkpoint as from final/"
        )


def write_settings(stage: Stage, chosen: str) -> None:
    """Write run.toml of the whole run, with what was `chosen` at the start as a comment."""
    text = to_toml(to_tables(stage.root)) + (f"# {chosen}\n" if chosen else "")
    replace_text(Path(stage.config.output_dir, "run.toml"), text)


def build_and_look(stage: Stage, data: RunData, world: World, tracker: PhaseTracker) -> tuple[PreparedRun, list[str]]:
    """Build and load the model while rank 0 looks at the data, then find its reference; return it and lines for people. Collective.

    What is wrong with the data is told first, whichever of the two is found first.
    """
    tracker.mark("load")
    with looking_beside(data, stage.config, world) as beside:

        def progress(at: str) -> None:
            tracker.report_progress(at)
            beside.stop_early()

        try:
            prepared = build_run(stage, data, world, progress)
        except ConfigError:
            beside.precede()
            raise
        tracker.mark("check")
        lines = [f"data      {line}" for line in beside.finish(tracker.report_progress)]
    tracker.mark("reference")
    return prepared, [*lines, *(f"reference {line}" for line in prepare_reference(prepared, tracker))]


def finish(prepared: PreparedRun, first_step: int, world: World, best: BestState | None = None) -> int:
    """Write final/, and best/ where there is a `best` validation, unless an earlier start of this run has and nothing was trained
    since. Returns the run's completed steps.
    """
    stage = prepared.stage
    step = stage.first_step + max(first_step, prepared.total_steps)
    finished = first_step > 0 and first_step >= prepared.total_steps and final_step(stage.folder) == step
    if world.broadcast_json(finished):
        say(world, f"nothing left to do: {stage.folder / 'final'} holds step {step} already")
    else:
        final = FinalRun(prepared.data.card, prepared.data.processor, stage.folder, step)
        target = write_final(prepared.model, final, world, alone=bool(stage.name))
        if num_left_out := len(read_rows(stage.run_folder, stage.name)):
            say(world, f"{num_left_out} records could not be used: {stage.run_folder / QUARANTINE} says why")
        say(world, f"wrote and proved {target}")
    names = ["final"]
    if best is not None:
        target, is_new = write_best(prepared, best, step)
        names.append("best")
        if is_new:
            say(world, f"wrote and proved {target}: step {best['step']}, {best['key']} = {best['value']:.4g}")
    if stage.name and stage.is_last:
        for name in names:
            publish(stage.folder / name, stage.run_folder / name, world)
            say(world, f"it is {stage.run_folder / name} as well")
    return step


def say(world: World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)
