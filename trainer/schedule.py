"""Learning-rate schedules as pure functions of the step: resume needs no state. The curves are those of transformers."""

from __future__ import annotations

import math

from trainer.config import OptimConfig


def warmup_steps(config: OptimConfig, total: int) -> int:
    if config.warmup_steps is not None:
        return config.warmup_steps
    return math.ceil(total * (config.warmup_ratio or 0.0))


def multiplier(config: OptimConfig, step: int, total: int) -> float:
    """Return the factor on the peak learning rate at 0-based `step`: 0 to 1 during warm-up, then the curve of the schedule.

    The linear and the cosine curve end at 0 at `total`.
    """
    warmup = warmup_steps(config, total)
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return CURVES[config.schedule](min(1.0, progress))


CURVES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
