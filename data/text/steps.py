"""Work in steps, which several records take together: what a step needs stays in the processor's cache for all of them."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TypeVar

Made = TypeVar("Made")
Steps = Generator[None, None, Made]
"""Work that yields between its steps and returns what it made."""


def all_steps(work: Steps[Made]) -> Made:
    """Take all steps of one work; return what it made."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            made: Made = end.value
            return made


def take_together(works: Iterable[Steps[Made]]) -> list[Made]:
    """Take each step of all works before the next step; return what each made, in their order. A work that raises ends all."""
    ends: dict[int, Made] = {}
    left = dict(enumerate(works))
    while left:
        for place, work in [*left.items()]:
            try:
                next(work)
            except StopIteration as end:
                ends[place] = end.value
                del left[place]
    return [ends[place] for place in sorted(ends)]
