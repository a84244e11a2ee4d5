"""Choice of `parallel.activation_checkpointing = "auto"`: the first of none, selective and full that fits beside the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from model.errors import ConfigError
from trainer.machine.disk_space import format_bytes
from trainer.memory.advice import MemoryScenario
from trainer.memory.footprint import Footprint

Kind = Literal["none", "selective", "full"]
KINDS: tuple[Kind, ...] = ("none", "selective", "full")
"""From the fastest to the one that needs least."""
MARGIN = 1.1
"""What is simulated counts as so many times as much: plans are that exact."""


@dataclass(frozen=True)
class Choice:
    """The kind that "auto" stands for, and the reason, as a sentence for people."""

    kind: Kind
    reason: str


def choose(scenario: MemoryScenario, memory: float) -> Choice:
    """Choose for ranks that have `memory` bytes each for the whole run; 0: not known, and nothing is recomputed."""
    if not memory:
        return Choice("none", "the memory of a rank is not known")
    seen: list[str] = []
    for kind in KINDS:
        try:
            needed = scenario.needed(replace(scenario.config.parallel, activation_checkpointing=kind))
        except ConfigError as error:
            return Choice("none", f"what the model needs is not known: {error}")
        size = with_margin(needed)
        seen.append(f"{kind} needs {format_bytes(size, 2)}")
        if size <= memory:
            return Choice(kind, f"{', '.join(seen)}, and a rank has {format_bytes(memory, 2)}")
    return Choice("full", f"{', '.join(seen)}, more than the {format_bytes(memory, 2)} of a rank: it may not fit")


def with_margin(needed: Footprint) -> float:
    """Return the bytes of a footprint with a margin on what is simulated; what is stored is exact."""
    simulated = needed.activations + needed.gathered
    return needed.total + (MARGIN - 1) * simulated
