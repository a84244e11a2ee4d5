"""Numbers that are read one step after they were made, when the device has long finished them: nobody waits."""

from __future__ import annotations

import torch
from torch import Tensor


class DeferredRead:
    """A vector of the step before, of always the same length."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copy: Tensor | None = None
        self.event = torch.cuda.Event() if device.type == "cuda" else None

    def push(self, values: Tensor) -> list[float] | None:
        """Keep `values` (n,) for the next call; returns those of the call before, None at the first one."""
        before = self.pop()
        if self.event is None:
            self.copy = values.detach()
        else:
            self.copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.copy.copy_(values.detach(), non_blocking=True)
            self.event.record()
        return before

    def pop(self) -> list[float] | None:
        """What is kept, and nothing from then on. A host sync with the step that made it, which is over as a rule."""
        copy, self.copy = self.copy, None
        if copy is None:
            return None
        if self.event is not None:
            self.event.synchronize()
        return [float(value) for value in copy.numpy()]
