"""Device values that are read one step late, when the device has long computed them, so that the host never waits."""

from __future__ import annotations

import torch
from torch import Tensor


class DeferredRead:
    """Holder of the vector of the previous step; its length is the same in all steps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copy: Tensor | None = None
        self.event = torch.cuda.Event() if device.type == "cuda" else None

    def swap(self, values: Tensor) -> list[float] | None:
        """Keep `values` (n,) for the next call; return those of the previous call, None at the first one."""
        before = self.flush()
        if self.event is None:
            self.copy = values.detach()
        else:
            self.copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.copy.copy_(values.detach(), non_blocking=True)
            self.event.record()
        return before

    def flush(self) -> list[float] | None:
        """Return the kept values and forget them. Host sync with the step that made them, which is normally over."""
        copy, self.copy = self.copy, None
        if copy is None:
            return None
        if self.event is not None:
            self.event.synchronize()
        return [float(value) for value in copy.numpy()]
