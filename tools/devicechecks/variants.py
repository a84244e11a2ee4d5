"""Checks of the ways to train the same: recomputation, compiled blocks, and the wrappers that share a model among ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from tools.devicechecks.batches import steps_of
from tools.devicechecks.exactness import LONGEST, NUM_STEPS, same_numbers, small, taken, within_rounding
from tools.devicechecks.models import PLAIN, Recipe, build_from, random_values, run_config
from tools.devicechecks.numbers import Taken, strict_float32, take_steps
from tools.devicechecks.outcome import CheckResult, Context, Figure, Skipped
from trainer.config import ParallelConfig

DROPOUT = 0.1
LORA = Recipe(llm="lora", vision="lora", dropout=DROPOUT, packing=True)


def check_recomputation(context: Context) -> CheckResult:
    """Train LoRA with dropout on packed rows, keeping all activations, products alone, and none."""
    kinds: list[Literal["selective", "full"]] = ["selective", "full"]
    with strict_float32():
        kept = taken(context, LORA, packed=True)
        found = {kind: taken(context, replace(LORA, parallel=recomputing(kind)), packed=True) for kind in kinds}
    return together({kind: same_numbers(numbers, kept) for kind, numbers in found.items()})


def recomputing(kind: Literal["none", "selective", "full"]) -> ParallelConfig:
    return replace(PLAIN, activation_checkpointing=kind)


def check_compiled(context: Context) -> CheckResult:
    """Train with compiled blocks and without: equal in float32, and within rounding in bfloat16."""
    parallel = replace(PLAIN, compile=True)
    recipe = Recipe(llm="lora", packing=True)
    with strict_float32():
        eager = taken(context, recipe, packed=True)
        found = same_numbers(taken(context, replace(recipe, parallel=parallel), packed=True), eager)
    if context.tiny:  # every type is another graph
        return found
    half = replace(recipe, dtype="bfloat16")
    fast = taken(context, replace(half, parallel=parallel), packed=True)
    rounded = within_rounding(fast, taken(context, half, packed=True), eager, "eager")
    return together({"float32": found, "bfloat16": rounded})


def check_offloaded(context: Context) -> CheckResult:
    """Train with masters, gradients and moments on the host."""
    if not context.on_gpu:
        raise Skipped("for a GPU: on a CPU they are there already")
    recipe = Recipe(llm="full", vision="full")
    with strict_float32():
        return same_numbers(taken(context, replace(recipe, parallel=replace(PLAIN, cpu_offload=True))), taken(context, recipe))


def check_sharded(context: Context) -> CheckResult:
    """Train in one process, in DDP and in FSDP2, both around a group of this process alone."""
    recipe = Recipe(llm="full", vision="full")
    with strict_float32():
        alone = taken(context, recipe)
        found = {"DDP": wrapped(context, recipe, "ddp"), "FSDP2": wrapped(context, recipe, "fsdp")}
    return together({name: same_numbers(numbers, alone) for name, numbers in found.items()})


def wrapped(context: Context, recipe: Recipe, strategy: Literal["ddp", "fsdp"]) -> Taken:
    """Return losses and gradients of a run that is wrapped although it has one rank."""
    config = replace(run_config(small(context), recipe, context), parallel=ParallelConfig(strategy=strategy))
    # DDP wraps a model where there are several ranks: their group, which is asked for sums, is this process.
    world = replace(context.world, size=2) if strategy == "ddp" else context.world
    prepared = build_from(config, world, random_values("cpu"), sharded=strategy == "fsdp")
    return take_steps(prepared, steps_of(prepared.data.card, NUM_STEPS, longest=LONGEST[small(context).name]))


def together(findings: dict[str, CheckResult]) -> CheckResult:
    """Join the findings of several ways into one, which passes where all do."""
    figures: dict[str, Figure] = {f"{way}_{key}": v for way, found in findings.items() for key, v in found.figures.items()}
    text = "; ".join(f"{way}: {found.seen}" for way, found in findings.items())
    return CheckResult(all(found.passed for found in findings.values()), text, figures)
