"""Quick check of the data before weights are read: records that an earlier check found bad, and a spread of the rest, in seconds.

Problems are reported, and too many of them end the start. The check writes nothing: bad records are quarantined when a step meets
them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.check.check_record import TOO_LONG, Checked, Depth, Problem, check_record
from data.check.measured_lengths import read_measurements
from data.dataset import MultimodalDataset
from data.order.mixing import Pool
from model.errors import DataError
from trainer.config import RunConfig
from trainer.distributed.main_rank import on_main_rank
from trainer.distributed.world import World
from trainer.records.feeding import PART_OF_MODALITY, inherited_modalities
from trainer.records.quarantine import FLOOR, TRAIN, VALIDATION
from trainer.records.run_data import RunData
from trainer.records.too_long import LengthStatistics, OversizedMedia, large_media, lower_bound, too_long_reason, unfed_parts

MAX_RECORDS, MAX_SECONDS = 2000, 5.0
LEAST = 16  # records that are checked of each source, however small its share
ENOUGH = 128  # records that are checked even where nothing else takes time meanwhile: 0.1 s
SHOWN = 3  # problems of each source that are reported
CERTAIN = 4  # standard deviations of chance that are subtracted before a part of a source stands for the whole


@dataclass
class SourceCheck:
    """Records to check in one source, and the problems found so far."""

    split: str
    pool: Pool  # its records that take part
    dataset: MultimodalDataset
    known: np.ndarray  # sample ids that an earlier check found bad
    drawn: np.ndarray  # sample ids spread over the others
    num_measured: int = 0  # records that an earlier check found too long
    num_checked: int = 0
    num_drawn: int = 0  # of the checked ones
    num_bad_drawn: int = 0
    num_too_long: int = 0
    bad: list[Problem] = field(default_factory=list)  # the first one of each bad record
    lengths: LengthStatistics = field(default_factory=LengthStatistics)

    def add(self, checked: Checked, is_drawn: bool) -> None:
        bad = [problem for problem in checked.problems if problem.is_bad]
        self.bad += bad[:1]
        self.num_checked += 1
        self.num_drawn += is_drawn
        self.num_bad_drawn += is_drawn and bool(bad)
        too_long = not bad and any(problem.kind == TOO_LONG for problem in checked.problems)
        self.num_too_long += too_long
        if not bad:
            whole = checked.whole or self.dataset.config.max_length + 1
            self.lengths.add(whole, None if too_long or checked.size is None else checked.size.length)

    def at_least(self) -> int:
        """Return how many records are bad for sure: those found, or those that the drawn ones stand for, less chance."""
        return max(len(self.bad), self._standing_for(self.num_bad_drawn))

    @property
    def media(self) -> OversizedMedia:
        """Return the media that do not fit, whatever else is in their records."""
        return large_media(self.dataset, self.pool.ids)

    def too_long_at_least(self) -> int:
        """Return how many records are too long for sure.

        Records that an earlier check measured as too long count only where this check finds one as well.
        """
        measured = self.num_measured if self.num_too_long else 0
        return max(self.num_too_long, measured, self.media.num_records, self._standing_for(self.num_too_long))

    def _standing_for(self, num_drawn: int) -> int:
        return int(lower_bound(num_drawn, CERTAIN) * (len(self.pool.ids) - len(self.known)) / max(self.num_drawn, 1))

    def __str__(self) -> str:
        known = f", of them {len(self.known):,} that tools.check_data found bad" if len(self.known) else ""
        too_long = f", {self.num_too_long} too long" if self.num_too_long else ""
        head = f"looked at {self.num_checked:,} of {len(self.pool.ids):,} records{known}: {len(self.bad)} bad{too_long}"
        note = self.lengths.note(self.dataset.config.max_length)
        return "\n".join(
            [f"{self.split} {self.pool.name}: {head}", *(f"          {line}" for line in (*self.bad[:SHOWN], note) if line)]
        )


def quick_check(
    data: RunData, config: RunConfig, world: World, on_progress: Callable[[str], object] = lambda at: None
) -> list[str]:
    """Return one entry per source: how much was checked, and the first problems by file, line and id. Collective.

    Rank 0 checks; nothing is checked where nothing will be trained. Raises the same `DataError` on every rank: when more records
    are bad for sure than data.max_bad_fraction allows, or, with data.on_bad_sample = "error", when any is; when more of a source
    are too long than data.max_too_long_fraction allows; and when all media of a part are too large for a sample.
    """
    return on_main_rank(world, lambda: look(data, config, on_progress))


def look(
    data: RunData,
    config: RunConfig,
    on_progress: Callable[[str], object] = lambda at: None,
    is_awaited: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Make the check on this rank alone. Once somebody waits for it (`is_awaited`), ENOUGH records are enough."""
    if config.train.max_steps == 0:
        return []
    checks = plan_checks(data, Path(config.output_dir) / "index")
    run_checks(checks, MAX_SECONDS, on_progress, is_awaited)
    reasons = [*bad_record_reasons(checks, config), *too_long_reasons(checks, config)]
    if data.train is not None and not reasons:
        reasons = unfed_parts(data.train, data.pools, PART_OF_MODALITY, inherited_modalities(config.model))
    if reasons:
        raise DataError("; ".join(reasons))
    return [str(check) for check in checks]


def plan_checks(data: RunData, index_folder: Path) -> list[SourceCheck]:
    """Plan what to check: of every source a share of MAX_RECORDS in proportion to its size, and at least LEAST records."""
    pools_of = {TRAIN: data.pools, VALIDATION: data.validation_pools}
    total, checks = sum(data.num_records.values()), []
    for split, dataset in data.datasets.items():
        pools, first = pools_of[split], 0
        for pool, measurement in zip(pools, read_measurements(dataset, index_folder)):
            bad = np.empty(0, dtype=np.int64) if measurement is None else measurement.bad + first
            is_known = np.isin(pool.ids, bad)  # not numpy's functions for sets: they take minutes for millions
            num_measured = 0 if measurement is None else int((measurement.lengths[pool.ids[~is_known] - first] == 0).sum())
            share = max(LEAST, MAX_RECORDS * len(pool.ids) // total)
            checks.append(SourceCheck(split, pool, dataset, pool.ids[is_known], _spread(pool.ids[~is_known], share), num_measured))
            first += pool.size
    return checks


def run_checks(
    checks: list[SourceCheck],
    seconds: float,
    on_progress: Callable[[str], object] = lambda at: None,
    is_awaited: Callable[[], bool] = lambda: False,
) -> None:
    """Check all planned records, or as many as `seconds` allow: known bad ones of every source first, then all sources alike.

    While somebody waits for it, it ends after ENOUGH records, one of each source at least.
    """
    end = time.monotonic() + seconds
    queue = [(check, int(i), False) for check in checks for i in check.known[:MAX_RECORDS]]
    drawn = [((k + 1) / len(check.drawn), check, int(i), True) for check in checks for k, i in enumerate(check.drawn)]
    queue += [(check, i, is_drawn) for _, check, i, is_drawn in sorted(drawn, key=lambda item: item[0])]
    for num, (check, i, is_drawn) in enumerate(queue, 1):
        on_progress(check.dataset.where(i))
        check.add(check_record(check.dataset, i, Depth(keys=False)), is_drawn)
        if time.monotonic() > end:
            return
        if num >= ENOUGH and is_awaited() and all(other.num_checked or not len(other.pool.ids) for other in checks):
            return


def bad_record_reasons(checks: Iterable[SourceCheck], config: RunConfig) -> list[str]:
    """Return why the run cannot start, for bad records; an empty list if it may start."""
    reasons = []
    for split in (TRAIN, VALIDATION):
        own = [check for check in checks if check.split == split]
        bad = [problem for check in own for problem in check.bad]
        if not bad:
            continue
        if config.data.on_bad_sample == "error":
            reasons.append(f"{bad[0]}" + (f" (and {len(bad) - 1} more bad records)" if len(bad) > 1 else ""))
            continue
        num, num_bad = sum(len(check.pool.ids) for check in own), sum(check.at_least() for check in own)
        limit = max(FLOOR, int(num * config.data.max_bad_fraction))
        if num_bad > limit:
            worst = max(own, key=SourceCheck.at_least)
            reasons.append(
                f"at least {num_bad} of {num} {split} records are bad, data.max_bad_fraction allows {limit}; worst source: "
                f"{worst.pool.name!r} with {worst.at_least()}; one of them: {worst.bad[0]}. `python -m tools.check_data` names all"
            )
    return reasons


def too_long_reasons(checks: Iterable[SourceCheck], config: RunConfig) -> list[str]:
    """Return one reason for each source of which too many records do not fit."""
    reasons = []
    for check in checks:
        where, num = f"{check.split} source {check.pool.name!r}", check.too_long_at_least()
        reasons.append(too_long_reason(where, num, len(check.pool.ids), check.lengths, check.media, config.data))
    return [reason for reason in reasons if reason]


def _spread(ids: np.ndarray, count: int) -> np.ndarray:
    """Return up to `count` of `ids` at equal distances, shuffled so that every prefix is spread too; the same at every call."""
    chosen = ids[np.arange(min(count, len(ids))) * len(ids) // max(min(count, len(ids)), 1)]
    return np.random.default_rng(0).permutation(chosen)
