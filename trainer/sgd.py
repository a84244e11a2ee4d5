"""SGD with momentum, by torch's fused kernel."""

from __future__ import annotations

from torch.optim.sgd import sgd

from model.files.shards import local
from trainer.optim_state import MOMENTUM, MixedOptimizer


class SGD(MixedOptimizer):
    """Fused SGD that may be skipped and may be sharded.

    `torch.optim.SGD` is not used: its kernel does not take sharded parameters, and it leaves the momentum without values where the
    first update is skipped. Here momentum begins at zero.
    """

    def update(self) -> None:
        """Update this rank's rows of all parameters; skip the update where `found_inf` is 1. No host sync."""
        momentum = self.settings.momentum
        for group in self.own:
            states = [self.state_of(p, group["rule"]) for p in group["params"]]
            sgd(
                [local(p.detach()) for p in group["params"]],
                [local(p.grad) for p in group["params"]],
                [local(state[MOMENTUM]) if momentum else None for state in states],
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
