"""The reward from which kto and mpo measure those of single answers, the same in all micro-batches and ranks of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.preference.config import PreferenceConfig
from model.preference.scores import Scores


class ShiftState(NamedTuple):
    """Sum and count of all rewards of the steps before, over all ranks."""

    total: float
    number: float


class RewardShift:
    """Under mpo the mean reward of all steps before; under kto beta times the divergence from the reference in this step, no less
    than 0, estimated from answers of other records. 0 under other kinds.

    What this rank has added is summed over ranks in the collective of a step's counts: that of the next step under mpo, of the same
    step under kto. No host sync.
    """

    def __init__(self, config: PreferenceConfig) -> None:
        self.kind, self.beta = config.kind, config.beta
        self.restore(ShiftState(0.0, 0.0))

    @property
    def is_used(self) -> bool:
        return self.kind in ("kto", "mpo")

    def restore(self, state: ShiftState) -> None:
        """Go on from the sums of a checkpoint, or from none, with nothing added since."""
        self._known = torch.tensor(state, dtype=torch.float64)
        self._added = torch.zeros(2)

    def value(self, like: Tensor) -> Tensor:
        """Return the shift () float32 on the device of `like`."""
        if not self.is_used:
            return like.new_zeros(())
        total, count = self._known.to(like.device, non_blocking=True).unbind()
        mean = (total / count.clamp(min=1)).float()
        return self.beta * mean.clamp(min=0) if self.kind == "kto" else mean

    def add(self, scores: Scores) -> None:
        """Add what the scores of a batch say, without graph."""
        answers = scores.answers
        which = answers.other if self.kind == "kto" else torch.cat([answers.chosen, answers.rejected])
        values = (scores.ratios(which) if self.kind == "kto" else scores.rewards(which, self.beta)).detach()
        own = torch.stack([values.sum(), values.new_full((), float(which.shape[0]))])
        self._added = self._added.to(own.device, non_blocking=True) + own

    def shared(self) -> list[Tensor]:
        """Return what this rank has added, to be summed over ranks; `receive` takes the sums."""
        return list(self._added.unbind()) if self.is_used else []

    def receive(self, sums: Sequence[Tensor]) -> None:
        """Take the sums over ranks of what each has `shared`, and begin to add anew. No host sync."""
        if self.is_used:
            found = torch.stack(list(sums)).double()
            self._known = found if self.kind == "kto" else self._known.to(found.device, non_blocking=True) + found
            self._added = torch.zeros_like(sums[0]).repeat(2)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return sum and count (2,) float64 of the steps before, and what this rank has added since (2,)."""
        return self._known, self._added
