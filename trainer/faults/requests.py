"""Requests to a running run by people and systems: stop, save, evaluate. All ranks agree on them without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trainer.distributed.world import World

STOP, SAVE, EVALUATE = WISHES = ("stop", "save", "eval")


class Requests:
    """Requests made to this process, by any thread, and those that all ranks know of.

    They are summed in the collective of a step's counts and read one step late, so every rank acts on them after the same step.
    """

    def __init__(self) -> None:
        self.wished: dict[str, str] = {}  # by request: who made it, for people
        self.agreed: set[str] = set()
        self.under_way: set[str] = set()  # sent to the other ranks, not yet fulfilled
        self.heeded = False  # whether the main thread acts on requests: only once steps are running

    def wish(self, name: str, reason: str) -> None:
        """Add the request `name`, one of WISHES. Callable from any thread."""
        self.wished.setdefault(name, reason)

    def told(self) -> list[float]:
        """Return what this rank adds to the collective of a step, one number per request.

        Each request is sent once, or it would be fulfilled twice.
        """
        new = [name in self.wished and name not in self.under_way for name in WISHES]
        self.under_way |= {name for name, is_new in zip(WISHES, new) if is_new}
        return [float(is_new) for is_new in new]

    def hear(self, sums: Sequence[float]) -> None:
        """Take in `sums`, the sums over all ranks of what `told` returned in the previous step."""
        self.agreed |= {name for name, total in zip(WISHES, sums) if total}

    def reason(self, name: str) -> str:
        """Return who made a request, as far as this rank knows."""
        return self.wished.get(name, "asked of another rank")

    def take(self, name: str) -> bool:
        """Return whether all ranks know of the request, and remove it. The result is the same on every rank after the same step."""
        if name not in self.agreed:
            return False
        self.agreed.discard(name)
        self.under_way.discard(name)
        self.wished.pop(name, None)
        return True

    def take_between(self, name: str, world: World) -> bool:
        """Agree on a request and remove it as `take` does, where no step is running that could carry it. Collective, host sync."""
        mine = float(name in self.wished or name in self.agreed)
        if world.sum(torch.tensor(mine, device=world.device)).item():
            self.agreed.add(name)
        return self.take(name)
