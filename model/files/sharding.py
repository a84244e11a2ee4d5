"""Rows of a sharded tensor that this rank holds, and the choice of the rank that writes them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_sharded_tensor(tensor: object) -> TypeGuard[DTensor]:
    """Tell whether a tensor is a DTensor. Only sharding imports that class, which takes 0.7 CPU seconds with sympy behind it."""
    found = sys.modules.get("torch.distributed.tensor")  # an import takes 2 us, and a step asks for every parameter
    return found is not None and isinstance(tensor, found.DTensor)


def is_sharded_module(module: nn.Module) -> TypeGuard[FSDPModule]:
    """Tell whether FSDP2 gathers the parameters of a module. Only sharding imports it, as it does DTensor."""
    found = sys.modules.get("torch.distributed.fsdp")
    return found is not None and isinstance(module, found.FSDPModule)


def local_range(tensor: Tensor) -> tuple[int, int]:
    """Return the first and the last row (exclusive) of dim 0 that this rank holds.

    `fully_shard` leaves the last ranks empty when rows are few.
    """
    if not is_sharded_tensor(tensor):
        return 0, tensor.shape[0] if tensor.dim() else 1
    mesh: Any = tensor.device_mesh
    chunk = -(-tensor.shape[0] // mesh.size(mesh.ndim - 1))
    first = min(mesh.get_local_rank(mesh.ndim - 1) * chunk, tensor.shape[0])
    return first, first + tensor.to_local().shape[0]


def is_first_copy(tensor: Tensor, rank: int) -> bool:
    """Tell whether this rank writes its rows. With replicas (HSDP or DDP) several ranks hold the same rows; the first writes."""
    if not is_sharded_tensor(tensor):
        return rank == 0
    mesh: Any = tensor.device_mesh
    return all(mesh.get_local_rank(dim) == 0 for dim in range(mesh.ndim - 1))
