"""Work of rank 0 for all ranks: they get its result or its error, and people its lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from model.errors import ConfigError, DataError
from trainer.distributed.world import World
from trainer.errors import ProofError, SaveError

T = TypeVar("T")
KINDS: dict[str, type[Exception]] = {kind.__name__: kind for kind in (ConfigError, DataError, SaveError, ProofError)}
"""Errors that all ranks raise together. Others are raised on rank 0 alone, and the watchdog ends the rest."""


def on_main_rank(world: World, work: Callable[[], T]) -> T:
    """Do `work` on rank 0; return its result on every rank, as JSON carries it, or raise its error there. Collective, host sync."""
    answer: list[object] = []
    if world.is_main:
        try:
            answer = ["", "", work()]
        except tuple(KINDS.values()) as error:
            answer = [next(name for name, kind in KINDS.items() if isinstance(error, kind)), str(error), None]
    kind, text, result = world.broadcast_json(answer)
    if kind:
        raise KINDS[kind](text)
    found: T = result
    return found


def say(world: World, *lines: str) -> None:
    """Print lines for people, on rank 0."""
    for line in lines if world.is_main else ():
        print(line, flush=True)
