"""Copies of float32 masters in the dtype of computation, made once per update instead of in every forward and recomputation.

For models without FSDP, which casts what it gathers by itself. Values and gradients are those of casting in forward, to the bit.
With parallel.cpu_offload the masters are on the host and the copies on the device (`host_masters`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from trainer.config import ParallelConfig

_KEPT: WeakKeyDictionary[nn.Module, ComputeCopies] = WeakKeyDictionary()
_UPDATES = [0]
"""Number of updates of all optimizers: their fused kernels change parameters without a trace in version counters."""


def _count_update(*_: object) -> None:
    """Count an update of some optimizer."""
    _UPDATES[0] += 1


register_optimizer_step_post_hook(_count_update)


def keeps_copies(config: ParallelConfig) -> bool:
    """Tell whether a model without FSDP computes with copies of its masters.

    Without recomputation they cost no memory at the peak: what forward casts lives until backward as well. Masters on the host
    cannot be computed with at all. Not under compile: a copy adds to `.grad` in place, which no graph of a compiler may hold.
    """
    if config.cpu_offload:
        return True
    if config.compile:
        return False
    if config.compute_copies == "auto":
        return config.activation_checkpointing == "none"
    return config.compute_copies == "always"


def copies_of(model: nn.Module) -> list[Tensor]:
    """Return the copies that `model` computes with, if any."""
    return [use.copy for use in _KEPT[model].uses.values()] if model in _KEPT else []


@dataclass
class CopyUse:
    """The copy of one parameter, and how often this micro-batch uses it."""

    copy: Tensor
    seen: tuple[int, int] = (-1, -1)  # updates of all optimizers, and the parameter's version, when it was copied
    open: int = 0  # uses in forward whose backward has not come
    most: int = 0  # the most of these since there was none


class ComputeCopies:
    """The copies of a model's trained parameters; each is made anew when it is used for the first time after an update."""

    def __init__(
        self, model: nn.Module, parameters: Iterable[nn.Parameter], dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        """Allocate the copies of the trained ones of `parameters`, on `device`; None: beside each."""
        self.uses: dict[Tensor, CopyUse] = {
            p: CopyUse(torch.empty_like(p, dtype=dtype, device=device, requires_grad=False)) for p in parameters if p.requires_grad
        }
        _KEPT[model] = self

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self.uses

    def used(self, parameter: Tensor) -> Tensor:
        """Return the copy of `parameter` for one use, with the parameter in its graph."""
        use = self.uses[parameter]
        if use.seen != (now := (_UPDATES[0], parameter._version)):
            self.copy(parameter, use)
            use.seen, use.open, use.most = now, 0, 0
        # A recomputed block uses it again, inside backward; only the first use has a backward of its own.
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
            use.open += 1
            use.most = max(use.most, use.open)
        found: Tensor = _CopyOf.apply(parameter, use, self)
        return found

    def copy(self, parameter: Tensor, use: CopyUse) -> None:
        """Make the copy of `parameter` anew."""
        use.copy.copy_(parameter.detach())

    def receive(self, parameter: Tensor, use: CopyUse, grad: Tensor, is_only_use: bool) -> Tensor | None:
        """Take the gradient of one use of a copy; return it where autograd is to add it."""
        if parameter.grad is None or not is_only_use:
            return grad  # autograd casts it; several uses are summed before they are added, as without copies
        # DDP's hook on the parameter runs after this one: it finds the sum in `parameter.grad`.
        parameter.grad.add_(grad)
        return None


class _CopyOf(torch.autograd.Function):
    """The copy in place of the parameter. Its gradient is added to the float32 gradient in one operator, without casting it first.

    Only `backward()` may be called through it, not `torch.autograd.grad` with respect to the parameter.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, use: CopyUse, copies: ComputeCopies) -> Tensor:
        ctx.parameter, ctx.use, ctx.copies = parameter, use, copies
        return use.copy.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        use: CopyUse = ctx.use
        is_only_use = use.most == 1
        use.open = max(use.open - 1, 0)
        if not use.open:
            use.most = 0
        return ctx.copies.receive(ctx.parameter, use, grads[0], is_only_use), None, None
