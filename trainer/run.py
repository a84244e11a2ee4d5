"""The order of a run: resume point, data, model, printed plan, loop, final. Each part is checked before the next begins."""

from __future__ import annotations

from dataclasses import replace

from trainer.checkpoint.restore import restore, restore_loss_scale
from trainer.checkpoint.resume import StageStart, check_state, check_trains, find_resume_point, load_state, remaining_stages
from trainer.checkpoint.retention import set_aside, step_of
from trainer.config import RunConfig
from trainer.distributed.main_rank import say
from trainer.distributed.world import World
from trainer.errors import StopRequested
from trainer.faults.exit_report import RunStatus
from trainer.faults.phase_tracker import PhaseTracker
from trainer.faults.requests import STOP
from trainer.finish import finish
from trainer.loop import Loop
from trainer.machine.atomic_files import make_folder
from trainer.machine.open_files import check_limit
from trainer.memory.chosen_at_start import settle_recomputation
from trainer.memory.rehearsal import rehearse
from trainer.preference.reference import prepare_reference
from trainer.records.later_stages import check_later_stages
from trainer.records.quarantine import drop_old_rows
from trainer.records.run_data import RunData, certify_all, open_data, with_base_digests
from trainer.records.same_data import is_accepted, same_data
from trainer.report import write_plan
from trainer.runfile.stages import Stage
from trainer.scores.best import BestValue
from trainer.setup import build_beside_check, resolve_stages, set_arithmetic
from trainer.trackers.open_trackers import tracked


def train(root: RunConfig, world: World, status: RunStatus) -> None:
    """Train every stage that is left of a run, one after the other; most runs are one stage. Collective."""
    check_limit(root.data)  # first: too few file handles would otherwise look like a missing file
    set_arithmetic(root)
    checkpoint, notes = find_resume_point(root, world)
    stages, state = resolve_stages(root, world), None
    if checkpoint:
        stages, state = remaining_stages(checkpoint, stages, world)
    status.tracker.mark("index")
    for line in check_later_stages(root, stages[1:], world, status.tracker.report_progress):
        say(world, line)
    saved = load_state(checkpoint).get("trackers") if checkpoint else None
    with tracked(root, world, step_of(checkpoint) if checkpoint else 0, saved) as trackers:
        if trackers.text:
            say(world, f"tracked   {trackers.text}")
        start, step = StageStart(checkpoint, state, notes, trackers), stages[0].first_step
        for stage in stages:
            step = train_stage(replace(stage, first_step=step), start, world, status)
            status.requests.accepting = False
            if not stage.is_last and status.requests.consume_between_stages(STOP, world):
                raise StopRequested(f"stopped on request after {stage}, whose final/ is written; the same command goes on")
            start = StageStart(trackers=trackers)


def train_stage(stage: Stage, start: StageStart, world: World, status: RunStatus) -> int:
    """Open data, build the model, resume, print the plan, train and write final/. Return the run's completed steps. Collective."""
    tracker, state = status.tracker, start.state
    data, changes = read_data(stage, start, world, tracker)
    stage, chosen = settle_recomputation(stage, data, world, state)
    if chosen:
        say(world, f"memory    {chosen}")
    prepared, lines = build_beside_check(stage, data, world, tracker)
    tracker.mark("reference")
    lines += [f"reference {line}" for line in prepare_reference(prepared, tracker)]
    say(world, *lines, *changes)
    first_step = state["step"] - stage.first_step if state else 0
    status.step = stage.first_step + first_step
    if start.checkpoint and state and prepared.trained:
        tracker.mark("restore")
        restore(start.checkpoint, prepared.trained, state["optimizer_steps"], tracker.report_progress)
        restore_loss_scale(start.checkpoint, prepared.trained, state)
    if world.is_main:
        if start.checkpoint and stage.config.checkpoint.resume not in ("auto", "none"):
            # Checkpoints beyond the one that the user named would be mistaken for this run's.
            moved = set_aside(stage.run_folder, step_of(start.checkpoint))
            start = replace(start, notes=[*start.notes, *moved])
        write_plan(prepared, start, first_step, chosen)
    best = BestValue(stage.config.checkpoint.best, state.get("best") if state else None)
    if prepared.trained and first_step < prepared.total_steps:
        tracker.begin("heaviest", status.step)
        say(world, rehearse(prepared, first_step))
        Loop(prepared, first_step, start, best, status).run()
    tracker.mark("final")
    return finish(prepared, first_step, best.state)


def read_data(stage: Stage, start: StageStart, world: World, tracker: PhaseTracker) -> tuple[RunData, list[str]]:
    """Open the data of a stage, prove them, and compare them with those of the checkpoint. Collective.

    Returns also lines for people about what has changed.
    """
    config, state = stage.config, start.state
    if world.is_main:
        make_folder(stage.folder)
        if not state:
            drop_old_rows(stage.run_folder, [earlier.name for earlier in stage.root.stage[: stage.number - 1]])
    tracker.mark("index")
    data = open_data(config, world, first_start=state is None, stage=stage, on_progress=tracker.report_progress)
    data = with_base_digests(data, world)
    tracker.mark("certify")
    data = replace(data, certificates=certify_all(data, config, tracker.report_progress))
    check_limit(config.data)
    tracker.mark("check")
    changes = same_data(stage, data, world, state["step"] if state else None, tracker.report_progress)
    if start.checkpoint and state:
        check_state(start.checkpoint, state, data, is_accepted(stage, data))
        check_trains(config, start.checkpoint)
    return data, [f"data      {line}" for line in changes]
