"""Rehearsal before the first step: the heaviest micro-batch runs forward and backward, so a run that does not fit ends at once."""

from __future__ import annotations

import gc
import socket
from dataclasses import replace
from typing import TypedDict

import torch
from torch import Tensor

from model.batch import Batch
from model.errors import ConfigError
from trainer.distributed.parallelize import gradient_sync
from trainer.machine.memory_info import Usage, available_bytes, reset_peak, usage
from trainer.memory.advice import MemoryScenario, advice
from trainer.memory.doubt import without_rehearsal
from trainer.memory.heaviest_batch import Heaviest, find_heaviest, read_batch_samples
from trainer.memory.sample_cost import media_memory, sample_costs
from trainer.optim_state import rules_of, state_bytes
from trainer.setup import PreparedRun

GIB = 2**30


class RankMemory(TypedDict):
    """Memory of a rank after the rehearsal, in bytes (`Usage`), its machine, and the moments that are still to come."""

    now: int
    peak: int
    free: int
    total: int
    host: str
    optimizer: int


def rehearse(prepared: PreparedRun, first_step: int) -> str:
    """Run the heaviest micro-batch of the epoch; return a line on the memory of the rank with the least headroom. Collective.

    Nothing is run where memory is not in doubt (`without_rehearsal`), unless train.rehearsal is "always".
    It runs forward and backward as in a step, with what accumulation keeps between two micro-batches, and no update. Nothing else
    changes: gradients are dropped, buffers and random generators are restored, and no record is quarantined for what it does here.
    Raises ConfigError, which names what would fit, when memory runs out or the optimizer's moments would not fit beside.
    """
    check_host_memory(prepared)
    world, heaviest = prepared.world, find_heaviest_batch(prepared, first_step)
    if line := without_rehearsal(prepared, heaviest, moments_to_come(prepared)):
        return line
    train, _ = prepared.data.training()
    samples = read_batch_samples(train, heaviest.ids, prepared.batch_plan.is_packed)
    scenario = MemoryScenario(prepared.config, prepared.data.card, world.size, samples, heaviest.num_micro_batches)
    scenario = replace(scenario, on_host=world.device.type == "cpu")
    batch = scenario.batch()
    reset_peak(world.device)
    before = usage(world.device)
    if not _fits_in_memory(prepared, batch, passes=min(heaviest.num_micro_batches, 2)):
        raise ConfigError(_out_of_memory_message(prepared, scenario, before))
    used = usage(world.device)
    mine: RankMemory = {
        "now": used.now,
        "peak": used.peak,
        "free": used.free,
        "total": used.total,
        "host": socket.gethostname(),
        "optimizer": moments_to_come(prepared),
    }
    return _verdict(prepared, scenario, world.gather_json(mine))  # collective


def find_heaviest_batch(prepared: PreparedRun, first_step: int) -> Heaviest:
    """Find the heaviest micro-batch of the epoch that `first_step` is in. The result is the same on every rank."""
    config, plan = prepared.config, prepared.batch_plan
    train, sampler = prepared.data.training()
    media = media_memory(prepared.model, train, config.parallel.activation_checkpointing == "full")
    costs = sample_costs(prepared.model, config.model, train) if plan.is_packed else None
    return find_heaviest(sampler, plan, media, costs, first_step, prepared.total_steps)


def _fits_in_memory(prepared: PreparedRun, batch: Batch, passes: int) -> bool:
    """Run the passes; return whether memory sufficed. Nothing of the passes is left on return."""
    try:
        _run_passes(prepared, batch, passes)
        fits = True
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        fits = False  # the error holds frames, which hold all activations: it must be gone before they can be freed
    for p in prepared.model.parameters():
        p.grad = None
    if not fits:
        gc.collect()
        if prepared.world.device.type == "cuda":
            torch.cuda.empty_cache()
    return fits


def _run_passes(prepared: PreparedRun, batch: Batch, passes: int) -> None:
    """Run forward and backward `passes` times; restore buffers and random generators."""
    device = prepared.world.device
    buffers = [(buffer, buffer.clone()) for buffer in prepared.model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for n in range(passes):
            here = batch.to(device)
            with gradient_sync(prepared.wrapped, last=n == passes - 1):
                terms = prepared.wrapped(here)
                loss: Tensor = torch.stack([term.sum for term in terms.values()]).sum()
                loss.backward()
            del terms, loss
    for buffer, value in buffers:
        buffer.copy_(value)


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out: the CPU allocator of torch has no exception class of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator: " in str(error)


def _out_of_memory_message(prepared: PreparedRun, scenario: MemoryScenario, before: Usage) -> str:
    """Return the message of a rank that is out of memory. No collective: other ranks may still wait for this one."""
    optimizer = moments_to_come(prepared)
    fits = advice(scenario, lambda now: min(now.weights + before.free, now.total - 1))
    return (
        f"out of memory on rank {prepared.world.rank} in the heaviest micro-batch of the epoch "
        f"({describe_batch(scenario.batch())}): {format_gib(before.free)} of {format_gib(before.total)} GiB were left "
        f"beside the weights, of which the optimizer takes {format_gib(optimizer)}. {fits}"
    )


def _verdict(prepared: PreparedRun, scenario: MemoryScenario, ranks: list[RankMemory]) -> str:
    """Return the line to print. Raises the same ConfigError on all ranks when one of them has negative headroom."""
    left = [_headroom(row, ranks, prepared.world.device) for row in ranks]
    worst = min(range(len(ranks)), key=left.__getitem__)
    row = ranks[worst]
    line = (
        f"peak {format_gib(row['peak'])} GiB of {format_gib(row['total'])} on rank {worst} in the heaviest micro-batch "
        f"({describe_batch(scenario.batch())}), optimizer {format_gib(row['optimizer'])} more, headroom {format_gib(left[worst])}"
    )
    if left[worst] < 0:
        raise ConfigError(f"{line}: it does not fit. {advice(scenario, lambda now: now.total + left[worst])}")
    return f"memory    {line}"


def moments_to_come(prepared: PreparedRun) -> int:
    """Return the bytes that this rank's optimizer will allocate on its device: the first update creates the state of each weight.

    What will be in host memory is looked at apart (`check_host_memory`).
    """
    if prepared.config.parallel.cpu_offload and prepared.world.device.type != "cpu":
        return 0
    return _moments(prepared)


def _moments(prepared: PreparedRun) -> int:
    """Return the bytes of all state of the optimizer that is still to come on this rank."""
    if prepared.trained is None:
        return 0
    optimizer = prepared.trained.optimizer
    return state_bytes(rules_of(optimizer), [p for p in prepared.trained.parameters.values() if p not in optimizer.state])


def check_host_memory(prepared: PreparedRun) -> None:
    """Check that the moments of parallel.cpu_offload fit into the memory of every host. Collective.

    Raises the same ConfigError on all ranks.
    """
    if not prepared.config.parallel.cpu_offload or prepared.world.device.type == "cpu":
        return
    mine = [socket.gethostname(), _moments(prepared), available_bytes()]
    ranks = prepared.world.gather_json(mine)
    for host in dict.fromkeys(host for host, _, _ in ranks):
        needed = sum(size for of, size, _ in ranks if of == host)
        free = min(left for of, _, left in ranks if of == host)
        if needed > free:
            raise ConfigError(
                f"parallel.cpu_offload = true: the moments of {host}'s ranks take {format_gib(needed)} GiB of host memory beside "
                f"the weights, and {format_gib(free)} GiB are free there: use more machines, or train less"
            )


def _headroom(row: RankMemory, ranks: list[RankMemory], device: torch.device) -> int:
    """Return the free memory of a rank at the peak, with the moments allocated. Ranks of one machine share the CPU's memory."""
    sharing = [row] if device.type == "cuda" else [other for other in ranks if other["host"] == row["host"]]
    return int(row["free"] - sum(other["peak"] - other["now"] + other["optimizer"] for other in sharing))


def describe_batch(batch: Batch) -> str:
    """Describe a micro-batch in numbers, for people."""
    count = sum(i >= 0 for i in batch.sample_ids.tolist())
    rows, width = batch.input_ids.shape
    tokens = f"{width:,} packed tokens" if batch.segment_lengths is not None else f"{rows} x {width:,} tokens"
    media = [
        f"{len(found.values):,} {name} {'rows' if found.patches is None else 'patches'} for {len(found.slots):,} of them"
        for name, found in batch.media.items()
    ]
    return ", ".join([f"{count} sample{'s' * (count != 1)}", tokens, *media])


def format_gib(size: float) -> str:
    """Format bytes in GiB, small values with more digits."""
    return f"{size / GIB:.1f}" if abs(size) >= GIB else f"{size / GIB:.3f}"
