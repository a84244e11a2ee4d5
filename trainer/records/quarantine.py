"""Records that could not be trained on: each stands once in quarantine.jsonl, stays out on resume, and too many stop the run."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from data.dataset import MultimodalDataset, Rejected
from model.errors import DataError
from trainer.distributed.world import World
from trainer.machine.atomic_files import move, replace_text
from trainer.machine.json_lines import read_lines

NAME = "quarantine.jsonl"
TRAIN, VALIDATION = "train", "validation"
FIELDS = {"split": str, "sample_id": int, "step": int, "source": str, "reason": str, "too_long": bool}
"""What every row has, and more."""
FLOOR = 8
"""Bad records that are always tolerated, however small the dataset."""


def read_excluded(folder: Path, stage: str = "") -> frozenset[int]:
    """Sample ids of a stage that earlier starts quarantined."""
    return frozenset(row["sample_id"] for row in read_rows(folder, stage) if row["split"] == TRAIN)


def start_afresh(folder: Path, finished: Collection[str] = ()) -> None:
    """What starts at step 0 judges its records anew: they may have been mended, and numbers may mean others now.

    Rows of `finished` stages stay.
    """
    path = folder / NAME
    if finished:
        kept = [row for row in read_rows(folder, None) if row.get("stage", "") in finished]
        if path.exists():
            replace_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    elif path.exists():
        move(path, folder / f"previous-{NAME}")


def check_rows(rows: Sequence[dict[str, Any]], datasets: Mapping[str, MultimodalDataset | None], path: Path) -> None:
    """DataError for a row that is of another run: its sample is none of the source that it names."""
    for row in rows:
        dataset, i = datasets.get(row["split"]), row["sample_id"]
        if dataset is not None and not (0 <= i < len(dataset) and dataset.source_names[dataset.source_ids[i]] == row["source"]):
            raise DataError(
                f"{path} is of another run: sample {i} of {row['split']} is not of source {row['source']!r} here. Restore the "
                "file, or remove it: its records are looked at again"
            )


class Quarantine:
    """Collects what ranks rejected; rank 0 writes it down, all ranks count alike."""

    def __init__(self, folder: Path, num_records: dict[str, int], max_bad_fraction: float, stage: str = "") -> None:
        """`num_records` by split: those that take part. Each stage counts its own sample ids."""
        self.folder, self.num_records, self.stage = folder, num_records, {"stage": stage} if stage else {}
        self.limits = {split: max(FLOOR, int(num * max_bad_fraction)) for split, num in num_records.items()}
        self.known: set[tuple[str, int]] = set()
        self.steps: dict[int, int] = {}  # of training, by sample id: the one that met it first
        self.num_bad: dict[str, Counter[str]] = {split: Counter() for split in num_records}  # by source
        self.num_too_long: Counter[str] = Counter()  # by split
        self.last: dict[tuple[str, bool], str] = {}  # reason, by split and whether it is the length
        self.waiting: list[dict[str, Any]] = []
        self._count(read_rows(folder, stage))

    def add(self, rejected: tuple[Rejected, ...], step: int, split: str = TRAIN) -> None:
        """`step`: the 0-based one that would have used them; each is written once, with the first it was met in."""
        rows = [{**self.stage, **asdict(item), "split": split, "step": step} for item in rejected]
        self.waiting += [row for row in rows if _key(row) not in self.known]

    def flush(self, world: World) -> None:
        """Collective, and a host sync. What it writes depends neither on the ranks nor on how often it is called."""
        if not world.sum(torch.tensor(float(len(self.waiting)), device=world.device)).item():
            return
        rows = [row for rank in world.gather_json(self.waiting) for row in rank]
        self.waiting = []
        new = self._count(sorted(rows, key=lambda row: (row["step"], *_key(row))))
        if world.is_main:
            with (self.folder / NAME).open("ab+") as out:
                _cut_torn(out)
                out.writelines(f"{json.dumps(row)}\n".encode() for row in new)  # ASCII: no id can break a line

    def out_at(self, step: int, steps_per_epoch: int) -> frozenset[int]:
        """Sample ids that are out from 0-based `step` to the end of its epoch: those met before this epoch, and those that an
        earlier start met in a step which is now done again.

        What this epoch has met in earlier steps is looked at again if it comes twice, however often the run was stopped since.
        """
        epoch = step - step % steps_per_epoch
        return frozenset(i for i, met in self.steps.items() if not epoch <= met < step)

    def _count(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of `rows` that were not known; they are now."""
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
        """DataError when a split has more bad records than allowed, those that are too long not counted, or none that is good.

        The same on every rank after a flush.
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
    """Take away a last line that a crash has left without its end: what it told of is met, and written, again."""
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _key(row: dict[str, Any]) -> tuple[str, int]:
    return row["split"], row["sample_id"]


def read_rows(folder: Path, stage: str | None = "") -> list[dict[str, Any]]:
    """Rows of a stage, of a run that has none, or (None) all there are. DataError where the file was damaged."""
    rows, problems = read_lines(folder / NAME, FIELDS)
    if problems:
        more = f"; {len(problems) - 1} more lines are none either" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}. Restore the file, or remove the line: its record is looked at again")
    return [row for row in rows if stage is None or row.get("stage", "") == stage]
