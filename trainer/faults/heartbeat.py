"""Content of a heartbeat, which every rank sends of itself."""

from __future__ import annotations

from typing import TypedDict

from trainer.machine.processes import ProcessFacts


class Heartbeat(TypedDict, total=False):
    """Phase, position and process of a rank. A rank that has sent none yet has an empty one."""

    phase: str
    step: int | None  # completed steps of the run
    samples: list[int]
    position: tuple[int, int] | list[int]  # orders the positions of ranks; JSON has lists
    page: str | None  # file of its shared memory
    moves: int
    bytes: int
    at: str
    seconds: float
    waiting: bool  # in a collective
    process: ProcessFacts
    broken: bool  # a collective broke on it
    number: int
