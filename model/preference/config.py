"""Settings of preference tuning: `[preference]` of run.toml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PAIRED = ("dpo", "ipo", "simpo", "orpo", "mpo")
"""Kinds that compare two answers to one prompt."""
WITH_REFERENCE = ("dpo", "ipo", "kto", "mpo")
"""Kinds that measure answers against the model that the run starts from."""


@dataclass(frozen=True)
class PreferenceConfig:
    """Settings of `[preference]`."""

    kind: Literal["none", "dpo", "ipo", "simpo", "orpo", "kto", "mpo"] = "none"
    """What is learned from records with preferences: none, records have one answer; dpo, ipo, simpo, orpo or mpo, of pairs;
    kto, of single answers that are wanted or not."""
    beta: float = 0.1
    """How firmly the model is held at its start, or, for simpo and orpo, the scale of the difference: 0.1 for dpo, ipo, kto,
    orpo and mpo, 2 to 10 for simpo."""
    label_smoothing: float = 0.0
    """Share of pairs whose labels are taken to be wrong, in [0, 0.5); for dpo and mpo."""
    length_normalisation: bool = False
    """Compare log-probabilities per token in place of those of whole answers, for dpo and ipo; simpo and orpo always do."""
    sft_weight: float = -1.0
    """Coefficient of the supervised loss of chosen answers beside; -1 = that of the kind: 1 for orpo and mpo, else 0."""
    margin: float = 1.0
    """Least difference of simpo's rewards (its gamma); about half of beta."""
    preference_weight: float = 0.8
    """Coefficient of the pairs' loss in mpo."""
    quality_weight: float = 0.2
    """Coefficient of the single answers' loss in mpo."""
    desirable_weight: float = 1.0
    """Coefficient of wanted answers in kto; raise it where there are fewer of them."""
    undesirable_weight: float = 1.0
    """Coefficient of unwanted answers in kto."""
    reference: Literal["auto", "stored"] = "auto"
    """Where the start's log-probabilities come from: auto, the model without its adapters where only those learn; stored,
    computed once before step 1 into a file, which other runs need and long ones with adapters gain from."""

    @property
    def is_on(self) -> bool:
        return self.kind != "none"

    @property
    def sft(self) -> float:
        """Return the coefficient of the supervised loss of chosen answers."""
        return self.sft_weight if self.sft_weight >= 0 else float(self.kind in ("orpo", "mpo"))
