"""Checks of [preference] and of what it needs of the other settings."""

from __future__ import annotations

import math
from collections.abc import Iterator

from model.preference.config import WITH_REFERENCE, PreferenceConfig
from trainer.config import RunConfig

READ_BY = {
    "label_smoothing": ("dpo", "mpo"),
    "length_normalisation": ("dpo", "ipo", "mpo"),
    "margin": ("simpo",),
    "preference_weight": ("mpo",),
    "quality_weight": ("mpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference": WITH_REFERENCE,
}
"""Values of preference.kind with which a setting has an effect."""


def preference_problems(config: RunConfig) -> Iterator[str]:
    """Yield the wrong values of [preference], one line each, and what does not go together with it."""
    found = config.preference
    if not 0 < found.beta < math.inf:
        yield f"preference.beta = {found.beta} is not positive; 0.1 is usual, 2 to 10 for kind = 'simpo'"
    if not 0 <= found.label_smoothing < 0.5:
        yield f"preference.label_smoothing = {found.label_smoothing} is not in [0, 0.5): at 0.5 both answers are wanted alike"
    if not (found.sft_weight == -1 or 0 <= found.sft_weight < math.inf):
        yield f"preference.sft_weight = {found.sft_weight} is negative or not finite; -1 is the kind's own"
    for key in ("margin", "preference_weight", "quality_weight", "desirable_weight", "undesirable_weight"):
        if not 0 <= (value := getattr(found, key)) < math.inf:
            yield f"preference.{key} = {value} is negative or not finite"
    if found.is_on and config.data.packing and config.parallel.compile:
        yield (
            f"parallel.compile = {config.parallel.compile!r} with data.packing = true and [preference]: blocks are not compiled "
            "for answers that share a prompt; set one of the two to false"
        )


def idle_preference_settings(config: RunConfig) -> Iterator[str]:
    """Yield one line per setting of [preference] that has no effect; the line begins with the key, or the [table]."""
    found = config.preference
    if not found.is_on:
        if found != PreferenceConfig():
            yield "[preference] has no effect with preference.kind = 'none': name a kind, as 'dpo'"
        return
    for key, kinds in READ_BY.items():
        if getattr(found, key) != getattr(PreferenceConfig(), key) and found.kind not in kinds:
            use = " or ".join(map(repr, kinds))
            yield f"preference.{key} has no effect with preference.kind = {found.kind!r}: it is a setting of {use}"
