"""Records that could not be trained on: each stands once in quarantine.jsonl, stays out on resume, and too many stop the run."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.config import DataError
from data.dataset import Rejected
from trainer.distributed import World

NAME = "quarantine.jsonl"
TRAIN, VALIDATION = "train", "validation"
FLOOR = 8
"""Bad records that are always tolerated, however small the dataset."""


def read_excluded(folder: Path) -> frozenset[int]:
    """Sample ids that earlier starts quarantined."""
    return frozenset(row["sample_id"] for row in read_rows(folder) if row["split"] == TRAIN)


def start_afresh(folder: Path) -> None:
    """A run that starts at step 0 judges its records anew: they may have been mended, and numbers may mean others now."""
    path = folder / NAME
    if path.exists():
        path.replace(folder / f"previous-{NAME}")


class Quarantine:
    """Collects what ranks rejected; rank 0 writes it down, all ranks count alike."""

    def __init__(self, folder: Path, num_records: dict[str, int], max_bad_fraction: float) -> None:
        """`num_records` by split."""
        self.folder, self.num_records = folder, num_records
        self.limits = {split: max(FLOOR, int(num * max_bad_fraction)) for split, num in num_records.items()}
        self.known = {_key(row): row for row in read_rows(folder)}
        self.waiting: list[dict[str, Any]] = []

    def add(self, rejected: tuple[Rejected, ...], step: int, split: str = TRAIN) -> None:
        """`step`: the one that would have used them; each is written once, the first time it is met."""
        rows = [{**asdict(item), "split": split, "step": step} for item in rejected]
        self.waiting += [row for row in rows if _key(row) not in self.known]

    def flush(self, world: World) -> None:
        """Collective, and a host sync. DataError on every rank when more records are bad than `max_bad_fraction` allows."""
        if not world.sum(torch.tensor(float(len(self.waiting)), device=world.device)).item():
            return
        rows = [row for rank in world.gather_json(self.waiting) for row in rank]
        self.waiting = []
        new = {_key(row): row for row in sorted(rows, key=_key) if _key(row) not in self.known}
        self.known |= new
        if world.is_main:
            path = self.folder / NAME
            torn = path.exists() and not path.read_bytes().endswith(b"\n")
            with path.open("a", encoding="utf-8") as out:
                out.write("\n" * torn)
                out.writelines(json.dumps(row) + "\n" for row in new.values())  # ASCII: no id can break a line
        self.check()

    def check(self) -> None:
        """DataError when a split has more bad records than allowed, those that are too long not counted, or none that is good."""
        for split, limit in self.limits.items():
            rows = [row for row in self.known.values() if row["split"] == split]
            if len(rows) >= self.num_records[split]:
                raise DataError(f"none of the {len(rows)} {split} records can be used; the last: {rows[-1]['reason']}")
            self._check([row for row in self.known.values() if row["split"] == split and not row["too_long"]], limit)

    def _check(self, bad: list[dict[str, Any]], limit: int) -> None:
        if len(bad) > limit:
            source, count = Counter(row["source"] for row in bad).most_common(1)[0]
            last = bad[-1]
            raise DataError(
                f"{len(bad)} records are bad, data.max_bad_fraction allows {limit}; worst source: {source!r} with {count}; "
                f"one of them: {last['reason']}. All stand in {self.folder / NAME}"
            )


def _key(row: dict[str, Any]) -> tuple[str, int]:
    return row["split"], row["sample_id"]


def read_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / NAME
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    # A line without its end was cut by a crash: that record will be met and written again.
    return [json.loads(line) for line in lines if line.endswith("}")]
