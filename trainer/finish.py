"""Results of a run, or stage: final/, best/, and the same below the run folder once the last stage is over."""

from __future__ import annotations

from trainer.checkpoint.write_final import FinalRun, final_step, publish, write_final
from trainer.distributed.main_rank import say
from trainer.records.quarantine import NAME as QUARANTINE
from trainer.records.quarantine import read_rows
from trainer.scores.best import write_best
from trainer.setup import PreparedRun
from trainer.state import BestState


def finish(prepared: PreparedRun, first_step: int, best: BestState | None) -> int:
    """Write final/, and best/ where there is a `best` validation, unless an earlier start of this run has and nothing was trained
    since. Returns the run's completed steps. Collective.
    """
    stage, world = prepared.stage, prepared.world
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
