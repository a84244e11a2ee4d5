"""Checks of what surrounds the numbers: host syncs, page-locked memory, and the plan's memory beside the allocator's."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from model.batch import Batch
from tools.bench_step import Counter, hidden_syncs
from tools.devicechecks.batches import mixed_samples, packed_batches, steps_of
from tools.devicechecks.exactness import LONGEST, small
from tools.devicechecks.models import Recipe, build, card_of
from tools.devicechecks.outcome import MEBI, Context, Figure, Finding, Skipped
from tools.devicechecks.shapes import HALF_B
from tools.devicechecks.stepping import Stepper
from trainer.checkpoint.host_staging import Staging
from trainer.config import OptimConfig
from trainer.memory.footprint import footprint

WARM_UP, WATCHED = 3, 4
PLAN_BOUND = 0.12
"""Largest distance of the plan's total from the peak, as a share of the peak."""
PLAN_TOKENS = 4096


@contextmanager
def syncs_refused(device: torch.device) -> Iterator[None]:
    """Make every operation on a GPU that waits for it an error, by torch's own debug mode."""
    mode = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)


def check_syncs(context: Context) -> Finding:
    """Train LoRA with dropout on packed rows: no step waits for the device, copies to it and the deferred read included.

    On a CPU the operators that would wait are counted: one a step, the read of the step before.
    """
    half = context.on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    recipe = Recipe(llm="lora", dropout=0.1, packing=True, dtype="bfloat16" if half else "float32")
    prepared = build(small(context), recipe, context)
    batches = [batch for step in steps_of(prepared.data.card, 2, packed=True, longest=60) for batch in step]
    stepper = Stepper(prepared, batches)
    stepper.warm_up(WARM_UP + len(batches))
    if context.on_gpu:
        torch.cuda.synchronize(context.device)
        with syncs_refused(context.device):
            stepper.warm_up(WATCHED)
        return Finding(True, f"none in {WATCHED} steps", {"syncs_per_step": 0})
    with Counter() as counter, hidden_syncs(counter):
        stepper.warm_up(WATCHED)
    per_step = counter.num_syncs / WATCHED
    text = f"{per_step:g} a step, of which 1 reads the step before"
    return Finding(per_step == 1, text, {"syncs_per_step": per_step - 1})


def check_staging(context: Context) -> Finding:
    """Copy batches to the device and what a checkpoint holds from it through page-locked memory, without waiting."""
    if not context.on_gpu:
        raise Skipped("pages are locked for a GPU only")
    prepared = build(small(context), Recipe(), context)
    (batch,) = steps_of(prepared.data.card, 1, longest=LONGEST[small(context).name])[0][:1]
    locked = batch.pin_memory()
    are_locked = all(tensor.is_pinned() for tensor in tensors_of(locked))
    with syncs_refused(context.device):
        here = locked.to(context.device)
    torch.cuda.synchronize(context.device)
    arrived = all(torch.equal(a.cpu(), b) for a, b in zip(tensors_of(here), tensors_of(batch), strict=True))
    staged, rate = staged_bytes(context.device)
    figures: dict[str, Figure] = {"gigabytes_per_second": rate}
    text = f"batch page-locked: {are_locked}, arrived: {arrived}; checkpoint staged: {staged}, {rate:.1f} GB/s to the host"
    return Finding(are_locked and arrived and staged, text, figures)


def tensors_of(batch: Batch) -> list[Tensor]:
    """Return every tensor of a batch."""
    found = [value for value in vars(batch).values() if isinstance(value, Tensor)]
    return found + [value for media in batch.media.values() for value in vars(media).values() if isinstance(value, Tensor)]


def staged_bytes(device: torch.device) -> tuple[bool, float]:
    """Stage tensors as a checkpoint does, change them at once, and compare the copy with what they were: GB/s beside."""
    sizes = {"large": 64 * MEBI, "small": 1000, "other": 1001}
    tensors = {name: torch.randn(size, device=device) for name, size in sizes.items()}
    tensors["moments"] = torch.randn(257, 33, device=device).bfloat16()
    before = {name: tensor.cpu() for name, tensor in tensors.items()}
    staging = Staging(sum(t.nbytes for t in tensors.values()) + MEBI, device)
    staging.take(tensors)
    staging.ready()
    with syncs_refused(device):
        began = time.perf_counter()
        staging.take(tensors)
        for tensor in tensors.values():
            tensor.zero_()
    staging.ready()
    seconds = time.perf_counter() - began
    data = staging.buffer
    ranges = {r.name: data[r.begin : r.end] for r in staging.plan.ranges}
    same = all(torch.equal(ranges[name].view(t.dtype), t.reshape(-1)) for name, t in before.items())
    return same and bool(data.is_pinned()), sum(t.nbytes for t in tensors.values()) / seconds / 1e9


def check_memory(context: Context) -> Finding:
    """Compare the plan's bytes of a step with the most that the allocator has held: a 0.5B model, all but its tower tuned."""
    if not context.on_gpu:
        raise Skipped("the CPU's allocator keeps no peak; tests/tools/test_plan.py holds the plan to torch's profiler")
    shape = small(context) if context.tiny else HALF_B
    free, _ = torch.cuda.mem_get_info(context.device)
    recipe = Recipe(dtype="bfloat16", packing=True, optim=OptimConfig(lr=1e-5))
    before = torch.cuda.memory_allocated(context.device)
    prepared = build(shape, recipe, context, made_on=context.device)
    batch = packed_batches(mixed_samples(prepared.data.card, 32), PLAN_TOKENS)[0]
    config = replace(prepared.config, output_dir=str(context.folder / "plan"))
    planned = footprint(card_of(config), config.parallel, 1, batch, 1).total
    if planned > free:
        raise Skipped(f"takes {planned / 2**30:.1f} GiB, and {free / 2**30:.1f} are free")
    stepper = Stepper(prepared, [batch])
    stepper.warm_up(2)
    gc.collect()
    torch.cuda.reset_peak_memory_stats(context.device)
    stepper.warm_up(2)
    torch.cuda.synchronize(context.device)
    peak = torch.cuda.max_memory_allocated(context.device) - before
    return compare_memory(planned, peak)


def compare_memory(planned: int, peak: int) -> Finding:
    """Return whether a plan is near enough to the peak."""
    share = planned / peak - 1
    text = f"plan {planned / 2**30:.2f} GiB, allocator {peak / 2**30:.2f} GiB ({share:+.1%})"
    return Finding(abs(share) <= PLAN_BOUND, text, {"planned_bytes": planned, "peak_bytes": peak})
