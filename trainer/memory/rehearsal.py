"""Before the first step: the heaviest micro-batch runs forward and backward, so that a run that does not fit says so at once."""

from __future__ import annotations

import gc
import socket
from typing import Any

import torch
from torch import Tensor

from data.order.sampler import Sampler
from model.batch import Batch
from model.errors import ConfigError
from trainer.distributed.parallelize import gradient_sync
from trainer.machine.memory_info import Usage, reset_peak, usage
from trainer.memory.advice import MemoryScenario, advice
from trainer.memory.footprint import MASTER
from trainer.memory.heaviest_batch import Heaviest, find_heaviest, read_samples
from trainer.memory.sample_cost import media_memory, sample_costs
from trainer.setup import PreparedRun

GIB = 2**30


def rehearse(setup: PreparedRun, first_step: int) -> str:
    """One line on how much memory the heaviest micro-batch of the epoch takes: of all ranks, where the least is left. Collective.

    Forward and backward as in a step, with what accumulation keeps between two of them, and no update. Nothing else changes:
    gradients are dropped, buffers and random generators are as before, and no record is quarantined for what it does here.
    ConfigError, which names what would fit, when memory runs out, or when the optimizer's moments would not fit beside.
    """
    world, heaviest = setup.world, find(setup, first_step)
    samples = read_samples(setup.data.train, heaviest.ids, setup.batch_plan.is_packed)  # type: ignore[arg-type]
    heavy = MemoryScenario(setup.config, setup.data.card, world.size, samples, heaviest.num_micro_batches)
    batch = heavy.batch()
    reset_peak(world.device)
    before = usage(world.device)
    if not _runs(setup, batch, passes=min(heaviest.num_micro_batches, 2)):
        raise ConfigError(_too_much(setup, heavy, before))
    mine = {**vars(usage(world.device)), "host": socket.gethostname(), "optimizer": moments_to_come(setup)}
    return _verdict(setup, heavy, world.gather_json(mine))  # collective


def find(setup: PreparedRun, first_step: int) -> Heaviest:
    """The heaviest micro-batch of the epoch that `first_step` is in. The same on every rank."""
    config, train, plan = setup.config, setup.data.train, setup.batch_plan
    sampler: Sampler = setup.data.sampler  # type: ignore[assignment]
    media = media_memory(setup.model, train, config.parallel.activation_checkpointing != "none")  # type: ignore[arg-type]
    costs = sample_costs(setup.model, config.model, train) if plan.is_packed else None  # type: ignore[arg-type]
    return find_heaviest(sampler, plan, media, costs, first_step, setup.total_steps)


def _runs(setup: PreparedRun, batch: Batch, passes: int) -> bool:
    """Whether there is memory for it. On return nothing of it is left."""
    try:
        _passes(setup, batch, passes)
        fits = True
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        fits = False  # the error holds frames, and those all activations: it must be gone before anything is freed
    for p in setup.model.parameters():
        p.grad = None
    if not fits:
        gc.collect()
        if setup.world.device.type == "cuda":
            torch.cuda.empty_cache()
    return fits


def _passes(setup: PreparedRun, batch: Batch, passes: int) -> None:
    device = setup.world.device
    buffers = [(buffer, buffer.clone()) for buffer in setup.model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for n in range(passes):
            here = batch.to(device)
            with gradient_sync(setup.wrapped, last=n == passes - 1):
                terms = setup.wrapped(here)
                loss: Tensor = torch.stack([term.sum for term in terms.values()]).sum()
                loss.backward()
            del terms, loss
    for buffer, value in buffers:
        buffer.copy_(value)


def _is_out_of_memory(error: BaseException) -> bool:
    """The allocator of the CPU has no error of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator: " in str(error)


def _too_much(setup: PreparedRun, heavy: MemoryScenario, before: Usage) -> str:
    """This rank is out of memory; others may wait for it, so nothing is asked of them here."""
    optimizer = moments_to_come(setup)
    fits = advice(heavy, lambda now: min(now.weights + before.free, now.total - 1))
    return (
        f"out of memory on rank {setup.world.rank} in the heaviest micro-batch of the epoch ({described(heavy.batch())}): "
        f"{gib(before.free)} of {gib(before.total)} GiB were left beside the weights, of which the optimizer takes "
        f"{gib(optimizer)}. {fits}"
    )


def _verdict(setup: PreparedRun, heavy: MemoryScenario, ranks: list[dict[str, Any]]) -> str:
    """What to print. The same ConfigError on all ranks when what is left on one of them is less than nothing."""
    left = [_headroom(row, ranks, setup.world.device) for row in ranks]
    worst = min(range(len(ranks)), key=left.__getitem__)
    row = ranks[worst]
    line = (
        f"peak {gib(row['peak'])} GiB of {gib(row['total'])} on rank {worst} in the heaviest micro-batch "
        f"({described(heavy.batch())}), optimizer {gib(row['optimizer'])} more, headroom {gib(left[worst])}"
    )
    if left[worst] < 0:
        raise ConfigError(f"{line}: it does not fit. {advice(heavy, lambda now: now.total + left[worst])}")
    return f"memory    {line}"


def moments_to_come(setup: PreparedRun) -> int:
    """Bytes that the optimizer of this rank will take beside what it has: the first update makes its two moments."""
    state = setup.trained.optimizer.state if setup.trained else {}
    new = [p for p in setup.model.parameters() if p.requires_grad and p not in state]
    return sum((p.to_local() if hasattr(p, "to_local") else p).numel() * 2 * MASTER for p in new)


def _headroom(row: dict[str, Any], ranks: list[dict[str, Any]], device: torch.device) -> int:
    """What is left of a rank's memory at the peak, the moments made. Ranks of one machine share that of the CPU."""
    sharing = [row] if device.type == "cuda" else [other for other in ranks if other["host"] == row["host"]]
    return int(row["free"] - sum(other["peak"] - other["now"] + other["optimizer"] for other in sharing))


def described(batch: Batch) -> str:
    """A micro-batch in numbers, for people."""
    count = sum(i >= 0 for i in batch.sample_ids.tolist())
    rows, width = batch.input_ids.shape
    tokens = f"{width:,} packed tokens" if batch.segment_lengths is not None else f"{rows} x {width:,} tokens"
    media = [f"{len(found.values):,} {name} rows for {len(found.slots):,} of them" for name, found in batch.media.items()]
    return ", ".join([f"{count} sample{'s' * (count != 1)}", tokens, *media])


def gib(size: float) -> str:
    """In GiB, small ones with more digits."""
    return f"{size / GIB:.1f}" if abs(size) >= GIB else f"{size / GIB:.3f}"
