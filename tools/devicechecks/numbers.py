"""Steps of the trainer whose losses and gradients are kept, and how far two of them are apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from model.batch import Batch
from trainer.optim import set_learning_rates
from trainer.setup import PreparedRun
from trainer.step import StepOptions, train_step

LOSS_BOUND, GRADIENT_BOUND = 1e-5, 1e-4
"""Largest distance of float32 numbers that were summed in another order."""
MOST_SKIPPED = 20
"""Steps that may be made again because of an overflow in float16."""
FLOOR = 1e-3
"""A gradient that is a smaller part of all of them is compared with this part of all."""


@dataclass(frozen=True)
class Taken:
    """Loss of each step, and the gradients of the first one, float32 on the CPU."""

    losses: list[float]
    gradients: dict[str, Tensor]


def take_steps(prepared: PreparedRun, steps: list[list[Batch]]) -> Taken:
    """Train `steps` with `trainer.step.train_step`, each a list of micro-batches."""
    if prepared.trained is None:
        raise ValueError("nothing to train")
    optimizer, device, scaling = prepared.trained.optimizer, prepared.world.device, prepared.trained.loss_scale
    gradients: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        if not gradients:
            scale = 1.0 if scaling is None else float(scaling.scale)
            gradients.update({n: full_copy(p.grad) / scale for n, p in prepared.model.named_parameters() if p.grad is not None})

    hook = optimizer.register_step_pre_hook(keep)
    losses: list[float] = []
    try:
        set_learning_rates(optimizer, 1.0)
        for _ in range(MOST_SKIPPED + len(steps)):
            step = len(losses)
            options = StepOptions(seed=0, step=step, clip_norm=0.0, scaling=scaling)
            result = train_step(prepared.wrapped, optimizer, [b.to(device) for b in steps[step]], prepared.world, options)
            if scaling is not None and result.skipped:  # float16: an overflow has halved the scale, and the step is made again
                gradients.clear()
                continue
            losses.append(float(result.losses.sum()))
            if len(losses) == len(steps):
                break
    finally:
        hook.remove()
    return Taken(losses, gradients)


def full_copy(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor, sharded or not, as float32 on the CPU."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().to("cpu", torch.float32, copy=True)  # DDP writes the next gradients to the same memory


def loss_distance(found: Taken, expected: Taken) -> float:
    """Return the largest relative distance of two runs' losses; infinite where one is not a number."""
    pairs = zip(found.losses, expected.losses, strict=True)
    return max(_finite(abs(a - b) / max(abs(b), 1e-12)) for a, b in pairs)


def gradient_distance(found: Taken, expected: Taken) -> float:
    """Return the largest distance of a parameter's gradients, relative to its size; infinite where a gradient is missing."""
    if found.gradients.keys() != expected.gradients.keys():
        return float("inf")
    norms = {name: float(torch.linalg.vector_norm(g)) for name, g in expected.gradients.items()}
    floor = FLOOR * sum(norm**2 for norm in norms.values()) ** 0.5
    return max(
        _finite(float(torch.linalg.vector_norm(found.gradients[name] - g)) / max(norms[name], floor, 1e-30))
        for name, g in expected.gradients.items()
    )


def mean_distance(found: Taken, expected: Taken) -> float:
    """Return the distance of all gradients together, relative to their size: for numbers that were rounded."""
    if found.gradients.keys() != expected.gradients.keys():
        return float("inf")
    apart = sum(float((found.gradients[n] - g).square().sum()) for n, g in expected.gradients.items())
    return _finite((apart / max(sum(float(g.square().sum()) for g in expected.gradients.values()), 1e-30)) ** 0.5)


def _finite(value: float) -> float:
    return value if value == value else float("inf")


@contextmanager
def strict_float32() -> Iterator[None]:
    """Compute float32 products and convolutions in float32: a GPU rounds the inputs of convolutions to TF32 by default."""
    cudnn, precision = torch.backends.cudnn, torch.get_float32_matmul_precision()
    allowed = cudnn.allow_tf32
    try:
        cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        cudnn.allow_tf32 = allowed
        torch.set_float32_matmul_precision(precision)
