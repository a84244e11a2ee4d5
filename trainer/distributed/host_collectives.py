"""FSDP2's two collectives among processes on CPUs, in fewer copies and additions than gloo's own.

Gloo gathers into buffers of its own and copies from them, and it sums all rows on every rank, in a copy of the gradients, where a
rank needs the sum of its own rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

KEPT_BYTES = 16 * 2**20
"""The largest buffer that is kept between steps; a unit has three at most."""


def use_host_collectives(module: FSDPModule) -> None:
    """Let the unit of `module` gather and reduce by the collectives of this file."""
    module.set_custom_all_gather(cast("AllGather", GatherByBroadcast()))  # torch exports the interfaces for reading alone
    module.set_custom_reduce_scatter(cast("ReduceScatter", ReduceByExchange()))


class HostBuffers:
    """Memory of the collectives of one unit. Small buffers are kept: what a process frees, the kernel hands out page by page."""

    def __init__(self) -> None:
        self.free: list[Tensor] = []

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a buffer that nothing else uses, as FSDP2 asks for it, with any values."""
        for i, buffer in enumerate(self.free):
            if buffer.shape == torch.Size(size) and buffer.dtype == dtype:
                return self.free.pop(i)
        return torch.empty(*size, dtype=dtype, device=device)

    def keep(self, *buffers: Tensor) -> None:
        """Keep these for the next calls of `allocate`, and forget what was free. Nothing may read them any more.

        Of a unit FSDP2 has no two collectives under way, and on a CPU each is done on return.
        """
        # A tensor of inference mode cannot be written outside it.
        self.free = [buffer for buffer in buffers if buffer.nbytes <= KEPT_BYTES and not buffer.is_inference()]


class GatherByBroadcast(HostBuffers):
    """All-gather in which every rank broadcasts its rows straight into the result of the others."""

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> None:
        """Fill `output_tensor` (ranks * n,) with the `input_tensor` (n,) of every rank. Collective; done on return."""
        parts = output_tensor.chunk(group.size())
        if parts[group.rank()].data_ptr() != input_tensor.data_ptr():
            parts[group.rank()].copy_(input_tensor)
        sent = [dist.broadcast(part, group=group, group_src=rank, async_op=True) for rank, part in enumerate(parts)]
        for work in sent:
            work.wait()
        self.keep(output_tensor)  # FSDP2 copies from it before it gathers this unit again


class ReduceByExchange(HostBuffers):
    """Reduce-scatter in which every rank gets its rows of all ranks, and adds them in the order of ranks."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: object, async_op: bool = False
    ) -> None:
        """Set `output_tensor` (n,) to the sum of all ranks' `input_tensor` (ranks * n,) in the rows of this rank. Collective."""
        if op != dist.ReduceOp.SUM:
            raise ValueError(f"reduction {op} of sharded gradients on a CPU: only sums, see set_force_sum_reduction_for_comms")
        received = self.allocate(input_tensor.shape, dtype=input_tensor.dtype, device=input_tensor.device)
        dist.all_to_all_single(received, input_tensor, group=group)
        first, second, *others = received.view(group.size(), -1).unbind()
        torch.add(first, second, out=output_tensor)
        for part in others:
            output_tensor.add_(part)
        self.keep(received, input_tensor)  # not the output: gradients are views of it
