"""Checks of [optim], of [loss_scale] and of what they need of the machine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec

from trainer.config import LossScaleConfig, OptimConfig, RunConfig

READ_BY = {
    "betas": ("adamw", "adamw8bit", "muon"),
    "eps": ("adamw", "adamw8bit", "muon"),
    "momentum": ("muon", "sgd"),
    "nesterov": ("muon", "sgd"),
    "ns_steps": ("muon",),
    "adjust_lr": ("muon",),
}
"""Values of optim.kind with which a setting has an effect. Under muon, AdamW updates what is no hidden matrix."""
MOST_NS_STEPS = 20


def optim_problems(config: RunConfig) -> Iterator[str]:
    """Yield the wrong values of [optim] and [loss_scale] and what they lack, one line each."""
    optim = config.optim
    if not 0 <= optim.momentum < 1:
        yield f"optim.momentum = {optim.momentum} is not in [0, 1)"
    if not 1 <= optim.ns_steps <= MOST_NS_STEPS:
        yield f"optim.ns_steps = {optim.ns_steps} is not in 1 to {MOST_NS_STEPS}; 5 is usual"
    if optim.kind == "adamw8bit" and find_spec("bitsandbytes") is None:
        yield "optim.kind = 'adamw8bit' needs bitsandbytes, which is not installed: pip install -e '.[quantize]', or use 'adamw'"
    if config.parallel.cpu_offload and optim.kind in ("adamw8bit", "muon"):
        why = {
            "adamw8bit": "has slow kernels there, and offloaded moments need not be small",
            "muon": "would multiply matrices there",
        }
        yield (
            f"optim.kind = {optim.kind!r} with parallel.cpu_offload = true, which updates on the host: it {why[optim.kind]}; use "
            "optim.kind = 'adamw', or parallel.cpu_offload = false"
        )
    yield from _schedule(optim)
    yield from _loss_scale(config.loss_scale)


def _schedule(optim: OptimConfig) -> Iterator[str]:
    """Yield the problems of warm-up and decay."""
    for phase in ("warmup", "decay"):
        ratio, steps = getattr(optim, f"{phase}_ratio"), getattr(optim, f"{phase}_steps")
        if ratio is not None and steps is not None:
            yield f"optim.{phase}_ratio and optim.{phase}_steps are both named: name one"
        if not 0 <= (ratio or 0) <= 1:
            yield f"optim.{phase}_ratio = {ratio} is not in [0, 1]"
        if (steps or 0) < 0:
            yield f"optim.{phase}_steps = {steps} is negative"
    if optim.schedule == "wsd" and (optim.warmup_ratio or 0) + (optim.decay_ratio or 0) > 1:
        yield (
            f"optim.warmup_ratio = {optim.warmup_ratio} and optim.decay_ratio = {optim.decay_ratio} are more than the whole run "
            "together: lower one"
        )


def _loss_scale(config: LossScaleConfig) -> Iterator[str]:
    """Yield the problems of the loss scale."""
    for key in ("initial", "floor"):
        value = getattr(config, key)
        if not (0 < value < math.inf and math.frexp(value)[0] == 0.5):
            yield f"loss_scale.{key} = {value} is not a power of two, as 1.0, 1024.0 or 65536.0: only those scale without rounding"
    if config.growth_interval < 1:
        yield f"loss_scale.growth_interval = {config.growth_interval} is not positive"
    if config.floor > config.initial:
        yield f"loss_scale.floor = {config.floor} is more than loss_scale.initial = {config.initial}"


def idle_optim_settings(config: RunConfig) -> Iterator[str]:
    """Yield one line per setting of [optim] and [loss_scale] that has no effect; the line begins with the key, or the [table]."""
    optim = config.optim
    for key, kinds in READ_BY.items():
        if getattr(optim, key) != getattr(OptimConfig(), key) and optim.kind not in kinds:
            use = " or ".join(map(repr, kinds))
            yield f"optim.{key} has no effect with optim.kind = {optim.kind!r}: it is a setting of {use}"
    if optim.kind == "sgd" and optim.momentum == 0 and optim.nesterov != OptimConfig().nesterov:
        yield "optim.nesterov has no effect with optim.momentum = 0"
    for key in ("decay_ratio", "decay_steps", "decay_shape"):
        if getattr(optim, key) != getattr(OptimConfig(), key) and optim.schedule != "wsd":
            yield f"optim.{key} has no effect with optim.schedule = {optim.schedule!r}: it is a setting of 'wsd'"
    if config.loss_scale != LossScaleConfig() and config.model.dtype != "float16":
        yield f"[loss_scale] has no effect with model.dtype = {config.model.dtype!r}: it is a table of 'float16'"
