"""AdamW whose kernel sees this rank's rows as plain tensors: through DTensor the call costs several times more of the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.optim.adam import adam

from model.files.sharding import is_sharded_tensor
from model.files.shards import local


class ShardedAdamW(torch.optim.AdamW):
    """Fused AdamW. Parameters, groups and state are those of torch's; the numbers are the same to the bit."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it
        """Update all parameters that have a gradient; skip the update where `found_inf` is 1. No host sync."""
        groups = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        if closure is not None or not all(is_sharded_tensor(p) and p in self.state for group in groups for p in group):
            return super().step(closure)  # the first update creates the state
        for group, parameters in zip(self.param_groups, groups):
            if not parameters:
                continue
            states = [self.state[p] for p in parameters]
            adam(
                [local(p) for p in parameters],
                [local(p.grad) for p in parameters if p.grad is not None],
                [local(state["exp_avg"]) for state in states],
                [local(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=True,
                **{name: value for name in ("grad_scale", "found_inf") if (value := getattr(self, name, None)) is not None},
            )
        return None
