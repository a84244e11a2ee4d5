"""Quarantine of bad records: each is written once to quarantine.jsonl and stays excluded on resume; too many stop the run."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, TypedDict, cast

import torch

from data.dataset import MultimodalDataset, Rejected
from model.errors import DataError
from trainer.distributed.world import World
from trainer.machine.atomic_files import move, replace_text
from trainer.machine.json_lines import lines_of, read_lines

NAME = "quarantine.jsonl"
TRAIN, VALIDATION = "train", "validation"
FIELDS = {"split": str, "sample_id": int, "step": int, "source": str, "reason": str, "too_long": bool}
"""Fields and types that every row has; a row may have more."""
FLOOR = 8
"""Number of bad records that are always tolerated, however small the dataset."""


class QuarantineRow(TypedDict, total=False):
    """A row of quarantine.jsonl: a rejected record, and the first step that met it. A run without stages has no `stage`."""

    stage: str
    split: str
    step: int  # of the stage, from 0
    sample_id: int
    source: str
    where: str
    id: str
    reason: str
    too_long: bool


def read_excluded(folder: Path, stage: str) -> frozenset[int]:
    """Read the training sample ids of a stage that earlier starts quarantined."""
    return frozenset(row["sample_id"] for row in read_rows(folder, stage) if row["split"] == TRAIN)


def drop_old_rows(folder: Path, finished: Collection[str]) -> None:
    """Drop the rows of earlier starts, because a start at step 0 checks its records again.

    Records may have been repaired since, and a sample id may mean another record now. Rows of `finished` stages stay; without
    such stages the whole file is kept under the name previous-quarantine.jsonl.
    """
    path = folder / NAME
    if finished:
        kept = [row for row in read_rows(folder, None) if row.get("stage", "") in finished]
        if path.exists():
            replace_text(path, lines_of(kept))
    elif path.exists():
        move(path, folder / f"previous-{NAME}")


def check_rows(rows: Sequence[QuarantineRow], datasets: Mapping[str, MultimodalDataset | None], path: Path) -> None:
    """Raise `DataError` for a row of another run: its sample is not of the source that the row names."""
    for row in rows:
        dataset, i = datasets.get(row["split"]), row["sample_id"]
        if dataset is not None and not (0 <= i < len(dataset) and dataset.source_names[dataset.source_ids[i]] == row["source"]):
            raise DataError(
                f"{path} is of another run: sample {i} of {row['split']} is not of source {row['source']!r} here. Restore the "
                "file, or remove it: its records are looked at again"
            )


class Quarantine:
    """Collector of the records that ranks rejected: rank 0 writes them down, and all ranks have the same counts."""

    def __init__(self, folder: Path, num_records: dict[str, int], max_bad_fraction: float, stage: str = "") -> None:
        """Read the rows of earlier starts. `num_records`: records that take part, by split. Every stage numbers its own samples."""
        self.folder, self.num_records, self.stage = folder, num_records, {"stage": stage} if stage else {}
        self.limits = {split: max(FLOOR, int(num * max_bad_fraction)) for split, num in num_records.items()}
        self.known: set[tuple[str, int]] = set()
        self.steps: dict[int, int] = {}  # the first training step that met each sample id
        self.num_bad: dict[str, Counter[str]] = {split: Counter() for split in num_records}  # by source
        self.num_too_long: Counter[str] = Counter()  # by split
        self.last: dict[tuple[str, bool], str] = {}  # reason, by split and whether it is the length
        self.waiting: list[QuarantineRow] = []
        self._count(read_rows(folder, stage))

    def add(self, rejected: tuple[Rejected, ...], step: int, split: str = TRAIN) -> None:
        """Collect records that were rejected in 0-based `step`, which would have used them.

        Each record is written once, with the first step that met it.
        """
        rows = [cast(QuarantineRow, {**self.stage, **asdict(item), "split": split, "step": step}) for item in rejected]
        self.waiting += [row for row in rows if _key(row) not in self.known]

    def flush(self, world: World) -> None:
        """Write the collected records of all ranks. Collective, and a host sync.

        The rows depend neither on the ranks nor on how often `flush` is called.
        """
        if not world.sum(torch.tensor(float(len(self.waiting)), device=world.device)).item():
            return
        rows = [row for rank in world.gather_json(self.waiting) for row in rank]
        self.waiting = []
        new = self._count(sorted(rows, key=lambda row: (row["step"], *_key(row))))
        if world.is_main:
            with (self.folder / NAME).open("ab+") as out:
                _cut_torn(out)
                out.write(lines_of(new).encode())

    def excluded_at(self, step: int, steps_per_epoch: int) -> frozenset[int]:
        """Return the sample ids that are excluded from 0-based `step` to the end of its epoch.

        These are ids met before this epoch, and ids that an earlier start met in a step which is now done again. A record that an
        earlier step of this epoch has met is read again if it comes twice, however often the run was stopped since.
        """
        epoch = step - step % steps_per_epoch
        return frozenset(i for i, met in self.steps.items() if not epoch <= met < step)

    def _count(self, rows: list[QuarantineRow]) -> list[QuarantineRow]:
        """Count the `rows` that were not known before, and return them."""
        new = []
        for row in rows:
            split, key = row["split"], _key(row)
            if key in self.known or split not in self.num_records:
                continue
            self.known.add(key)
            if split == TRAIN:
                self.steps[row["sample_id"]] = row["step"]
            self.last[split, row["too_long"]] = row["reason"]
            if row["too_long"]:
                self.num_too_long[split] += 1
            else:
                self.num_bad[split][row["source"]] += 1
            new.append(row)
        return new

    def check(self) -> None:
        """Raise `DataError` when a split has more bad records than allowed, or no good record.

        Records that are too long do not count as bad. The outcome is the same on every rank after a flush.
        """
        for split, limit in self.limits.items():
            bad, num = self.num_bad[split].total(), self.num_records[split]
            if bad + self.num_too_long[split] >= num:
                reason = self.last.get((split, True)) or self.last[split, False]
                raise DataError(f"none of the {num} {split} records can be used; one of them: {reason}")
            if bad > limit:
                (source, count), *others = self.num_bad[split].most_common()
                rest = "".join(f", {name!r} {n}" for name, n in others)
                raise DataError(
                    f"{bad} of {num} {split} records are bad, data.max_bad_fraction allows {limit}; worst source: {source!r} with "
                    f"{count}{rest}; one of them: {self.last[split, False]}. All stand in {self.folder / NAME}; "
                    "`python -m tools.check_data` finds all of them before a run"
                )


def _cut_torn(file: BinaryIO) -> None:
    """Remove a last line that a crash has left incomplete: its record will be met, and written, again."""
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _key(row: QuarantineRow) -> tuple[str, int]:
    return row["split"], row["sample_id"]


def read_rows(folder: Path, stage: str | None = "") -> list[QuarantineRow]:
    """Read the rows of a stage, of a run without stages (""), or all rows (None). Raises `DataError` where the file is damaged."""
    rows, problems = read_lines(folder / NAME, FIELDS)
    if problems:
        more = f"; {len(problems) - 1} more lines are none either" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}. Restore the file, or remove the line: its record is looked at again")
    return [cast(QuarantineRow, row) for row in rows if stage is None or row.get("stage", "") == stage]
