"""AdamW groups (part x decay, each named) and the clipped, skippable update."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.config import ModelConfig
from model.files.sharding import is_first_copy, is_sharded_tensor
from model.multimodal import MultimodalLM
from trainer.config import OptimConfig
from trainer.sharded_adamw import ShardedAdamW


def learning_rates(model: ModelConfig, optim: OptimConfig) -> dict[str, float]:
    """Return the peak learning rate of each part: its own, then projector_lr for projectors, then optim.lr."""
    rates = {}
    for name, part in model.parts().items():
        default = optim.projector_lr or optim.lr if name.endswith("_projector") else optim.lr
        rates[name] = part.lr or default
    return rates


def build_optimizer(model: MultimodalLM, config: ModelConfig, optim: OptimConfig) -> torch.optim.AdamW:
    """Build fused AdamW over the trainable parameters.

    Norms, biases and other vectors are never decayed. Without weight decay a part is one group, because every group is a kernel
    launch of its own.
    """
    groups = []
    for part, lr in learning_rates(config, optim).items():
        named = [(name, p) for name, p in model.get_submodule(part).named_parameters() if p.requires_grad]
        kinds = {"decay": optim.weight_decay, "no_decay": 0.0} if optim.weight_decay else {"no_decay": 0.0}
        for kind, decay in kinds.items():
            chosen = [p for _, p in named if len(kinds) == 1 or (p.dim() > 1) == (kind == "decay")]
            if chosen:
                groups.append({"params": chosen, "name": f"{part}/{kind}", "lr": lr, "peak_lr": lr, "weight_decay": decay})
    check_groups(model, groups)
    return ShardedAdamW(groups, betas=optim.betas, eps=optim.eps, fused=True)


def check_groups(model: nn.Module, groups: list[dict]) -> None:
    """Raise `RuntimeError` unless every trainable parameter is in exactly one group."""
    grouped = [id(p) for group in groups for p in group["params"]]
    trainable = [id(p) for p in model.parameters() if p.requires_grad]
    if sorted(grouped) != sorted(trainable):
        raise RuntimeError(f"{len(grouped)} parameters in optimizer groups, {len(trainable)} trainable")


def set_learning_rates(optimizer: torch.optim.Optimizer, multiplier: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * multiplier


@torch.no_grad()  # with gradients, taking the local rows of a DTensor is an operator of autograd's
def gradient_norm(parameters: Iterable[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Return the gradient norm over all ranks (), identical on each, and the norms of this rank's own gradients (parameters,).

    The latter are in the order of `in_norm_order`. Sharded and replicated gradients may be mixed. A collective if any is sharded.
    Of several copies the shards of the first copy count, on all ranks: norms that each copy sums by itself might differ by
    rounding, and the copies would differ from then on.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    shards, whole = [g for g in grads if is_sharded_tensor(g)], [g for g in grads if not is_sharded_tensor(g)]
    norms = torch.stack(torch._foreach_norm([*(g.to_local() for g in shards), *whole], dtype=torch.float32))
    if not shards:
        return torch.linalg.vector_norm(norms), norms
    total = torch.linalg.vector_norm(norms[: len(shards)]).square()
    if shards[0].device_mesh.size() > 1:
        if not is_first_copy(shards[0], dist.get_rank()):
            total *= 0  # a product: a norm that is not finite stays so
        dist.all_reduce(total)
    return (total + torch.linalg.vector_norm(norms[len(shards) :]).square()).sqrt() if whole else total.sqrt(), norms


def in_norm_order(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return `parameters` in the order in which `gradient_norm` returns the norms of single gradients."""
    return sorted(parameters, key=lambda p: not is_sharded_tensor(p))  # shards first, else in the given order


def clipped_update(optimizer: torch.optim.Optimizer, norm: Tensor, clip_norm: float) -> Tensor:
    """Update once with gradients scaled to at most `clip_norm` (0 = off); skip the update where `norm` is not finite.

    The fused kernel clips and skips by itself, so the host never waits. Returns 1.0 where the update was skipped, (), on
    the device. The norm is the same on all ranks, so all skip alike.
    """
    # Zero times a norm that is not finite is NaN, which differs from zero.
    skipped = (norm * 0).ne(0).float()
    scale = torch.clamp(norm / clip_norm, min=1.0) if clip_norm else torch.ones_like(norm)
    vars(optimizer).update(found_inf=skipped, grad_scale=scale)  # what GradScaler sets: torch declares neither
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return skipped


@dataclass(frozen=True)
class Trained:
    """Trainable parameters by full name, and the optimizer over them."""

    parameters: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
