"""Records that cannot fit data.max_length: too many of one source end the start, with the length that would hold them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from data.check.check_record import LOOK_TOKENS
from data.config import DataConfig
from data.dataset import MultimodalDataset
from data.index.token_estimate import least_tokens
from data.order.mixing import Pool
from model.media_spec import PLACEHOLDERS, READ_BY

PERCENTILES = (50, 90, 99)
HEAVY = 0.2  # share of the checked tokens: a line is reported where more than this is cut off


def lower_bound(num: int, deviations: float) -> float:
    """Return the least count that chance could raise to `num`, which is `deviations` standard deviations below it."""
    return num - deviations * math.sqrt(num)


@dataclass
class LengthStatistics:
    """Lengths of the checked records of one source, and how many of these records do not fit."""

    num: int = 0  # records that break no rule
    num_too_long: int = 0  # not even their first round fits
    num_cut: int = 0  # later rounds do not fit
    whole: list[int] = field(default_factory=list)  # tokens of all rounds
    kept: int = 0  # tokens of the rounds that fit

    def add(self, whole: int, kept: int | None) -> None:
        """Add one record of `whole` tokens, of which `kept` are trained on; None: the record is too long."""
        self.num += 1
        self.whole.append(whole)
        self.num_too_long += kept is None
        self.num_cut += kept is not None and kept < whole
        self.kept += kept or 0

    def note(self, max_length: int) -> str:
        """Return one line where more than HEAVY of the tokens is cut off, otherwise an empty string."""
        total = sum(self.whole)
        if not self.num_cut or self.kept >= (1 - HEAVY) * total:
            return ""
        return (
            f"{self.num_cut:,} of {self.num:,} lose rounds at their end to data.max_length = {max_length}: "
            f"{self.kept / total:.0%} of the tokens are trained on; {self.percentiles()}"
        )

    def percentiles(self) -> str:
        """Describe the percentiles of the lengths, and the length that would hold 99 % of the records whole."""
        values = np.percentile(self.whole, PERCENTILES, method="higher")
        shares = ", ".join(f"{share} % {value:,.0f}" for share, value in zip(PERCENTILES, values))
        would = f"data.max_length = {values[-1]:.0f} would hold 99 % of them"
        about = f" (those above {LOOK_TOKENS:,} are extrapolated)" if max(self.whole) > LOOK_TOKENS else ""
        return f"tokens per record: {shares}, the longest {max(self.whole):,}{about}; {would}"


@dataclass(frozen=True)
class OversizedMedia:
    """Kinds of media of a source that take more tokens than a sample may have: tokens of one medium, and records that hold any."""

    tokens: dict[str, int]
    num: dict[str, int]
    num_records: int  # records that hold a medium of any such kind

    def __str__(self) -> str:
        return "; ".join(
            f"one {kind} takes {'at least ' * (kind != 'audio')}{self.tokens[kind]} tokens, and {num:,} records hold one"
            for kind, num in self.num.items()
        )


def large_media(dataset: MultimodalDataset, ids: np.ndarray) -> OversizedMedia:
    """Find the kinds of media of which not even the smallest one fits, in the records `ids`."""
    least, limit = least_tokens(dataset.specs, dataset.config), dataset.config.max_length
    bits, large = dataset.modalities[ids], {kind: tokens for kind, tokens in least.items() if tokens >= limit}
    has = {kind: bits >> list(PLACEHOLDERS).index(kind) & 1 > 0 for kind in large}
    num = {kind: int(mask.sum()) for kind, mask in has.items() if mask.any()}
    any_of = np.any([has[kind] for kind in num], axis=0) if num else np.zeros(len(ids), dtype=bool)
    return OversizedMedia({kind: large[kind] for kind in num}, num, int(any_of.sum()))


def too_long_reason(where: str, num: int, total: int, lengths: LengthStatistics, media: OversizedMedia, config: DataConfig) -> str:
    """Return why a source of `total` records, at least `num` of them too long, ends the start; an empty string if it does not."""
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
        f"for {limit:,}" + (f"; {lengths.percentiles()}" if lengths.whole else "")
    )


def unfed_parts(dataset: MultimodalDataset, pools: Sequence[Pool], parts: dict[str, str], spared: Iterable[str]) -> list[str]:
    """Return one line per part all of whose media are too large for a sample; modalities in `spared` are left out."""
    ids = np.concatenate([pool.ids for pool in pools])
    media, bits, found = large_media(dataset, ids), int(np.bitwise_or.reduce(dataset.modalities[ids])), []
    for modality in dataset.specs.keys() - set(spared):
        kinds = [kind for n, kind in enumerate(PLACEHOLDERS) if READ_BY[kind] == modality and bits >> n & 1]
        if kinds and all(kind in media.num for kind in kinds):
            found.append(f"[model.{parts[modality]}] can never be fed: {media}, more than data.max_length allows")
    return found
