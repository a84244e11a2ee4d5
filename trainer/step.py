"""One optimizer step: where the gradient is made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.batch import Batch
from model.initial import seed_of
from trainer.distributed import World
from trainer.optim import clipped_update, gradient_norm
from trainer.parallel import gradient_sync


@dataclass(frozen=True)
class StepResult:
    """What a step did, on the device: nothing here has been waited for."""

    addends: list[Tensor]  # cross entropy of each supervised position of this rank, (S,) per micro-batch
    grad_norm: Tensor  # () over all ranks, before clipping
    skipped: Tensor  # () 1.0 where the update was skipped because the norm is not finite


def train_step(
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    world: World,
    *,
    seed: int,
    step: int,
    clip_norm: float,
) -> StepResult:
    """Update on the mean loss over every supervised position of the global batch. No host sync.

    The one denominator is the count over all micro-batches and ranks: each micro-batch adds its sum divided by it, and
    gradients are summed over ranks, so the result does not depend on how the samples were shared out.
    """
    num_supervised = sum(batch.num_supervised for batch in batches)
    count = world.sum(torch.full((), float(num_supervised), device=world.device)).clamp_(min=1.0)  # collective
    addends = []
    for i, batch in enumerate(batches):
        # Dropout depends on nothing but these four, so a resumed run draws the same numbers.
        seed_dropout(seed_of(seed, step, world.rank, i), world.device)
        with gradient_sync(wrapped, last=i == len(batches) - 1):
            term = wrapped(batch)["text"]
            (term.sum / count).backward()
        addends.append(term.addends)
    norm = gradient_norm(p for group in optimizer.param_groups for p in group["params"])  # collective
    return StepResult(addends, norm, clipped_update(optimizer, norm, clip_norm))


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generator that dropout on `device` draws from. `torch.manual_seed` would look at every back end each time."""
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    generator.manual_seed(seed)
