"""Checks of [optim] and [loss_scale]: settings that contradict each other, and what they need of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from trainer.config import RunConfig


def optim_problems(config: RunConfig) -> Iterator[str]:
    """Yield the wrong values of [optim] and [loss_scale] and what they lack, one line each."""
    optim = config.optim
    if not all(0 <= beta < 1 for beta in optim.betas):
        yield f"optim.betas = {list(optim.betas)} are not in [0, 1)"
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
    for phase in ("warmup", "decay"):
        if None not in (getattr(optim, f"{phase}_ratio"), getattr(optim, f"{phase}_steps")):
            yield f"optim.{phase}_ratio and optim.{phase}_steps are both named: name one"
    if optim.schedule == "wsd" and (optim.warmup_ratio or 0) + (optim.decay_ratio or 0) > 1:
        yield (
            f"optim.warmup_ratio = {optim.warmup_ratio} and optim.decay_ratio = {optim.decay_ratio} are more than the whole run "
            "together: lower one"
        )
    if config.loss_scale.floor > config.loss_scale.initial:
        yield f"loss_scale.floor = {config.loss_scale.floor} is more than loss_scale.initial = {config.loss_scale.initial}"
