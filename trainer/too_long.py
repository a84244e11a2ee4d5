"""Records that cannot fit data.max_length: more of a source than is allowed end the start, and what would hold them is told."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from data.check import LOOK_TOKENS
from data.config import DataConfig
from data.dataset import MultimodalDataset
from data.estimate import least_tokens
from data.mixing import Pool
from model.batch import PLACEHOLDERS, READ_BY

PERCENTILES = (50, 90, 99)
HEAVY = 0.2  # share of the tokens looked at that is cut off: worth a line


def surely(num: int, deviations: float) -> float:
    """How many of a sample there would be at least if chance had made `num` of them out of fewer."""
    return num - deviations * math.sqrt(num)


@dataclass
class Lengths:
    """How long the records of one source are that were looked at, and how many of them do not fit."""

    num: int = 0  # records that break no rule
    num_too_long: int = 0  # not even their first round fits
    num_cut: int = 0  # later rounds do not fit
    whole: list[int] = field(default_factory=list)  # tokens of all rounds
    kept: int = 0  # tokens of the rounds that fit

    def add(self, whole: int, kept: int | None) -> None:
        """One record of `whole` tokens, of which `kept` are trained on; None: it is too long."""
        self.num += 1
        self.whole.append(whole)
        self.num_too_long += kept is None
        self.num_cut += kept is not None and kept < whole
        self.kept += kept or 0

    def note(self, max_length: int) -> str:
        """One line where much of the text is cut off, or nothing."""
        total = sum(self.whole)
        if not self.num_cut or self.kept >= (1 - HEAVY) * total:
            return ""
        return (
            f"{self.num_cut:,} of {self.num:,} lose rounds at their end to data.max_length = {max_length}: "
            f"{self.kept / total:.0%} of the tokens are trained on; {self.told()}"
        )

    def told(self) -> str:
        """Percentiles, and the length that would hold 99 % of the records whole."""
        values = np.percentile(self.whole, PERCENTILES, method="higher")
        shares = ", ".join(f"{share} % {value:,.0f}" for share, value in zip(PERCENTILES, values))
        would = f"data.max_length = {values[-1]:.0f} would hold 99 % of them"
        about = f" (those above {LOOK_TOKENS:,} are extrapolated)" if max(self.whole) > LOOK_TOKENS else ""
        return f"tokens per record: {shares}, the longest {max(self.whole):,}{about}; {would}"


@dataclass(frozen=True)
class Media:
    """Media of a source that take more tokens each than a sample may have, by kind: tokens of one, and records that hold any."""

    tokens: dict[str, int]
    num: dict[str, int]
    num_records: int  # that hold one of any such kind

    def __str__(self) -> str:
        return "; ".join(
            f"one {kind} takes {'at least ' * (kind != 'audio')}{self.tokens[kind]} tokens, and {num:,} records hold one"
            for kind, num in self.num.items()
        )


def large_media(dataset: MultimodalDataset, ids: np.ndarray) -> Media:
    """Kinds of media of which not even the smallest one fits, in the records `ids`."""
    least, limit = least_tokens(dataset.specs, dataset.config), dataset.config.max_length
    bits, large = dataset.modalities[ids], {kind: tokens for kind, tokens in least.items() if tokens >= limit}
    has = {kind: bits >> list(PLACEHOLDERS).index(kind) & 1 > 0 for kind in large}
    num = {kind: int(mask.sum()) for kind, mask in has.items() if mask.any()}
    any_of = np.any([has[kind] for kind in num], axis=0) if num else np.zeros(len(ids), dtype=bool)
    return Media({kind: large[kind] for kind in num}, num, int(any_of.sum()))


def refusal(where: str, num: int, total: int, lengths: Lengths, media: Media, config: DataConfig) -> str:
    """Why a source of `total` records does not start, at least `num` of which are too long; nothing if it may."""
    limit = math.floor(total * config.max_too_long_fraction + 1e-9)
    if config.max_too_long_fraction > 0:
        limit = max(limit, 1)  # one record makes no run useless, however few there are
    if num <= limit and (num < total or config.max_too_long_fraction >= 1):
        return ""
    exact = "" if lengths.num >= total or num == media.num_records else "at least "
    because = f" ({media})" if media.num else ""
    return (
        f"{where}: {exact}{num:,} of {total:,} records cannot fit data.max_length = {config.max_length}{because}: not even their "
        f"first round does, and they would be left out, which data.max_too_long_fraction = {config.max_too_long_fraction:g} allows "
        f"for {limit:,}" + (f"; {lengths.told()}" if lengths.whole else "")
    )


def never_fed(dataset: MultimodalDataset, pools: Sequence[Pool], parts: dict[str, str], spared: Iterable[str]) -> list[str]:
    """Parts all of whose media are too large for a sample, one line each; modalities that are `spared` need none."""
    ids = np.concatenate([pool.ids for pool in pools])
    media, bits, found = large_media(dataset, ids), int(np.bitwise_or.reduce(dataset.modalities[ids])), []
    for modality in dataset.specs.keys() - set(spared):
        kinds = [kind for n, kind in enumerate(PLACEHOLDERS) if READ_BY[kind] == modality and bits >> n & 1]
        if kinds and all(kind in media.num for kind in kinds):
            found.append(f"[model.{parts[modality]}] can never be fed: {media}, more than data.max_length allows")
    return found
