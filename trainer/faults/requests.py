"""What people and systems ask of a run under way: stop, save, evaluate. All ranks agree, and nobody waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trainer.distributed.world import World

STOP, SAVE, EVALUATE = WISHES = ("stop", "save", "eval")


class Requests:
    """Wishes of this process, put in by any thread, and those that all ranks know of.

    They ride in the collective of a step's counts and are read a step later, so every rank acts on them after the same step.
    """

    def __init__(self) -> None:
        self.wished: dict[str, str] = {}  # by wish: who asked for it, for people
        self.agreed: set[str] = set()
        self.under_way: set[str] = set()  # told in a step, not yet fulfilled
        self.heeded = False  # whether the main thread will act on wishes: not before there is a step to act after

    def wish(self, name: str, reason: str) -> None:
        """Ask for `name` of WISHES. From any thread."""
        self.wished.setdefault(name, reason)

    def told(self) -> list[float]:
        """What this rank tells the others in a step, one number per wish: each wish once, or it would be fulfilled twice."""
        new = [name in self.wished and name not in self.under_way for name in WISHES]
        self.under_way |= {name for name, is_new in zip(WISHES, new) if is_new}
        return [float(is_new) for is_new in new]

    def hear(self, sums: Sequence[float]) -> None:
        """What all ranks told in the step before: `told` summed up."""
        self.agreed |= {name for name, total in zip(WISHES, sums) if total}

    def reason(self, name: str) -> str:
        """Who asked for it, as far as this rank knows."""
        return self.wished.get(name, "asked of another rank")

    def take(self, name: str) -> bool:
        """Whether all ranks know of the wish; it is fulfilled from then on. The same on every rank after the same step."""
        if name not in self.agreed:
            return False
        self.agreed.discard(name)
        self.under_way.discard(name)
        self.wished.pop(name, None)
        return True

    def take_between(self, name: str, world: World) -> bool:
        """The same where no step is under way that could carry the wish. Collective, host sync."""
        mine = float(name in self.wished or name in self.agreed)
        if world.sum(torch.tensor(mine, device=world.device)).item():
            self.agreed.add(name)
        return self.take(name)
