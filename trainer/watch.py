"""What this rank is doing, so that a run that stalls can say who, in what and on which samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Beat:
    """What a rank was doing when it was last heard of."""

    phase: str = "start"
    step: int | None = None  # completed steps of the run
    samples: tuple[int, ...] = ()
    since: float = 0.0  # time.monotonic() of this process


class Watch:
    """The main thread marks what it is about to do; marking costs no more than setting an attribute."""

    def __init__(self) -> None:
        self.beat = Beat(since=time.monotonic())

    def mark(self, phase: str) -> None:
        """From now on this rank does `phase`, on the samples it had."""
        self.beat = Beat(phase, self.beat.step, self.beat.samples, time.monotonic())

    def at(self, phase: str, step: int | None, samples: Sequence[int] = ()) -> None:
        """The same, with the completed steps of the run and the samples it is about."""
        self.beat = Beat(phase, step, tuple(samples), time.monotonic())
