"""Learning-rate schedules as pure functions of the step: resume needs no state. The curves are those of transformers."""

from __future__ import annotations

import math

from model.errors import ConfigError
from trainer.config import OptimConfig


def warmup_steps(config: OptimConfig, total: int) -> int:
    return math.ceil(total * (config.warmup_ratio or 0.0)) if config.warmup_steps is None else config.warmup_steps


def decay_steps(config: OptimConfig, total: int) -> int:
    return math.ceil(total * (config.decay_ratio or 0.0)) if config.decay_steps is None else config.decay_steps


def describe_schedule(config: OptimConfig, total: int) -> str:
    """Describe warm-up and schedule of `total` steps for people."""
    text = f"{warmup_steps(config, total)} of warm-up, {config.schedule}"
    return f"{text}, the last {decay_steps(config, total)} {config.decay_shape} to 0" if config.schedule == "wsd" else text


def check_schedule(config: OptimConfig, total: int) -> None:
    """Raise `ConfigError` when warm-up and decay of the wsd schedule do not fit into `total` steps."""
    warmup, decay = warmup_steps(config, total), decay_steps(config, total)
    if config.schedule == "wsd" and 0 < total < warmup + decay:
        raise ConfigError(
            f"optim.schedule = 'wsd' with {warmup} steps of warm-up and {decay} of decay does not fit into {total} steps: lower "
            "optim.warmup_steps (or warmup_ratio) or optim.decay_steps (or decay_ratio), or train longer"
        )


def multiplier(config: OptimConfig, step: int, total: int) -> float:
    """Return the factor on the peak learning rate at 0-based `step`: 0 to 1 during warm-up, then the curve of the schedule.

    The linear and the cosine curve end at 0 at `total`. With wsd (warm-up, stable, decay) the rate stays at its peak until the last
    `decay_steps` steps, in which it falls to 0 by the curve of optim.decay_shape.
    """
    warmup = warmup_steps(config, total)
    if step < warmup:
        return step / warmup
    if config.schedule == "wsd":
        decay = decay_steps(config, total)
        return CURVES[config.decay_shape](min(1.0, max(0, step - (total - decay)) / max(1, decay)))
    progress = (step - warmup) / max(1, total - warmup)
    return CURVES[config.schedule](min(1.0, progress))


CURVES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
