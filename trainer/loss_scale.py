"""Dynamic loss scaling for float16 (Micikevicius et al. 2018, "Mixed precision training"), on the device: no host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config import LossScaleConfig
from trainer.state import LossScaleState

CEILING = 2.0**32
"""Largest scale: gradients that are all zero would let it grow for ever."""


class LossScale:
    """The factor on the loss in backward, which keeps small gradients within float16; gradients are divided by it before clipping.

    It doubles after `growth_interval` updates in a row, and halves when an update is skipped, down to `floor`. Whether an update is
    skipped is the same on all ranks, so the scale is too.
    """

    def __init__(self, config: LossScaleConfig, device: torch.device) -> None:
        self.config = config
        self.scale = torch.full((), config.initial, device=device)
        self.updates = torch.zeros((), device=device)  # in a row since the scale changed

    def update(self, skipped: Tensor) -> None:
        """Change the scale after a step. `skipped`: () 1.0 where its update was skipped. No host sync."""
        overflowed = skipped.bool()
        updates = torch.where(overflowed, 0.0, self.updates + 1)
        grows = updates >= self.config.growth_interval
        lower, higher = (self.scale * 0.5).clamp(min=self.config.floor), (self.scale * 2).clamp(max=CEILING)
        self.scale = torch.where(overflowed, lower, torch.where(grows, higher, self.scale))
        self.updates = torch.where(grows, 0.0, updates)

    def state(self) -> LossScaleState:
        """Return what a checkpoint stores. Host sync."""
        return {"scale": self.scale.item(), "updates": int(self.updates.item())}

    def restore(self, state: LossScaleState) -> None:
        """Go on from the `state` of a checkpoint."""
        self.scale.fill_(state["scale"])
        self.updates.fill_(state["updates"])
