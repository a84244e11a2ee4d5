"""Requests to a running run by people and systems: stop, save, evaluate. All ranks agree on them without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trainer.distributed.world import World

STOP, SAVE, EVALUATE = REQUEST_NAMES = ("stop", "save", "eval")
OF_ANOTHER = "asked of another rank"
"""Reason of a request that was made to another rank."""


class Requests:
    """Requests made to this process, by any thread, and those that all ranks know of.

    They are summed in the collective of a step's counts and read one step late, so every rank acts on them after the same step.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}  # by request: who made it, for people
        self.agreed: set[str] = set()
        self.announced: set[str] = set()  # sent to the other ranks, not yet fulfilled
        self.accepting = False  # whether the main thread acts on requests: only once steps are running

    def add(self, name: str, reason: str) -> None:
        """Add the request `name`, one of REQUEST_NAMES. Callable from any thread."""
        self.reasons.setdefault(name, reason)

    def announce(self) -> list[float]:
        """Return what this rank adds to the collective of a step, one number per request.

        Each request is sent once, or it would be fulfilled twice.
        """
        new = [name in self.reasons and name not in self.announced for name in REQUEST_NAMES]
        self.announced |= {name for name, is_new in zip(REQUEST_NAMES, new) if is_new}
        return [float(is_new) for is_new in new]

    def observe(self, sums: Sequence[float]) -> None:
        """Take in `sums`, the sums over all ranks of what `announce` returned in the previous step."""
        self.agreed |= {name for name, total in zip(REQUEST_NAMES, sums) if total}

    def reason(self, name: str) -> str:
        """Return who made a request, as far as this rank knows."""
        return self.reasons.get(name, OF_ANOTHER)

    def consume(self, name: str) -> bool:
        """Return whether all ranks know of the request, and remove it. The result is the same on every rank after the same step."""
        if name not in self.agreed:
            return False
        self.agreed.discard(name)
        self.announced.discard(name)
        self.reasons.pop(name, None)
        return True

    def consume_between_stages(self, name: str, world: World) -> bool:
        """Agree on a request and remove it as `consume` does, where no step runs that could carry it. Collective, host sync."""
        mine = float(name in self.reasons or name in self.agreed)
        if world.sum(torch.tensor(mine, device=world.device)).item():
            self.agreed.add(name)
        return self.consume(name)
