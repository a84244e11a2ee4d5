"""Gradient norm of each part of the model, from the norms of single gradients that a step has anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from model.files.sharding import is_first_copy
from trainer.distributed.world import World
from trainer.optim import in_norm_order


class PartNorms:
    """Sums of squared norms per part. What several ranks hold counts once."""

    def __init__(self, optimizer: torch.optim.Optimizer, world: World) -> None:
        """Read the parts off the names of the optimizer's groups."""
        names = {id(p): str(group["name"]).partition("/")[0] for group in optimizer.param_groups for p in group["params"]}
        parameters = in_norm_order(p for group in optimizer.param_groups for p in group["params"])
        self.names = list(dict.fromkeys(names[id(p)] for p in parameters))
        self.index = torch.tensor([self.names.index(names[id(p)]) for p in parameters], device=world.device)
        counts = [float(is_first_copy(p, world.rank)) for p in parameters]
        self.weights = torch.tensor(counts, dtype=torch.float64, device=world.device)

    def squares(self, norms: Tensor | None) -> Tensor:
        """Return (parts,) this rank's share of the squared norms of the step with `norms` (parameters,). No host sync.

        All are NaN where the step has not told the norm of every parameter.
        """
        found = torch.zeros(len(self.names), dtype=torch.float64, device=self.index.device)
        if norms is None or len(norms) != len(self.index):
            return found.fill_(torch.nan)
        return found.index_add_(0, self.index, norms.to(found.device, non_blocking=True).double().square() * self.weights)
