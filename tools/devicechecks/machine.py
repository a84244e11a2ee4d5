"""Checks of what surrounds the numbers: host syncs, page-locked memory, and the plan's memory beside the allocator's."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from model.batch import Batch
from tools.bench_step import Counter, hidden_syncs
from tools.devicechecks.batches import mixed_samples, packed_batches, steps_of
from tools.devicechecks.exactness import LONGEST, small
from tools.devicechecks.models import Recipe, build, card_of, run_config
from tools.devicechecks.outcome import MEBI, CheckResult, Context, Figure, Skipped
from tools.devicechecks.shapes import HALF_B, TINY
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


def check_syncs(context: Context) -> CheckResult:
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
        return CheckResult(True, f"none in {WATCHED} steps", {"syncs_per_step": 0})
    with Counter() as counter, hidden_syncs(counter):
        stepper.warm_up(WATCHED)
    per_step = counter.num_syncs / WATCHED
    text = f"{per_step:g} a step, of which 1 reads the step before"
    return CheckResult(per_step == 1, text, {"syncs_per_step": per_step - 1})


def check_staging(context: Context) -> CheckResult:
    """Copy batches to the device and what a checkpoint holds from it through page-locked memory, without waiting."""
    if not context.on_gpu:
        raise Skipped("pages are locked for a GPU only")
    prepared = build(small(context), Recipe(), context)
    (batch,) = steps_of(prepared.data.card, 1, longest=LONGEST[small(context).name])[0][:1]
    locked = batch.pin_memory()
    are_locked = all(tensor.is_pinned() for tensor in batch_tensors(locked) if tensor.numel())
    with syncs_refused(context.device):
        here = locked.to(context.device)
    torch.cuda.synchronize(context.device)
    arrived = all(torch.equal(a.cpu(), b) for a, b in zip(batch_tensors(here), batch_tensors(batch), strict=True))
    same, staged_locked, rate = staged_bytes(context.device, 64 * MEBI)
    figures: dict[str, Figure] = {"gigabytes_per_second": rate}
    batch_text = f"batch {'' if are_locked else 'not '}page-locked, {'arrived' if arrived else 'changed on the way'}"
    text = (
        f"{batch_text}; checkpoint {'' if staged_locked else 'not '}page-locked, {'equal' if same else 'changed'}, {rate:.1f} GB/s"
    )
    return CheckResult(are_locked and arrived and same and staged_locked, text, figures)


def batch_tensors(batch: Batch) -> list[Tensor]:
    """Return every tensor of a batch."""
    found = [value for value in vars(batch).values() if isinstance(value, Tensor)]
    return found + [value for media in batch.media.values() for value in vars(media).values() if isinstance(value, Tensor)]


def staged_bytes(device: torch.device, size: int) -> tuple[bool, bool, float]:
    """Stage tensors, one of `size` numbers, as a checkpoint does, and change them at once.

    Return whether the copy is what they were, whether it is in page-locked memory, and the GB/s of copying.
    """
    sizes = {"large": size, "small": 1000, "other": 1001}
    tensors = {name: torch.randn(size, device=device) for name, size in sizes.items()}
    tensors["moments"] = torch.randn(257, 33, device=device).bfloat16()
    before = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
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
    copied = {r.name: data[r.begin : r.end].view(r.dtype) for r in staging.plan.ranges}
    same = all(torch.equal(copied[name], tensor.reshape(-1)) for name, tensor in before.items())
    return same, device.type == "cuda" and data.is_pinned(), sum(t.nbytes for t in tensors.values()) / seconds / 1e9


def check_memory(context: Context) -> CheckResult:
    """Compare the plan's bytes of a step with the most that the allocator has held: a 0.5B model, all but its tower tuned."""
    if not context.on_gpu:
        raise Skipped("the CPU's allocator keeps no peak; tests/tools/test_plan.py holds the plan to torch's profiler")
    shape, device = TINY if context.tiny else HALF_B, context.device
    recipe = Recipe(dtype="bfloat16", packing=True, optim=OptimConfig(lr=1e-5))
    config = run_config(shape, recipe, context)
    card = card_of(config)
    batch = packed_batches(mixed_samples(card, 32), PLAN_TOKENS)[0]
    planned = footprint(card, config.parallel, 1, batch, 1).total
    free, _ = torch.cuda.mem_get_info(device)
    if planned > free:
        raise Skipped(f"takes {planned / 2**30:.1f} GiB, and {free / 2**30:.1f} are free")
    before = torch.cuda.memory_allocated(device)
    prepared = build(shape, recipe, context, made_on=device)
    stepper = Stepper(prepared, [batch])
    stepper.warm_up(2)
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    stepper.warm_up(2)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return compare_memory(planned, peak)


def compare_memory(planned: int, peak: int) -> CheckResult:
    """Return whether a plan is near enough to the peak."""
    share = planned / peak - 1
    text = f"plan {planned / 2**30:.2f} GiB, allocator {peak / 2**30:.2f} GiB ({share:+.1%})"
    return CheckResult(abs(share) <= PLAN_BOUND, text, {"planned_bytes": planned, "peak_bytes": peak})
