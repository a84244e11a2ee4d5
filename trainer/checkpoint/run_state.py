"""State of a run that a checkpoint holds beside tensors: collected for a save, and the sums of preferences put back."""

from __future__ import annotations

from collections.abc import Mapping

from model.preference.shift import RewardShift, ShiftState
from trainer.distributed.world import World
from trainer.runfile.schema import to_tables
from trainer.setup import PreparedRun
from trainer.state import BestState, CheckpointState, MeterState, RewardState


def run_state(prepared: PreparedRun, meter: MeterState, best: BestState | None, trackers: Mapping[str, str]) -> CheckpointState:
    """Return all that a checkpoint records: enough to resume in the right stage to the bit, and to refuse another run.

    `trackers`: ids of the run there. Collective, host sync.
    """
    stage, chosen = prepared.stage, prepared.config.parallel.activation_checkpointing
    state: CheckpointState = {"config": to_tables(stage.root), "lengths": prepared.data.digest, "num_ranks": prepared.world.size}
    state |= {"activation_checkpointing": chosen, "meter": meter}
    if stage.name:
        state |= {"stage": stage.name, "first_step": stage.first_step}
    if prepared.trained and prepared.trained.loss_scale:
        state["loss_scale"] = prepared.trained.loss_scale.state()
    if (tuning := prepared.model.preference) is not None and tuning.shift.is_used:
        state["rewards"] = shift_state(tuning.shift, prepared.world)
    if best is not None:
        state["best"] = best
    if trackers:
        state["trackers"] = dict(trackers)
    return state


def shift_state(shift: RewardShift, world: World) -> RewardState:
    """Return the sums over all steps and ranks. Collective, host sync."""
    known, added = shift.sums()
    total, count = (known.to(world.device) + world.sum(added.to(world.device).clone()).double()).tolist()
    return {"total": total, "count": count}


def restore_shift(shift: RewardShift, state: CheckpointState | None) -> None:
    """Go on with the sums of a checkpoint, or begin with none."""
    found = (state or {}).get("rewards") or {"total": 0.0, "count": 0.0}
    shift.restore(ShiftState(found["total"], found["count"]))
