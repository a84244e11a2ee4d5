"""The best checkpoint of a run, or stage, by a value of its validations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from trainer.checkpoint.restore import restore
from trainer.checkpoint.resume import load_state
from trainer.checkpoint.retention import PREFIX, verify_together
from trainer.checkpoint.write_final import FinalRun, final_step, publish, write_final
from trainer.errors import ProofError
from trainer.scores.text_metrics import lower_is_better
from trainer.setup import PreparedRun
from trainer.state import BestState


class BestValue:
    """The best value so far of `checkpoint.best`, and the step of its checkpoint."""

    def __init__(self, key: str, state: BestState | None = None) -> None:
        """Go on from the `state` of a checkpoint, unless another value decided then."""
        self.key = key
        self.state = state if state is not None and state["key"] == key else None

    def observe(self, values: Mapping[str, float], step: int) -> bool:
        """Return whether the `values` of a validation after `step` steps of the run are better than all before them.

        A tie is no improvement: the earlier checkpoint stays. A value that is missing or not finite is none.
        """
        value = values.get(self.key, math.nan)
        if not self.key or not math.isfinite(value):
            return False
        sign = -1 if lower_is_better(self.key) else 1
        if self.state is not None and sign * value <= sign * self.state["value"]:
            return False
        self.state = {"key": self.key, "value": value, "step": step}
        return True


def write_best(prepared: PreparedRun, best: BestState, step: int) -> tuple[Path, bool]:
    """Write best/ of a stage from its best checkpoint, proven like final/; return its path and whether it was written now.

    `step`: that of final/. The live weights become those of the checkpoint. Nothing is done where best/ holds them already.
    Collective. Raises ProofError when the checkpoint is gone or damaged.
    """
    stage, world = prepared.stage, prepared.world
    target, checkpoint = stage.folder / "best", stage.run_folder / f"{PREFIX}{best['step']}"
    if world.broadcast_json(final_step(stage.folder, "best") == best["step"]):
        return target, False
    if best["step"] == step:
        publish(stage.folder / "final", target, world)
        return target, True
    if problem := verify_together(checkpoint, world):
        raise ProofError(
            f"best/ cannot be written: the checkpoint with the best {best['key']} is not sound: {problem}. final/ is written; "
            'without checkpoint.best = "..." the run ends here'
        )
    if prepared.trained is not None:
        restore(checkpoint, prepared.trained, load_state(checkpoint)["optimizer_steps"])
    run = FinalRun(prepared.data.card, prepared.data.processor, stage.folder, best["step"], "best")
    return write_final(prepared.model, run, world, alone=bool(stage.name)), True
