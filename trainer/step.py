"""One optimizer step: forward and backward of all micro-batches, the gradient norm and the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.batch import Batch
from model.loss import Term
from model.multimodal import MultimodalLM
from model.weights.initial_values import seed_of
from trainer.distributed.parallelize import gradient_sync
from trainer.distributed.world import World
from trainer.loss_scale import LossScale
from trainer.optim import allocate_zeros, clipped_update, gradient_norm
from trainer.ratios import ratios_of


@dataclass(frozen=True)
class StepResult:
    """Results of a step, on the device: the host has not waited for any of them."""

    addends: list[Tensor]  # cross entropy of each supervised position of this rank, (S,) per micro-batch
    grad_norm: Tensor  # () over all ranks, before clipping
    skipped: Tensor  # () 1.0 where the update was skipped because the norm is not finite
    ratios: list[dict[str, Tensor]]  # what other terms report, (2,) sum and count by name, per micro-batch
    losses: Tensor  # (micro-batches,) this rank's part of the loss
    norms: Tensor  # (parameters,) of this rank's gradients, in the order of the optimizer's groups: which one was not finite
    extra_sums: Tensor  # (len(extra),) sums of `extra` over all ranks
    loss_scale: Tensor | None = None  # () of this step, where the run computes in float16


@dataclass(frozen=True)
class StepOptions:
    """Settings of one step, beside model, optimizer and batches."""

    seed: int  # of the run; with `step`, the rank and the micro-batch it is the seed of dropout
    step: int  # 0-based, of the stage
    clip_norm: float  # 0: no clipping
    extra: Sequence[float | Tensor] = ()  # numbers of this rank, summed over ranks in the same collective as the counts
    mark: Callable[[str], None] = lambda phase: None  # called with the name of each phase
    scaling: LossScale | None = None  # float16: changed by the step


def train_step(
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    world: World,
    options: StepOptions,
) -> StepResult:
    """Update the parameters on the weighted sum of all terms, each a mean over what it counts in the global batch. No host sync.

    A term has one divisor, its count over all micro-batches and ranks divided by its coefficient: each micro-batch adds its sum
    divided by it, and gradients are summed over ranks, so the result does not depend on how the samples were distributed.
    """
    mark = options.mark
    scale = options.scaling.scale if options.scaling else None
    mark("count")
    if (tuning := unwrapped(wrapped).preference) is not None:
        batches = tuning.prepare(wrapped, batches)  # some kinds run the model for it, without a graph
    keeps_gradients = world.device.type == "cpu" and world.size == 1 and len(batches) > 1
    if keeps_gradients:
        allocate_zeros(optimizer)  # made in a backward they would lie between activations, and a CPU's memory stay in pieces
    divisors, extra_sums = loss_divisors(wrapped, batches, world, options.extra)
    addends: list[Tensor] = []
    ratios: list[dict[str, Tensor]] = []
    losses: list[Tensor] = []
    for i, batch in enumerate(batches):
        # Dropout depends on these four numbers alone, so a resumed run draws the same numbers.
        seed_dropout(seed_of(options.seed, options.step, world.rank, i), world.device)
        with gradient_sync(wrapped, last=i == len(batches) - 1):
            mark("forward")
            terms: dict[str, Term] = wrapped(batch)
            # One backward on the sum: in a backward of its own, a router's term would reach a sharded block before the text's.
            loss = total_loss(terms, divisors)
            mark("backward")
            # 1, or NaN where the loss is not finite: it makes every gradient NaN, which finite ones would not tell, and every rank
            # skips the update. A factor, not an argument of `backward`: for one of those torch imports sympy, 0.4 CPU seconds.
            factor = 1 + 0 * loss.detach()
            (loss * (factor if scale is None else factor * scale)).backward()
        addends.append(terms["text"].addends)
        ratios.append(ratios_of(terms))
        losses.append(loss.detach())
    mark("update")
    norm, norms = gradient_norm(p for group in optimizer.param_groups for p in group["params"])  # collective if sharded
    norm = norm if scale is None else norm / scale
    skipped = clipped_update(optimizer, norm, options.clip_norm, scale, keeps_gradients=keeps_gradients)
    if options.scaling:
        options.scaling.update(skipped)
    # With parallel.cpu_offload gradients are on the host, and so is what was found of them.
    norm, skipped = (found.to(world.device, non_blocking=True) for found in (norm, skipped))
    scale = None if scale is None else scale.to(world.device, non_blocking=True)
    return StepResult(addends, norm, skipped, ratios, torch.stack(losses), norms, extra_sums, scale)


def loss_divisors(
    wrapped: nn.Module, batches: list[Batch], world: World, extra: Sequence[float | Tensor] = ()
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the divisor of each term's sum, and the sums of `extra` over all ranks. One collective, no host sync.

    A divisor is the count of the term over all ranks, divided by the coefficient of the term.
    """
    model = unwrapped(wrapped)
    shift = [] if model.preference is None else model.preference.shift.shared()
    found = [*model.counts(batches).values(), *shift, *extra]
    on_device = [c if isinstance(c, Tensor) else torch.full((), c, device=world.device) for c in found]
    sums = world.sum(torch.stack(on_device))  # collective
    counts, shifts, extra_sums = sums.split([len(found) - len(shift) - len(extra), len(shift), len(extra)])
    if model.preference is not None:
        model.preference.shift.receive(shifts.unbind())
    # Where nothing was counted the sum is zero as well. A count may be a sum of weights, and lie between 0 and 1.
    counts = counts + (counts == 0)
    return {name: count / factor for (name, factor), count in zip(model.coefficients().items(), counts.unbind())}, extra_sums


def unwrapped(wrapped: nn.Module) -> MultimodalLM:
    """Return the model that is trained, without what is wrapped around it."""
    found = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
    assert isinstance(found, MultimodalLM)
    return found


def total_loss(terms: dict[str, Term], divisors: dict[str, Tensor]) -> Tensor:
    """Return () this micro-batch's part of the loss of the step."""
    return torch.stack([term.sum / divisors[name] for name, term in terms.items()]).sum()


def seed_dropout(seed: int, device: torch.device) -> None:
    """Set the seed of the generator that dropout on `device` draws from. `torch.manual_seed` would visit every back end."""
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    generator.manual_seed(seed)
