"""Warning where chosen answers become less probable throughout: the loss may fall while the model unlearns both answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from data.dataset import MultimodalDataset
from model.batch import Batch
from trainer.distributed.world import World
from trainer.step import StepResult

LINES = 5
"""Logged lines in a row in which it has to fall."""
NUM_NAMED = 4
REWARD, LOG_PROB = "chosen_reward", "chosen_log_prob"


class CollapseWatch:
    """Watches one run or stage. It warns once, and again only after chosen answers have become more probable."""

    def __init__(self, dataset: MultimodalDataset, world: World) -> None:
        self.dataset, self.world = dataset, world
        self.values: list[float] = []
        self._last: tuple[list[Batch], list[dict[str, Tensor]]] = ([], [])
        self.has_warned = False

    def add(self, batches: Sequence[Batch], result: StepResult) -> None:
        """Keep what the last step says of its samples. No host sync."""
        self._last = ([replace(batch, media={}) for batch in batches], result.ratios)

    def observe(self, values: Mapping[str, float]) -> str:
        """Judge a logged line, the same on every rank; return a warning or "". Collective where there is one."""
        value = values.get(f"train/{REWARD}", values.get(f"train/{LOG_PROB}"))
        if value is None:
            return ""
        self.values = [*self.values, value][-LINES - 1 :]
        falls = [later < before for before, later in zip(self.values, self.values[1:])]
        if falls and not falls[-1]:
            self.has_warned = False
        is_below = f"train/{REWARD}" not in values or value < 0
        if self.has_warned or len(falls) < LINES or not all(falls) or not is_below:
            return ""
        self.has_warned = True
        ranks = self.world.gather_json(self._lowest())
        named = sorted(tuple(pair) for rank in ranks for pair in rank)[:NUM_NAMED]
        places = ", ".join(f"{self.dataset.where(int(i))} ({own:.2f})" for own, i in named)
        what = "reward" if f"train/{REWARD}" in values else "log-probability"
        return (
            f"chosen answers have become less probable in each of the last {LINES} logged lines ({what} {self.values[0]:.3f} to "
            f"{value:.3f}): the model may unlearn both answers. Raise preference.sft_weight or preference.beta, or lower optim.lr; "
            f"lowest in the last step: {places}"
        )

    def _lowest(self) -> list[tuple[float, int]]:
        """Return the samples of the last step on this rank whose chosen answers are the least probable. Host sync."""
        found: list[tuple[float, int]] = []
        for batch, ratios in zip(*self._last):
            table = ratios.get(REWARD, ratios.get(LOG_PROB))
            if table is None:
                continue
            total, count = table.tolist()
            ids = batch.sample_ids.tolist()
            found += [(own / number, i) for own, number, i in zip(total, count, ids) if number]
        return sorted(found)[:NUM_NAMED]
