"""SGD with momentum, by torch's fused kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from model.files.shards import local
from trainer.config import OptimConfig
from trainer.optim_state import MOMENTUM, new_state


class SGD(torch.optim.Optimizer):
    """Fused SGD that may be skipped and may be sharded.

    `torch.optim.SGD` is not used: its kernel does not take sharded parameters, and it leaves the momentum without values where the
    first update is skipped. Here momentum begins at zero.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], optim: OptimConfig) -> None:
        super().__init__(groups, {})
        self.settings = optim

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update this rank's rows of all parameters; skip the update where `found_inf` is 1. No host sync."""
        momentum = self.settings.momentum
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    self.state[p] = new_state(group["rule"], p)
            sgd(
                [local(p.detach()) for p in group["params"]],
                [local(p.grad) for p in group["params"]],
                [local(self.state[p][MOMENTUM]) if momentum else None for p in group["params"]],
                fused=True,
                grad_scale=self.grad_scale,
                found_inf=self.found_inf,
                weight_decay=group["weight_decay"],
                momentum=momentum,
                lr=group["lr"],
                dampening=0.0,
                nesterov=self.settings.nesterov and momentum > 0,
                maximize=False,
            )
