"""Sums that preference tuning carries from step to step, in a checkpoint."""

from __future__ import annotations

from model.preference.shift import RewardShift, ShiftState
from trainer.distributed.world import World
from trainer.state import CheckpointState, RewardState


def shift_state(shift: RewardShift, world: World) -> RewardState:
    """Return the sums over all steps and ranks. Collective, host sync."""
    known, added = shift.sums()
    total, count = (known.to(world.device) + world.sum(added.to(world.device).clone()).double()).tolist()
    return {"total": total, "count": count}


def restore_shift(shift: RewardShift, state: CheckpointState | None) -> None:
    """Go on with the sums of a checkpoint, or begin with none."""
    found = (state or {}).get("rewards") or {"total": 0.0, "count": 0.0}
    shift.restore(ShiftState(found["total"], found["count"]))
