"""Per-step tensors kept for one step, and functions that find what is behind a bad loss: samples, gradients, or an overflow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import Batch
from trainer.distributed.world import World
from trainer.errors import ProofError

LIMIT = "float16's range (65,504)"
NUM_SUSPECTS = 4
"""Samples of highest loss that each rank names for a spike."""


@dataclass(frozen=True)
class StepTensors:
    """Small tensors of a step, kept on the device until its numbers are read."""

    step: int  # 0-based, of the stage
    batches: list[Batch]  # without media
    addends: list[Tensor]
    losses: Tensor
    norms: Tensor
    skipped: bool = False


def own_losses(batch: Batch, addends: Tensor) -> Tensor:
    """Return (n,) the cross entropy of each sample of a batch, summed over its supervised positions."""
    sums = torch.zeros(len(batch.sample_ids), dtype=addends.dtype, device=addends.device)
    return sums.index_add_(0, batch.owners, addends)


def bad_samples(tensors: StepTensors) -> list[int]:
    """Return the samples of this rank whose own cross entropy is not finite. Host sync.

    Where there are none, return those of the micro-batches whose loss is not finite.
    """
    found, near = [], []
    for batch, addends, loss in zip(tensors.batches, tensors.addends, tensors.losses.tolist()):
        ids = batch.sample_ids.tolist()
        found += [i for i, own in zip(ids, own_losses(batch, addends).tolist()) if i >= 0 and not math.isfinite(own)]
        near += [i for i in ids if i >= 0 and not math.isfinite(loss)]
    return found or near


def highest(tensors: StepTensors) -> list[tuple[int, float]]:
    """Return the NUM_SUSPECTS samples of this rank with the highest mean cross entropy, and that value, highest first.

    Host sync.
    """
    found: list[tuple[int, float]] = []
    for batch, addends in zip(tensors.batches, tensors.addends):
        counts = torch.bincount(batch.owners, minlength=len(batch.sample_ids)).clamp(min=1)
        means = own_losses(batch, addends) / counts
        found += [(i, own) for i, own in zip(batch.sample_ids.tolist(), means.tolist()) if i >= 0]
    return sorted(found, key=lambda pair: -pair[1])[:NUM_SUSPECTS]


def first_bad(norms: Tensor) -> int | None:
    """Return the index of the first norm that is not finite, None without one. Host sync."""
    return next((i for i, norm in enumerate(norms.tolist()) if not math.isfinite(norm)), None)


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
