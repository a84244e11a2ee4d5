"""AdamW with moments in 8 bits (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization"), by bitsandbytes' kernels.

The numbers are those of `bitsandbytes.optim.AdamW8bit`. That class is not used: it waits for the device after every parameter,
takes no sharded ones, cannot skip an update, and keeps a state that only as many ranks as wrote it can read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.errors import ConfigError
from model.files.shards import MOMENTS, local
from model.llm.quantize import functional
from trainer.config import OptimConfig
from trainer.optim_state import BLOCK, CODES, SCALES, STEP, Group, MixedOptimizer, new_state


class AdamW8bit(MixedOptimizer):
    """AdamW with 8-bit moments for the groups whose rule is `adamw8bit`, fused AdamW for the others."""

    def __init__(self, groups: list[Group], optim: OptimConfig) -> None:
        super().__init__(groups, optim)
        self.maps = dict[torch.device, list[Tensor]]()
        for device in {local(p).device for group in self.own for p in group["params"]}:
            self._prove_kernel(device)

    def _prove_kernel(self, device: torch.device) -> None:
        """Update a small tensor. Raises `ConfigError` when bitsandbytes has no kernel for the device."""
        weight = torch.zeros(1, BLOCK, device=device)
        try:
            self._move(weight, torch.ones_like(weight), new_state("adamw8bit", weight), {"lr": 1.0, "weight_decay": 0.0}, (1.0, 1))
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"optim.kind = 'adamw8bit': bitsandbytes cannot update 8-bit moments on {device.type} ({reason}); install 0.50 or "
                "newer with pip install -U -e '.[quantize]', or use optim.kind = 'adamw'"
            ) from error

    def update(self) -> None:
        """Update the parameters, unless `found_inf` is 1. Host sync: the kernels take the number of updates from the host."""
        states = [[self.state_of(p, "adamw8bit") for p in group["params"]] for group in self.own]
        steps = [state[STEP] for group in states for state in group]
        if not steps:
            return
        skipped, scale, updates = torch.stack([self.found_inf, self.grad_scale, steps[0]]).tolist()  # host sync
        if skipped:
            return
        torch._foreach_add_(steps, 1)
        for group, found in zip(self.own, states):
            for p, state in zip(group["params"], found):
                assert p.grad is not None
                if local(p).numel():
                    self._move(local(p.detach()), local(p.grad), state, group, (1 / scale, int(updates) + 1))

    def _move(self, rows: Tensor, gradient: Tensor, state: dict[str, Tensor], group: Group, how: tuple[float, int]) -> None:
        """Update this rank's rows of a parameter and of its state. `how`: the factor on the gradient, and which update it is."""
        factor, step = how
        codes, scales = ([local(state[name + suffix]) for name in MOMENTS] for suffix in (CODES, SCALES))
        functional().optimizer_update_8bit_blockwise(
            "adam",
            gradient.contiguous(),
            rows,
            *codes,
            *self.settings.betas,
            beta3=0.0,
            alpha=0.0,
            eps=self.settings.eps,
            step=step,
            lr=group["lr"],
            **dict(zip(("qmap1", "qmap2"), self._maps(rows.device))),
            **dict(zip(("absmax1", "absmax2"), (scale.view(-1) for scale in scales))),
            weight_decay=group["weight_decay"],
            gnorm_scale=factor,
        )

    def _maps(self, device: torch.device) -> list[Tensor]:
        """Return (256,) the numbers that codes stand for, of the first and of the second moment."""
        if device not in self.maps:
            self.maps[device] = [functional().create_dynamic_map(signed=signed).to(device) for signed in (True, False)]
        return self.maps[device]
