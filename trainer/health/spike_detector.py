"""Detection of loss spikes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

WINDOW, ENOUGH = 64, 16
DEVIATIONS, FACTOR, ABOVE_HIGHEST = 6.0, 2.0, 1.25
SIGMA = 1.4826
"""Standard deviation of normal noise in units of its median absolute deviation."""
TINY = 1e-12


class SpikeDetector:
    """Losses of the last WINDOW steps, judged in logarithms: noise grows with the loss, at 10 as at 0.001."""

    def __init__(self, losses: Sequence[float] = ()) -> None:
        self.losses = [float(loss) for loss in losses]

    def judge(self, loss: float) -> float | None:
        """Add the next loss, which must be finite; return the usual loss when it is a spike, else None.

        A spike is beyond twice the median, beyond six robust standard deviations from it, and a quarter beyond the highest loss of
        the window. A loss that recurs every few steps, as that of text batches between image batches, is none, and a loss that
        stays high is reported once.
        """
        usual, limit = self._limit()
        self.losses = [*self.losses, loss][-WINDOW:]
        return usual if loss > limit else None

    def _limit(self) -> tuple[float, float]:
        """Return (median loss, loss from which on a spike begins); the limit is infinite until ENOUGH losses are known."""
        if len(self.losses) < ENOUGH:
            return 0.0, math.inf
        logs = sorted(math.log(max(loss, TINY)) for loss in self.losses)
        middle = median(logs)
        deviation = SIGMA * median(abs(value - middle) for value in logs)
        limit = max(middle + math.log(FACTOR), middle + DEVIATIONS * deviation, logs[-1] + math.log(ABOVE_HIGHEST))
        return math.exp(middle), math.exp(limit)
