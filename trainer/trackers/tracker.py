"""Interface of a tracker, a program beside the trainer that keeps and draws the numbers of runs, such as TensorBoard or wandb."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from trainer.trackers.shown_answers import ShownAnswer


class Tracker(Protocol):
    """A tracker that is open. A thread of its own calls every method (trainer.trackers.background), so each may take its time."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take finite numbers by name, as metrics.jsonl has them, after `step` completed steps of the run."""

    def show(self, step: int, answers: Sequence[ShownAnswer]) -> None:
        """Take answers of the validation after `step` completed steps; the numbers of the same step come later."""

    def close(self) -> None:
        """Deliver what was not delivered yet, and end."""
