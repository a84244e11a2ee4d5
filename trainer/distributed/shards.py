"""FSDP2 (ZeRO-3): which modules are gathered together, in which order, and how their gradients are reduced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import nn

from model.files.sharding import is_sharded_module
from model.llm.causal_lm import blocks, head_weight
from model.multimodal import MultimodalLM
from trainer.config import ParallelConfig
from trainer.distributed.blocks import block_owner, has_blocks
from trainer.distributed.host_collectives import use_host_collectives
from trainer.distributed.integer_shards import integers_without_gradient
from trainer.distributed.world import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

REDUCED = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Types in which gradients are summed over ranks, by `parallel.reduce_dtype`."""


class Options(TypedDict):
    """Arguments of `fully_shard` that all units share."""

    mesh: DeviceMesh
    mp_policy: MixedPrecisionPolicy
    offload_policy: OffloadPolicy


def whole_bytes(modules: Sequence[nn.Module], dtype: torch.dtype) -> int:
    """Return the bytes of all parameters of `modules` as they are gathered: numbers in `dtype`, codes as they are."""
    found = {p: p.numel() * (dtype.itemsize if p.is_floating_point() else p.itemsize) for m in modules for p in m.parameters()}
    return sum(found.values())


def units_of(model: MultimodalLM, part: str, config: ParallelConfig) -> list[list[nn.Module]]:
    """Return the blocks of a part in the groups that are gathered together, in the order of forward.

    A group takes neighbours until it has parallel.unit_mib, because each costs collectives and calls of its own. [] where the whole
    part is smaller: it is gathered with what no block holds.
    """
    least = config.unit_mib * 2**20
    if whole_bytes([block_owner(model, part)], model.dtype) < least:
        return []
    units: list[list[nn.Module]] = [[]]
    for block in blocks(block_owner(model, part)):
        if units[-1] and whole_bytes(units[-1], model.dtype) >= least:
            units.append([])
        units[-1].append(block)
    if len(units) > 1 and whole_bytes(units[-1], model.dtype) < least:
        units[-2:] = [units[-2] + units[-1]]
    return units


def parts_with_blocks(model: MultimodalLM) -> Iterator[str]:
    """Yield the names of the parts that have blocks."""
    return (name for name, _ in model.named_children() if has_blocks(model, name))


@integers_without_gradient()
def shard(model: MultimodalLM, config: ParallelConfig, world: World) -> None:
    """Shard a model that is still on meta: groups of blocks are units, then every tower, then the rest.

    With hsdp every `shard_size` ranks share a copy (Zhao et al. 2023, PyTorch FSDP, "hybrid sharding"): gradients are summed among
    these ranks, then over the copies.
    """
    # Here: FSDP2 and DTensor take 0.8 CPU seconds to import, and most runs have one rank, or DDP.
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
    from torch.distributed.fsdp import register_fsdp_forward_method as gather_for

    policy = MixedPrecisionPolicy(
        param_dtype=None if model.dtype == torch.float32 else model.dtype,
        reduce_dtype=REDUCED[config.reduce_dtype],
        cast_forward_inputs=False,
    )
    tied = model.llm.get_input_embeddings().weight is head_weight(model.llm)
    mesh = world.mesh(config.shard_size if config.strategy == "hsdp" else 0)
    # Weights come from page-locked memory whenever a unit is gathered, and its reduced gradients go back to the host.
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if config.cpu_offload else OffloadPolicy()
    options: Options = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
    for name in parts_with_blocks(model):
        shard_part(model, name, config, options)
    # Embedding, norm, head and projectors: gathered once per micro-batch and kept to the end of backward.
    fully_shard(model, **options)
    gather_for(model, "generate")  # as for `forward`
    for module in model.modules():
        if is_sharded_module(module):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
            if world.device.type == "cpu":
                use_host_collectives(module)
    if tied and model.llm.get_input_embeddings().weight is not head_weight(model.llm):
        raise RuntimeError("sharding untied the head from the embedding")


def shard_part(model: MultimodalLM, name: str, config: ParallelConfig, options: Options) -> None:
    """Shard the blocks of one part, and what else a tower holds."""
    from torch.distributed.fsdp import fully_shard  # here: see shard

    owner, units = block_owner(model, name), units_of(model, name, config)
    if not units:
        return
    for unit in units:
        fully_shard(unit if len(unit) > 1 else unit[0], **options, reshard_after_forward=config.reshard_after_forward)
    prefetch(units)
    if name != "llm":
        fully_shard(owner, **options, reshard_after_forward=config.reshard_after_forward)
        if name not in model.trainable_parts:
            # The output of this tower carries no gradient, so backward never needs its weights: do not gather them again.
            for module in owner.modules():
                if is_sharded_module(module):
                    module.set_unshard_in_backward(False)


def prefetch(units: list[list[nn.Module]]) -> None:
    """Gather each unit while the one before it computes, in forward and in backward.

    By itself FSDP2 does so in forward only as far as the host runs ahead of the device. No more units are whole at a time.
    """
    for unit, following in pairwise(units):
        first, second = unit[0], following[0]
        assert is_sharded_module(first) and is_sharded_module(second)
        first.set_modules_to_forward_prefetch([second])
        second.set_modules_to_backward_prefetch([first])


def reshard(model: nn.Module) -> None:
    """Release the weights that a forward without backward left gathered.

    Until then `parameters()` are the copies made for computing.
    """
    for module in model.modules():
        if is_sharded_module(module):
            module.reshard()
