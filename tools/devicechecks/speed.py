"""Measurements: how fast the device multiplies, and how fast it trains models of published shapes, with pictures, packed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from model.batch import Batch
from tools.devicechecks.batches import mixed_samples, packed_batches
from tools.devicechecks.cards import peak_of
from tools.devicechecks.flops import useful_flops
from tools.devicechecks.models import PLAIN, Recipe, build, card_of, run_config
from tools.devicechecks.outcome import CheckResult, Context, Figure, Skipped
from tools.devicechecks.shapes import TINY, ModelShape
from tools.devicechecks.stepping import Stepper
from trainer.config import OptimConfig, ParallelConfig
from trainer.memory.footprint import footprint

GIB = 2**30
FILL = 0.85
"""Share of the free memory that a plan may take."""
Kind = Literal["none", "selective", "full"]
SETTINGS: tuple[tuple[int, Kind], ...] = (
    *((16384, "none"), (8192, "none"), (8192, "selective"), (8192, "full"), (4096, "selective"), (4096, "full")),
    *((2048, "none"), (2048, "full"), (1024, "full")),
)
"""Tokens of a micro-batch and recomputation, best first; the first that fits is measured."""
TINY_SETTING: tuple[int, Kind] = (512, "none")
NUM_ROWS = 4  # different micro-batches, in turn
SECONDS, MOST_STEPS = 6.0, 40


@dataclass(frozen=True)
class Load:
    """Training that is timed."""

    shape: ModelShape
    llm: Literal["frozen", "lora", "full"]
    rank: int = 64
    dropout: float = 0.05


def half_dtype(context: Context) -> Literal["float32", "bfloat16"]:
    """Return bfloat16 where the device computes in it, else float32."""
    fits = context.on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fits else "float32"


def measure_matmul(context: Context) -> CheckResult:
    """Time a large product of matrices of random numbers."""
    peak = peak_of(device_name(context))
    rate = matmul_rate(context)
    share = f", {rate / peak:.0%} of {peak:g}" if peak else ", a card that is not in the table of peaks"
    figures: dict[str, Figure] = {"tflops": rate, "peak_tflops": peak or 0.0, "card": device_name(context)}
    return CheckResult(rate > 0, f"{rate:.3g} TFLOP/s{share if context.on_gpu else ''}", figures)


def device_name(context: Context) -> str:
    return torch.cuda.get_device_name(context.device) if context.on_gpu else "CPU"


def matmul_rate(context: Context) -> float:
    """Return the TFLOP/s of a product of two large square matrices."""
    return _matmul_rate(context.device, 512 if not context.on_gpu else 8192, half_dtype(context))


@functools.cache
def _matmul_rate(device: torch.device, side: int, dtype: str) -> float:
    half = device.type == "cuda" and dtype == "float32"  # an older card, whose fast products are of float16
    a, b = (torch.randn(side, side, device=device).to(torch.float16 if half else getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    seconds, _ = timed(lambda: torch.mm(a, b, out=out), device, warm_up=3, seconds=1.0, most=30)
    return float(2 * side**3 / seconds / 1e12)


def timed(run: Callable[[], object], device: torch.device, *, warm_up: int, seconds: float, most: int) -> tuple[float, int]:
    """Return the seconds of one `run`, the mean of as many as take about `seconds`, at most `most`, and their number."""
    for _ in range(warm_up):
        run()
    synchronise(device)
    began = time.perf_counter()
    run()
    synchronise(device)
    count = max(2, min(most, int(seconds / max(time.perf_counter() - began, 1e-6))))
    began = time.perf_counter()
    for _ in range(count):
        run()
    synchronise(device)
    return (time.perf_counter() - began) / count, count


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_training(load: Load, is_compiled: bool, context: Context) -> CheckResult:
    """Train a model of `load`'s shape on packed rows with pictures; count real tokens and useful operations per second."""
    parallel = replace(PLAIN, compile=is_compiled)
    if context.tiny and is_compiled and load.llm != "lora":
        raise Skipped("--tiny compiles one of the shapes")
    shape = TINY if context.tiny else load.shape
    optim = OptimConfig(lr=1e-5)
    recipe = Recipe(load.llm, "frozen", half_dtype(context), True, load.rank, load.dropout, parallel, optim)
    num_tokens, kind = TINY_SETTING if context.tiny else choose_setting(shape, recipe, context)
    recipe = replace(recipe, parallel=replace(parallel, activation_checkpointing=kind))
    prepared = build(shape, recipe, context, made_on=context.device)
    batches = packed_batches(
        mixed_samples(prepared.data.card, samples_for(num_tokens), longest=100 if context.tiny else 0), num_tokens
    )
    batches = batches[:NUM_ROWS]
    stepper = Stepper(prepared, batches)
    if context.on_gpu:
        torch.cuda.reset_peak_memory_stats(context.device)
    began = time.perf_counter()
    stepper.warm_up(2 * len(batches))
    synchronise(context.device)
    first = time.perf_counter() - began
    seconds = 0.5 if context.tiny else SECONDS
    # Whole rounds: micro-batches differ in their work.
    each, rounds = timed(lambda: stepper.warm_up(len(batches)), context.device, warm_up=0, seconds=seconds, most=MOST_STEPS)
    flops = sum(useful_flops(prepared.model, batch).total for batch in batches)
    found = rates(batches, each, flops, context)
    found |= {"steps": rounds * len(batches), "warm_up_seconds": first, "tokens_per_micro_batch": num_tokens, "recomputed": kind}
    return CheckResult(True, describe(found), found)


def samples_for(num_tokens: int) -> int:
    """Return more samples than `NUM_ROWS` rows of so many tokens hold."""
    return NUM_ROWS * (num_tokens // 60 if num_tokens < 1024 else num_tokens // 300) + 16


def rates(batches: list[Batch], seconds: float, flops: float, context: Context) -> dict[str, Figure]:
    """Return what was reached: real tokens and samples a second, useful TFLOP/s, and their share of the card's limit."""
    tokens, samples = sum(b.num_real_tokens for b in batches), sum(len(b.lengths) for b in batches)
    tflops = flops / seconds / 1e12
    peak, product = peak_of(device_name(context)), matmul_rate(context)
    found: dict[str, Figure] = {
        "tokens_per_second": tokens / seconds,
        "samples_per_second": samples / seconds,
        "useful_tflops": tflops,
        "of_matmul": tflops / product,
    }
    if peak:
        found["mfu"] = tflops / peak
    if context.on_gpu:
        found["peak_gib"] = torch.cuda.max_memory_allocated(context.device) / GIB
    return found


def describe(found: dict[str, Figure]) -> str:
    """Describe the rates in one line."""
    share = f"{found['mfu']:.1%} MFU" if "mfu" in found else f"{found['of_matmul']:.1%} of a large product"
    memory = f", {found['peak_gib']:.1f} GiB" if "peak_gib" in found else ""
    how = f"{found['tokens_per_micro_batch']} tokens, recomputed: {found['recomputed']}" if "recomputed" in found else "padded"
    speed = f"{found['tokens_per_second']:,.0f} tokens/s, {found['useful_tflops']:.3g} useful TFLOP/s, {share}"
    return f"{speed}{memory} ({how})"


def choose_setting(shape: ModelShape, recipe: Recipe, context: Context) -> tuple[int, Kind]:
    """Return the tokens of a micro-batch and the recomputation that the plan expects to fit. Raises `Skipped` where none does."""
    if not context.on_gpu:
        raise Skipped("for a GPU; --tiny measures a small shape")
    free, _ = torch.cuda.mem_get_info(context.device)
    free += torch.cuda.memory_reserved(context.device) - torch.cuda.memory_allocated(context.device)
    least, card = float("inf"), card_of(run_config(shape, recipe, context))
    for num_tokens, kind in SETTINGS:
        batch = packed_batches(mixed_samples(card, samples_for(num_tokens)), num_tokens)[0]
        needed = footprint(card, ParallelConfig(strategy="ddp", activation_checkpointing=kind), 1, batch, 1).total
        if needed <= FILL * free:
            return num_tokens, kind
        least = min(least, needed)
    raise Skipped(f"takes {least / GIB:.1f} GiB at least, and {free / GIB:.1f} are free")
