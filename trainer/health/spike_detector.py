"""When a loss is out of the ordinary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

WINDOW, ENOUGH = 64, 16
DEVIATIONS, FACTOR, ABOVE_HIGHEST = 6.0, 2.0, 1.25
SIGMA = 1.4826
"""Standard deviations in a median absolute deviation, where noise is normal."""
TINY = 1e-12


class Spikes:
    """The losses of the last steps. In logarithms: noise grows with the loss, at 10 as at 0.001."""

    def __init__(self, losses: Sequence[float] = ()) -> None:
        self.losses = [float(loss) for loss in losses]

    def judge(self, loss: float) -> float | None:
        """Take in the next loss, which is finite; the usual one when it is a spike.

        A spike is beyond twice the median, beyond six robust standard deviations from it, and beyond the highest loss of the
        window by a quarter: what comes back every few steps, as batches of text between those of pictures, is none, and a loss
        that stays high is told once.
        """
        usual, limit = self._limit()
        self.losses = [*self.losses, loss][-WINDOW:]
        return usual if loss > limit else None

    def _limit(self) -> tuple[float, float]:
        if len(self.losses) < ENOUGH:
            return 0.0, math.inf
        logs = sorted(math.log(max(loss, TINY)) for loss in self.losses)
        middle = median(logs)
        deviation = SIGMA * median(abs(value - middle) for value in logs)
        limit = max(middle + math.log(FACTOR), middle + DEVIATIONS * deviation, logs[-1] + math.log(ABOVE_HIGHEST))
        return math.exp(middle), math.exp(limit)
