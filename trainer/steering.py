"""What people and systems ask of a run under way: stop, save, evaluate. All ranks agree, and nobody waits for it."""

from __future__ import annotations

from collections.abc import Sequence

STOP, SAVE, EVALUATE = WISHES = ("stop", "save", "eval")


class Steering:
    """Wishes of this process, put in by any thread, and those that all ranks know of.

    They ride in the collective of a step's counts and are read a step later, so every rank acts on them after the same step.
    """

    def __init__(self) -> None:
        self.wished: dict[str, str] = {}  # by wish: who asked for it, for people
        self.agreed: set[str] = set()

    def wish(self, name: str, reason: str) -> None:
        """Ask for `name` of WISHES. From any thread."""
        self.wished.setdefault(name, reason)

    def told(self) -> list[float]:
        """What this rank tells the others in a step, one number per wish."""
        return [float(name in self.wished) for name in WISHES]

    def hear(self, sums: Sequence[float]) -> None:
        """What all ranks told in the step before: `told` summed up."""
        self.agreed |= {name for name, total in zip(WISHES, sums) if total}

    def take(self, name: str) -> bool:
        """Whether all ranks know of the wish; it is fulfilled from then on. The same on every rank after the same step."""
        if name not in self.agreed:
            return False
        self.agreed.discard(name)
        self.wished.pop(name, None)
        return True
