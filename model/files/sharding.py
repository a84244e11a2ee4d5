"""Rows of a sharded tensor that this rank holds, and the choice of the rank that writes them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_range(tensor: Tensor) -> tuple[int, int]:
    """Return the first and the last row (exclusive) of dim 0 that this rank holds.

    `fully_shard` leaves the last ranks empty when rows are few.
    """
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0] if tensor.dim() else 1
    mesh: Any = tensor.device_mesh
    chunk = -(-tensor.shape[0] // mesh.size(mesh.ndim - 1))
    first = min(mesh.get_local_rank(mesh.ndim - 1) * chunk, tensor.shape[0])
    return first, first + tensor.to_local().shape[0]


def is_first_copy(tensor: Tensor, rank: int) -> bool:
    """Tell whether this rank writes its rows. With replicas (HSDP or DDP) several ranks hold the same rows; the first writes."""
    if not isinstance(tensor, DTensor):
        return rank == 0
    mesh: Any = tensor.device_mesh
    return all(mesh.get_local_rank(dim) == 0 for dim in range(mesh.ndim - 1))
