"""Sums and counts of what loss terms report, on the device, over all samples and source by source."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.batch import Batch
from model.loss import Term
from trainer.distributed.world import World


class Ratios:
    """Sums and counts that loss terms report, by name, on the device; the names are the same on every rank."""

    def __init__(self, source_names: Sequence[str] = ()) -> None:
        self.values: dict[str, Tensor] = {}
        self.source_names, self.tables = source_names, dict[str, Tensor]()  # (2, sources) of what is known sample by sample

    def add(self, ratios: dict[str, Tensor], batch: Batch | None = None) -> None:
        """Add the (2,) sum and count of each name, or (2, samples) of each sample of `batch`. No host sync."""
        for name, ratio in ratios.items():
            if ratio.dim() == 2 and batch is not None:
                table = self.tables.get(name, ratio.new_zeros(2, len(self.source_names), dtype=torch.float64))
                self.tables[name] = table.index_add(1, batch.source_ids[: ratio.shape[1]], ratio.double())
                ratio = ratio.sum(1)
            self.values[name] = self.values[name] + ratio if name in self.values else ratio.double()

    def total(self, world: World) -> dict[str, list[float]]:
        """Return sum and count of each name over ranks. Collective if there is any name, and a host sync."""
        if not self.values:
            return {}
        found = dict(self.values)
        for name, table in self.tables.items():
            for source, column in zip(self.source_names, table.unbind(1)):
                key = f"{source}/{name}"
                found[key] = found[key] + column if key in found else column
        sums = world.sum(torch.stack(list(found.values())))
        return dict(zip(found, sums.tolist()))


def ratios_of(terms: dict[str, Term]) -> dict[str, Tensor]:
    """Return the (2,) sum and count of everything that terms other than the text report, by name."""
    return {name: ratio for term in terms.values() for name, ratio in term.ratios.items()}


def ratio_means(totals: dict[str, list[float]], prefix: str) -> dict[str, float]:
    """Return the result of `Ratios.total` as quotients; a name with a count of zero is left out."""
    return {f"{prefix}/{name}": total / count for name, (total, count) in totals.items() if count}
