"""Tables of what a single setting may be, but for those of `DataConfig`, and of settings that only some values of another read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from model.preference.config import WITH_REFERENCE
from trainer.config import RunConfig

POSITIVE = (
    *("batch.global_batch_size", "batch.micro_batch_size", "optim.lr", "optim.eps", "lora.rank", "lora.alpha"),
    *("checkpoint.every", "checkpoint.keep", "validation.every", "validation.max_samples", "validation.max_new_tokens"),
    *("log.every", "faults.max_nonfinite", "faults.stall_seconds", "loss_scale.growth_interval"),
)
NOT_NEGATIVE = (
    *("seed", "batch.micro_batch_tokens", "optim.projector_lr", "optim.weight_decay", "optim.clip_norm", "parallel.unit_mib"),
    *("train.max_steps", "preference.margin", "preference.preference_weight", "preference.quality_weight"),
    *("preference.desirable_weight", "preference.undesirable_weight"),
    *(f"model.{name}.lr" for name in ("llm", "vision", "vision_projector", "audio", "audio_projector", "state_head")),
)
COUNTS = ("optim.warmup_steps", "optim.decay_steps", "model.audio_projector.prompts")
POWERS = frozenset(2.0**n for n in range(-1074, 1024))
NO_POWER = "is not a power of two, as 1.0, 1024.0 or 65536.0: only those scale without rounding"
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(POSITIVE, (lambda v: 0 < v < math.inf, "is not positive")),
    **dict.fromkeys(NOT_NEGATIVE, (lambda v: 0 <= v < math.inf, "is negative or not finite")),
    "train.epochs": (lambda v: 0 < v < math.inf, "is not positive; train.max_steps = 0 builds a model without training"),
    **dict.fromkeys(("lora.dropout", "optim.momentum"), (lambda v: 0 <= v < 1, "is not in [0, 1)")),
    "optim.ns_steps": (lambda v: 1 <= v <= 20, "is not in 1 to 20; 5 is usual"),
    **dict.fromkeys(("optim.warmup_ratio", "optim.decay_ratio"), (lambda v: 0 <= v <= 1, "is not in [0, 1]")),
    **dict.fromkeys(COUNTS, (lambda v: v >= 0, "is negative")),
    **dict.fromkeys(("loss_scale.initial", "loss_scale.floor"), (lambda v: v in POWERS, NO_POWER)),
    "preference.beta": (lambda v: 0 < v < math.inf, "is not positive; 0.1 is usual, 2 to 10 for kind = 'simpo'"),
    "preference.label_smoothing": (lambda v: 0 <= v < 0.5, "is not in [0, 0.5): at 0.5 both answers are wanted alike"),
    "preference.sft_weight": (lambda v: v == -1 or 0 <= v < math.inf, "is negative or not finite; -1 is the kind's own"),
}
"""What a setting may be, and how a problem with its value goes on."""
ADAM, MOMENTUM = ("optim.kind", "adamw", "adamw8bit", "muon"), ("optim.kind", "muon", "sgd")
READ_BY = {
    **{"optim.betas": ADAM, "optim.eps": ADAM, "optim.momentum": MOMENTUM, "optim.nesterov": MOMENTUM},
    **{f"optim.{key}": ("optim.kind", "muon") for key in ("ns_steps", "adjust_lr")},
    **{f"optim.{key}": ("optim.schedule", "wsd") for key in ("decay_ratio", "decay_steps", "decay_shape")},
    "preference.label_smoothing": ("preference.kind", "dpo", "mpo"),
    "preference.length_normalisation": ("preference.kind", "dpo", "ipo", "mpo"),
    "preference.margin": ("preference.kind", "simpo"),
    **{f"preference.{key}": ("preference.kind", "mpo") for key in ("preference_weight", "quality_weight")},
    **{f"preference.{key}": ("preference.kind", "kto") for key in ("desirable_weight", "undesirable_weight")},
    "preference.reference": ("preference.kind", *WITH_REFERENCE),
}
"""The setting that decides, and its values with which one has an effect. Under muon, AdamW updates what is no hidden matrix."""


def range_problems(config: RunConfig) -> Iterator[str]:
    """Yield one line per setting whose value is outside of its limits."""
    for key, (allows, problem) in RANGES.items():
        if (value := number_at(config, key)) is not None and not allows(value):
            yield f"{key} = {value} {problem}"


def unread_settings(config: RunConfig) -> Iterator[str]:
    """Yield one line per setting of READ_BY that has no effect with the value of the one that decides."""
    for key, (by, *values) in READ_BY.items():
        table, _, name = by.partition(".")
        chosen = getattr(getattr(config, table), name)
        if is_set(config, key) and chosen not in values and chosen != "none":
            yield f"{key} has no effect with {by} = {chosen!r}: it is a setting of {' or '.join(map(repr, values))}"


def is_set(config: RunConfig, key: str) -> bool:
    """Tell whether a setting of a table at the top has another value than its default."""
    table, _, name = key.partition(".")
    found: object = getattr(config, table)
    return bool(getattr(found, name) != getattr(type(found)(), name))


def number_at(config: RunConfig, key: str) -> float | None:
    """Return the value of the setting `key`; None where it, or the part that has it, is not there."""
    found: float | None = None
    at: object = config
    for name in key.split("."):
        at = found = getattr(at, name, None)
    return found
