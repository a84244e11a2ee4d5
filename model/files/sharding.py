"""TODO docstring."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor


def local_range(tensor: Tensor) -> tuple[int, int]:
    """First and last row (exclusive) of dim 0 that this rank holds; `fully_shard` leaves late ranks empty when rows are few."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0] if tensor.dim() else 1
    mesh: Any = tensor.device_mesh
    chunk = -(-tensor.shape[0] // mesh.size(mesh.ndim - 1))
    first = min(mesh.get_local_rank(mesh.ndim - 1) * chunk, tensor.shape[0])
    return first, first + tensor.to_local().shape[0]


def is_first_copy(tensor: Tensor, rank: int) -> bool:
    """Whether this rank is the one to write its rows: each is held by several where whole copies are."""
    if not isinstance(tensor, DTensor):
        return rank == 0
    mesh: Any = tensor.device_mesh
    return all(mesh.get_local_rank(dim) == 0 for dim in range(mesh.ndim - 1))
