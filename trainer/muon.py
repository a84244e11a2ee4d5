"""Muon (Jordan 2024, "Muon: An optimizer for hidden layers in neural networks"): a matrix moves along its orthogonal momentum.

In bfloat16 the numbers are those of `torch.optim.Muon`, to the bit. That class is not used: it cannot skip an update without a host
sync, and on sharded matrices each of its products is a collective of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from model.files.sharding import is_sharded_tensor
from model.files.shards import local
from trainer.config import OptimConfig
from trainer.optim_state import MOMENTUM, Group, MixedOptimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial, whose slope at 0 is as steep as possible while it maps [0, 1] to about 1."""
EPSILON = 1e-7


class Muon(MixedOptimizer):
    """Muon for the groups whose rule is `muon`, fused AdamW for the others.

    Sharded matrices are gathered a few at a time, one whole matrix on each rank, and the rows of the result go back to their ranks.
    """

    def __init__(self, groups: list[Group], optim: OptimConfig, dtype: torch.dtype) -> None:
        """Prepare to update `groups`. `dtype`: of the products; bfloat16 is enough, but its rounding depends on how ranks sum."""
        super().__init__(groups, optim)
        self.iteration = NewtonSchulz(optim.ns_steps, dtype)

    def update(self) -> None:
        """Update the matrices; skip the update where `found_inf` is 1. Collective if they are sharded. No host sync."""
        for group in self.own:
            for matrices in _together(group["params"]):
                directions = orthogonal([self._momentum(p) for p in matrices], matrices, self.iteration)
                for p, direction in zip(matrices, directions):
                    self._move(p, direction, group)

    def _momentum(self, p: Tensor) -> Tensor:
        """Take this rank's rows of a gradient into the momentum; return the rows of the direction before it is made orthogonal."""
        buffer, weight = local(self.state_of(p, "muon")[MOMENTUM]), self.settings.momentum
        assert p.grad is not None
        # A skipped gradient counts as the momentum itself, which the average then leaves as it is, bit for bit.
        gradient = torch.where(self.found_inf.bool(), buffer, local(p.grad) / self.grad_scale)
        buffer.lerp_(gradient, 1 - weight)
        return gradient.lerp(buffer, weight) if self.settings.nesterov else buffer

    def _move(self, p: Tensor, direction: Tensor, group: Group) -> None:
        """Move this rank's rows of `p` along `direction`, after weight decay, unless the update is skipped."""
        rows, lr = local(p.detach()), group["lr"]
        rows.mul_(torch.where(self.found_inf.bool(), 1.0, 1 - lr * group["weight_decay"]))
        rows.add_(direction.mul_(1 - self.found_inf), alpha=-lr * self._ratio(p))

    def _ratio(self, p: Tensor) -> float:
        """Return the factor on the learning rate of a matrix of this shape.

        With match_rms_adamw an update is as large as AdamW's usually are (Liu et al. 2025, "Muon is scalable for LLM training").
        """
        rows, columns = p.shape
        if self.settings.adjust_lr == "original":
            return math.sqrt(max(1, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns))


def _together(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield as many matrices as ranks share each, one for each rank; large ones first, so that ranks get equal work."""
    parameters = sorted(parameters, key=lambda p: -p.numel())
    size = _ranks(parameters[0]) if parameters else 1
    for i in range(0, len(parameters), size):
        yield parameters[i : i + size]


def _ranks(p: Tensor) -> int:
    """Return the number of ranks that share a copy of `p`."""
    return p.device_mesh.size(p.device_mesh.ndim - 1) if is_sharded_tensor(p) else 1


@dataclass(frozen=True)
class NewtonSchulz:
    """The iteration that makes a matrix orthogonal, roughly."""

    steps: int
    dtype: torch.dtype

    @property
    def read_dtype(self) -> torch.dtype:
        """Return the dtype in which matrices are read. float16 cannot hold every momentum, only what is divided by its norm."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32

    def factor(self, matrix: Tensor) -> Tensor:
        """Return the orthogonal factor of `matrix` (m, n), in `dtype`: its singular values become about 1. No host sync."""
        a, b, c = COEFFICIENTS
        x = matrix.to(self.read_dtype)
        is_tall = matrix.shape[0] > matrix.shape[1]
        x = x.T if is_tall else x
        x = (x / x.norm().clamp(min=EPSILON)).to(self.dtype)
        for _ in range(self.steps):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.T if is_tall else x


def orthogonal(rows: list[Tensor], matrices: list[Tensor], iteration: NewtonSchulz) -> list[Tensor]:
    """Return this rank's rows of the orthogonal factors, given its rows of at most one matrix per rank that shares them.

    Two collectives where matrices are sharded: each rank gathers one matrix whole, and gives the rows of the result back.
    """
    first = matrices[0]
    ranks = _ranks(first)
    if ranks == 1:
        return [iteration.factor(own) for own in rows]
    assert is_sharded_tensor(first)
    mesh = first.device_mesh
    group, rank = mesh.get_group(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    shape = matrices[rank].shape if rank < len(matrices) else torch.Size((0, 1))
    received = [count * shape[1] for count in _row_counts(shape[0], ranks)]  # of this rank's matrix, from each rank
    sent = [own.numel() for own in rows] + [0] * (ranks - len(rows))
    # The iteration begins with this cast: nothing is lost by making it before the exchange.
    own_rows = torch.cat([own.to(iteration.read_dtype).reshape(-1) for own in rows])
    flat = _exchange(own_rows, sent, received, group)  # collective
    factor = iteration.factor(flat.view(shape)) if flat.numel() else flat.to(iteration.dtype)
    back = _exchange(factor.reshape(-1), received, sent, group)  # collective
    ends = list(accumulate(sent, initial=0))
    return [back[begin:end].view(own.shape) for own, (begin, end) in zip(rows, pairwise(ends))]


def _row_counts(rows: int, ranks: int) -> list[int]:
    """Return how many of `rows` each rank holds under FSDP2: equal chunks, the last ranks what is left."""
    chunk = -(-rows // ranks)
    return [max(0, min(chunk, rows - rank * chunk)) for rank in range(ranks)]


def _exchange(values: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send pieces of `values` (n,) of the lengths `sent` to the ranks of `group`; return their pieces joined. Collective."""
    found = values.new_empty(sum(received))
    dist.all_to_all_single(found, values, received, sent, group=group)
    return found
