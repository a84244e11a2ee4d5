"""Overflows of float16: what is the loss scale's business, and when it can help no more."""

from __future__ import annotations

import torch

from trainer.distributed.world import World
from trainer.errors import ProofError
from trainer.health.suspects import StepTensors

LIMIT = "float16's range (65,504)"


def is_overflow(tensors: StepTensors, loss_scale: float, floor: float, world: World) -> bool:
    """Tell whether a step of `loss_scale` was skipped although the losses of all ranks are finite. Collective, host sync.

    Raises ProofError on every rank when that happened at `floor`, the smallest scale that is allowed.
    """
    if world.sum((~torch.isfinite(tensors.losses)).sum().float()).item():
        return False
    if loss_scale <= floor:
        raise ProofError(
            f"gradients leave {LIMIT} even at a loss scale of {loss_scale:g}, the smallest that is allowed (loss_scale.floor = "
            f"{floor:g}), while all losses are finite; updates with such gradients were skipped and the weights are sound. Use "
            "model.dtype = 'bfloat16' where the device computes in it, or 'float32'; or lower optim.lr"
        )
    return True


def range_hint(dtype: str) -> str:
    """Return one more reason for losses that are not finite, as the end of a message; "" where there is none."""
    return f"; or the model leaves {LIMIT}: use model.dtype = 'bfloat16' or 'float32'" if dtype == "float16" else ""
