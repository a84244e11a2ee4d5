"""Shares of sources in an epoch: `take` chooses a source's records once, `weight` says how often each of them is drawn.

All of it is a pure function of (seed, source, epoch). `take` is LLaVA-NeXT's sampling_strategy, with a seeded random draw where
LLaVA-NeXT uses the global generator; a weight below 1 replaces VITA's data_ratio, which draws the same part in every epoch.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

TAKE = re.compile(r"(first|end|random):([0-9]+)(\.[0-9]+)?(%)?")
TAKE_FORMS = "'all' | 'first:N' | 'end:N' | 'random:N', N a number of records (first:1000) or a percentage (random:12.5%)"


def take_problem(take: str) -> str:
    """Return what is wrong with a `take`, or an empty string."""
    if take == "all":
        return ""
    found = TAKE.fullmatch(take)
    if found is None or (found[3] and not found[4]):
        return f"is none of {TAKE_FORMS}"
    if not 0 < Fraction(found[2] + (found[3] or "")) <= (100 if found[4] else math.inf):
        return "takes nothing: N must be positive" if not found[4] else "must take more than 0% and at most 100%"
    return ""


def take_count(take: str, size: int) -> int:
    """Return how many of `size` records `take` leaves, percentages rounded up; all of them where it asks for more."""
    found = TAKE.fullmatch(take)
    if found is not None and found[4]:
        return math.ceil(Fraction(found[2] + (found[3] or "")) * size / 100)
    return min(size, take_number(take)) if found else size


def take_number(take: str) -> int:
    """Return the number of records that `take` names; 0 where it names a percentage or all."""
    found = TAKE.fullmatch(take)
    return 0 if found is None or found[4] else int(found[2])


def take_rows(take: str, size: int, seed: int, name: str) -> np.ndarray:
    """Return the rows of a source that take part, ascending. random: drawn without repetition, the same in every epoch."""
    count, how = take_count(take, size), take.partition(":")[0]
    if how == "random":
        return np.sort(permutation(size, generator_of(f"take {seed} {name}"))[:count])
    return smallest_arange(size)[size - count :] if how == "end" else smallest_arange(count)


@dataclass(frozen=True)
class Pool:
    """Records of one source that take part in a run, and how many places an epoch has for them.

    Places are numbered over all epochs. They are filled from an endless sequence of orders of the pool, each drawn anew, so that no
    record is drawn twice before all records were drawn once, wherever an epoch ends.
    """

    name: str
    ids: np.ndarray  # (M,) sample ids, ascending
    size: int  # records of the whole source
    take: str
    weight: float
    seed: int
    in_order: bool  # as in the file instead of drawn

    @property
    def places(self) -> int:
        """Return the number of places per epoch, the same in every epoch; at least one, so that no source is lost to rounding."""
        return max(1, round(self.weight * len(self.ids)))

    def __str__(self) -> str:
        """Describe the pool for people; the text is empty where every epoch holds the whole source once."""
        taken, short = len(self.ids), self.size < take_number(self.take)
        if taken == self.size == self.places and not short:
            return ""
        part = f"take {self.take} of {self.size:,} records{', fewer than it asks for' * short}: {taken:,}"
        every = f"all {self.size:,} records"
        return f"{self.name}: {every if self.take == 'all' else part}, {self.places:,} samples per epoch (weight {self.weight:g})"

    def draw(self, epoch: int) -> np.ndarray:
        """Draw the sample ids (places,) of one epoch."""
        start, stop = epoch * self.places, (epoch + 1) * self.places
        parts = []
        for cycle in range(start // len(self.ids), -(-stop // len(self.ids))):
            first = cycle * len(self.ids)
            parts.append(self._cycle(cycle, max(start - first, 0), min(stop - first, len(self.ids))))
        return np.concatenate(parts)

    def counts(self, num_epochs: int) -> np.ndarray:
        """Count how often the first `num_epochs` epochs hold each record of `ids`; returns (M,)."""
        cycles, rest = divmod(num_epochs * self.places, len(self.ids))
        counts = np.full(len(self.ids), cycles)
        counts[np.searchsorted(self.ids, self._cycle(cycles, 0, rest))] += 1
        return counts

    def _cycle(self, cycle: int, start: int, stop: int) -> np.ndarray:
        """Return places [start, stop) of one order of the pool.

        A whole order need not be drawn: the sampler orders what it gets.
        """
        if self.in_order or stop - start in (0, len(self.ids)):
            return self.ids[start:stop]
        return self.ids[permutation(len(self.ids), generator_of(f"mixing {self.seed} {self.name} {cycle}"))[start:stop]]


def make_pools(
    names: Sequence[str], sizes: Sequence[int], takes: Sequence[str], weights: Sequence[float], seed: int, in_order: bool
) -> tuple[Pool, ...]:
    """Make one pool per source, of sample ids that are numbered in the order of the sources."""
    ids = np.split(smallest_arange(sum(sizes)), np.cumsum(sizes)[:-1])
    return tuple(
        Pool(name, own[take_rows(take, len(own), seed, name)], len(own), take, weight, seed, in_order)
        for name, own, take, weight in zip(names, ids, takes, weights)
    )


def generator_of(text: str) -> torch.Generator:
    """Make a generator seeded by `text`, one for every purpose.

    The text is hashed, because sums of seeds and numbers would collide.
    """
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big"))


def smallest_arange(count: int) -> np.ndarray:
    """Return 0, 1, ..., count - 1, as int32 as long as they fit: planning an epoch of millions is mostly moving memory."""
    return np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)


def permutation(count: int, generator: torch.Generator) -> np.ndarray:
    """Return a random permutation of `count` numbers; int32 and int64 results hold the same values."""
    return torch.randperm(count, generator=generator, dtype=torch.int32 if count < 2**31 else torch.int64).numpy()
