"""Checks of numbers: the device computes what the CPU computes, and packed rows what padded ones do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from model.llm import attention
from tools.devicechecks.batches import steps_of
from tools.devicechecks.models import Recipe, build, on_cpu
from tools.devicechecks.numbers import (
    GRADIENT_BOUND,
    LOSS_BOUND,
    Taken,
    gradient_distance,
    loss_distance,
    mean_distance,
    strict_float32,
    take_steps,
)
from tools.devicechecks.outcome import CheckResult, Context, Figure
from tools.devicechecks.shapes import SMALL, TINY, ModelShape

NUM_STEPS = 3
LONGEST = {"tiny": 60, "small": 400}
"""Tokens of text that a sample has at most, by the shape: several tiles of an attention kernel on a GPU."""
ROUNDING, ROUNDING_FLOOR = 2.0, 2e-3
"""How much further than the rounding of the CPU, or of the way it is compared with, a result in few bits may be."""


def small(context: Context) -> ModelShape:
    return TINY if context.tiny else SMALL


def taken(context: Context, recipe: Recipe, *, packed: bool = False, num_steps: int = NUM_STEPS) -> Taken:
    """Return losses and gradients of a run of the small shape with made-up samples; packed or not, they are the same samples."""
    shape = small(context)
    prepared = build(shape, recipe, context)
    return take_steps(prepared, steps_of(prepared.data.card, num_steps, packed=packed, longest=LONGEST[shape.name]))


def same_numbers(found: Taken, expected: Taken, *, bounds: tuple[float, float] = (LOSS_BOUND, GRADIENT_BOUND)) -> CheckResult:
    """Compare float32 losses and gradients with those expected."""
    losses, gradients = loss_distance(found, expected), gradient_distance(found, expected)
    figures: dict[str, Figure] = {"loss_distance": losses, "gradient_distance": gradients, "losses": len(found.losses)}
    return CheckResult(
        losses <= bounds[0] and gradients <= bounds[1], f"losses {losses:.1e}, gradients {gradients:.1e} apart", figures
    )


def within_rounding(found: Taken, rounded: Taken, exact: Taken, name: str) -> CheckResult:
    """Compare the distance of a result in few bits from the exact one with that of another result in as few."""
    ours, theirs = mean_distance(found, exact), mean_distance(rounded, exact)
    losses, their_losses = loss_distance(found, exact), loss_distance(rounded, exact)
    passed = ours <= ROUNDING * theirs + ROUNDING_FLOOR and losses <= ROUNDING * their_losses + ROUNDING_FLOOR
    figures: dict[str, Figure] = {"gradient_error": ours, "its_gradient_error": theirs, "loss_error": losses}
    return CheckResult(passed, f"gradients {ours:.1e} from float32, {name} {theirs:.1e}; losses {losses:.1e}", figures)


def check_float32(context: Context) -> CheckResult:
    """Train three steps in float32, everything tuned, on the device and on the CPU."""
    recipe = Recipe(llm="full", vision="full")
    with strict_float32():
        return same_numbers(taken(context, recipe), taken(on_cpu(context), recipe))


def check_bfloat16(context: Context) -> CheckResult:
    """Train in bfloat16 on the device: no further from float32 on the CPU than twice what bfloat16 on the CPU is."""
    whole, half = Recipe(llm="full", vision="full"), Recipe(llm="full", vision="full", dtype="bfloat16")
    with strict_float32():
        exact = taken(on_cpu(context), whole)
    return within_rounding(taken(context, half), taken(on_cpu(context), half), exact, "the CPU's bfloat16")


def check_float16(context: Context) -> CheckResult:
    """Train in float16 with a scaled loss on the device, overflows skipped: no further from float32 than bfloat16 on the CPU."""
    whole = Recipe(llm="full", vision="full")
    with strict_float32():
        exact = taken(on_cpu(context), whole)
    rounded = taken(on_cpu(context), replace(whole, dtype="bfloat16"))
    return within_rounding(taken(context, replace(whole, dtype="float16")), rounded, exact, "the CPU's bfloat16")


def check_packed(context: Context) -> CheckResult:
    """Train the same samples packed and padded: equal in float32, and within rounding in bfloat16, with the device's kernel."""
    whole, half = Recipe(packing=True), Recipe(packing=True, dtype="bfloat16")
    with strict_float32():
        padded = taken(context, whole)
        found = same_numbers(taken(context, whole, packed=True), padded)
    with kernel_calls() as calls:
        packed = taken(context, half, packed=True)
    rounded = within_rounding(packed, taken(context, half), padded, "padded")
    used = f"{len(calls)} calls of the varlen kernel" if calls else "no varlen kernel"
    wanted = context.on_gpu and torch.cuda.get_device_capability(context.device) >= attention.VARLEN_CAPABILITY
    seen = f"float32: {found.seen}; bfloat16: {rounded.seen}; {used}"
    return CheckResult(
        found.passed and rounded.passed and bool(calls) == wanted,
        seen,
        {**found.figures, **{f"bfloat16_{k}": v for k, v in rounded.figures.items()}, "varlen_calls": len(calls)},
    )


@contextmanager
def kernel_calls() -> Iterator[list[int]]:
    """Count calls of the kernel that computes all segments of a packed row at once."""
    original, calls = attention.varlen_segments, list[int]()

    def counted(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, options: dict[str, object]) -> Tensor:
        calls.append(q.shape[2])
        return original(q, k, v, borders, longest, options)

    with patch.object(attention, "varlen_segments", counted):
        yield calls
