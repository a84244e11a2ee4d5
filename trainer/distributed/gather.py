"""Gather hooks: each makes one sharded tensor whole on rank 0, at the time when a writer asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch.distributed as dist
from torch import Tensor

from model.files.sharding import is_first_copy, is_sharded_tensor

GatherHook = Callable[[], Tensor | None]


def gather_hooks(tensors: Mapping[str, Tensor]) -> dict[str, GatherHook]:
    """Return a hook per tensor. Calling a hook is a collective: every rank calls the same hooks in the same order.

    Rank 0 gets the whole tensor on the CPU, the other ranks None; no rank ever holds more than one whole tensor.
    """
    return {name: partial(gathered, tensor) for name, tensor in tensors.items()}


def gathered(tensor: Tensor) -> Tensor | None:
    """Return the whole tensor on rank 0, None elsewhere.

    Collective for sharded tensors, among the ranks that share the first copy.
    """
    is_main = dist.get_rank() == 0
    if not is_sharded_tensor(tensor):
        return tensor.detach().cpu() if is_main else None
    mesh = tensor.device_mesh
    if not is_first_copy(tensor, dist.get_rank()):
        return None
    # Gathered on the CPU, straight into the result: two copies on the accelerator would not fit beside a model that fills it.
    local, size = tensor.to_local().detach().cpu(), mesh.size(mesh.ndim - 1)
    chunk = -(-tensor.shape[0] // size)
    # The last ranks hold fewer rows or none, and a gather needs pieces of equal size.
    padded = local.new_zeros(chunk, *tensor.shape[1:])
    padded[: local.shape[0]] = local
    whole = local.new_empty(chunk * size, *tensor.shape[1:]) if is_main else None
    dist.gather(padded, list(whole.split(chunk)) if whole is not None else None, dst=0, group=mesh.get_group(mesh.ndim - 1))
    return whole[: tensor.shape[0]] if whole is not None else None
