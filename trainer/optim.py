"""Optimizer groups (part x rule x decay, each named) and the clipped, skippable update."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.config import ModelConfig
from model.errors import ConfigError
from model.files.sharding import is_first_copy, is_sharded_tensor
from model.multimodal import MultimodalLM
from trainer.adamw8bit import AdamW8bit
from trainer.config import OptimConfig
from trainer.distributed.world import World
from trainer.loss_scale import LossScale
from trainer.muon import Muon
from trainer.optim_state import BLOCK, Group, Rule, assign_rules, new_state, rules_of, tensors_to_save
from trainer.sgd import SGD
from trainer.sharded_adamw import ShardedAdamW


def learning_rates(model: ModelConfig, optim: OptimConfig) -> dict[str, float]:
    """Return the peak learning rate of each part: its own, then projector_lr for projectors, then optim.lr."""
    rates = {}
    for name, part in model.parts().items():
        default = optim.projector_lr or optim.lr if name.endswith("_projector") else optim.lr
        rates[name] = part.lr or default
    return rates


def build_optimizer(model: MultimodalLM, config: ModelConfig, optim: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer of optim.kind over the trainable parameters.

    Norms, biases and other vectors are never decayed. Without weight decay the parameters of a part that have one rule are one
    group, because every group is a kernel launch of its own. Raises `ConfigError` when the device has no kernels for it.
    """
    groups: list[Group] = []
    rules = assign_rules(model, optim)
    for part, lr in learning_rates(config, optim).items():
        named = [(name, p) for name, p in model.get_submodule(part).named_parameters() if p.requires_grad]
        kinds = {"decay": optim.weight_decay, "no_decay": 0.0} if optim.weight_decay else {"no_decay": 0.0}
        for rule in dict.fromkeys(rules[p] for _, p in named):
            for kind, decay in kinds.items():
                chosen = [p for _, p in named if rules[p] == rule and (len(kinds) == 1 or (p.dim() > 1) == (kind == "decay"))]
                group = {"name": f"{part}/{kind}/{rule}", "rule": rule, "lr": lr, "peak_lr": lr, "weight_decay": decay}
                groups += [{"params": chosen, **group}] if chosen else []
    check_groups(model, groups)
    check_rules(model, rules, optim)
    if optim.kind == "muon":
        return Muon(groups, optim, model.dtype)
    if optim.kind == "adamw8bit":
        return AdamW8bit(groups, optim)
    if optim.kind == "sgd":
        return SGD(groups, optim)
    return ShardedAdamW(groups, betas=optim.betas, eps=optim.eps, fused=True)


def check_rules(model: nn.Module, rules: dict[Tensor, Rule], optim: OptimConfig) -> None:
    """Raise `ConfigError` when optim.kind would update no parameter by its own rule."""
    what = {"muon": "no matrix of a linear layer, head aside", "adamw8bit": f"no matrix in rows of a multiple of {BLOCK} numbers"}
    if optim.kind in what and optim.kind not in rules.values():
        shapes = sorted({(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad})[:2]
        raise ConfigError(
            f"optim.kind = {optim.kind!r} has no effect: {what[optim.kind]} learns, only, for example, "
            f"{' and '.join(f'{name} of shape {list(shape)}' for name, shape in shapes)}; use optim.kind = 'adamw'"
        )


def check_groups(model: nn.Module, groups: list[Group]) -> None:
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


def allocate_zeros(optimizer: torch.optim.Optimizer) -> None:
    """Make the gradients and the state of all parameters that have none yet, zeros, before a forward allocates anything.

    Made in a backward, they would come to lie between activations and stay there. The C library moves nothing: the next
    micro-batch, of other lengths, would not fit between them and take memory of its own.
    """
    for parameter, rule in rules_of(optimizer).items():
        if parameter not in optimizer.state:
            optimizer.state[parameter] = new_state(rule, parameter)
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def clipped_update(
    optimizer: torch.optim.Optimizer,
    norm: Tensor,
    clip_norm: float,
    loss_scale: Tensor | None = None,
    *,
    keeps_gradients: bool = False,
) -> Tensor:
    """Update once with gradients scaled to at most `clip_norm` (0 = off); skip the update where `norm` is not finite.

    Gradients are `loss_scale` times as large as `norm` says; None: once. The optimizer clips and skips by itself, so the host does
    not wait. Returns 1.0 where the update was skipped, (), on the device. The norm is the same on all ranks, so all skip alike.
    `keeps_gradients`: they are zeros afterwards, and not freed.
    """
    # Zero times a norm that is not finite is NaN, which differs from zero.
    skipped = (norm * 0).ne(0).float()
    scale = torch.clamp(norm / clip_norm, min=1.0) if clip_norm else torch.ones_like(norm)
    scale = scale if loss_scale is None else scale * loss_scale
    vars(optimizer).update(found_inf=skipped, grad_scale=scale)  # what GradScaler sets: torch declares neither
    optimizer.step()
    optimizer.zero_grad(set_to_none=not keeps_gradients)
    return skipped


@dataclass(frozen=True)
class Trained:
    """Trainable parameters by full name, the optimizer over them, and the loss scale of float16."""

    parameters: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale | None = None

    def saved(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds after the first update, by name in its files: tensors without values."""
        return tensors_to_save(self.parameters, rules_of(self.optimizer))


class PartNorms:
    """Sums of squared gradient norms per part of the model, from the norms of a step. What several ranks hold counts once."""

    def __init__(self, optimizer: torch.optim.Optimizer, world: World) -> None:
        """Read the parts off the names of the optimizer's groups."""
        names = {id(p): str(group["name"]).partition("/")[0] for group in optimizer.param_groups for p in group["params"]}
        parameters = in_norm_order(p for group in optimizer.param_groups for p in group["params"])
        self.names = list(dict.fromkeys(names[id(p)] for p in parameters))
        self.index = torch.tensor([self.names.index(names[id(p)]) for p in parameters], device=world.device)
        counts = [float(is_first_copy(p, world.rank)) for p in parameters]
        self.weights = torch.tensor(counts, dtype=torch.float64, device=world.device)

    def squares(self, norms: Tensor | None) -> Tensor:
        """Return (parts,) this rank's share of the squared norms of the step with `norms` (parameters,). No host sync.

        All are NaN where the step has not told the norm of every parameter.
        """
        found = torch.zeros(len(self.names), dtype=torch.float64, device=self.index.device)
        if norms is None or len(norms) != len(self.index):
            return found.fill_(torch.nan)
        return found.index_add_(0, self.index, norms.to(found.device, non_blocking=True).double().square() * self.weights)
