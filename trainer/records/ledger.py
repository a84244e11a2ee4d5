"""Ledger of all records: each is counted in one column, and the columns of a source add up to the size of the source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from data.order.sampler import Sampler
from model.files.tensor_files import dump_json
from trainer.records.quarantine import TRAIN, QuarantineRow

NAME = "ledger.json"


@dataclass(frozen=True)
class SourceLedger:
    """Counts of the records of one source. All fields but `samples` and `size` are columns that sum to `size`."""

    source: str
    samples: int  # places in the completed steps: more than `trained` where records are repeated
    size: int
    trained: int  # at least once
    not_reached: int  # they have a place in a later step of the run
    left_out_by_weight: int  # no epoch of the run draws them
    left_out_by_take: int
    too_long: int
    quarantined: int  # also those that were trained on before they broke


def count_records(sampler: Sampler, step: int, total_steps: int, rows: Sequence[QuarantineRow]) -> list[SourceLedger]:
    """Count the records of each source after `step` of `total_steps` steps, from the plan and the `rows` of quarantine.jsonl.

    Training itself counts nothing, so the ledger depends neither on the ranks nor on where the run was stopped and resumed. Records
    that are known to be bad and that no step has asked for are counted as not reached.
    """
    num_epochs, begun = sampler.before(step)
    places = np.bincount(begun, minlength=len(sampler.lengths))
    too_long, bad = (
        np.array([row["sample_id"] for row in rows if row["split"] == TRAIN and row["too_long"] == kind], dtype=np.int64)
        for kind in (True, False)
    )
    found, last_epoch = [], -(-max(step, total_steps) // sampler.steps_per_epoch)
    for pool in sampler.pools:
        times = pool.counts(num_epochs) + places[pool.ids]
        reached = pool.ids[times > 0]
        num_too_long, num_bad = (int(np.isin(reached, ids).sum()) for ids in (too_long, bad))
        num_planned = min(len(pool.ids), last_epoch * pool.places)
        found.append(
            SourceLedger(
                source=pool.name,
                samples=int(times.sum()),
                size=pool.size,
                trained=len(reached) - num_too_long - num_bad,
                not_reached=num_planned - len(reached),
                left_out_by_weight=len(pool.ids) - num_planned,
                left_out_by_take=pool.size - len(pool.ids),
                too_long=num_too_long,
                quarantined=num_bad,
            )
        )
    return found


def ledger_text(ledger: Sequence[SourceLedger], step: int) -> str:
    """Return the content of ledger.json after `step` steps."""
    return dump_json({"step": step, "sources": [asdict(row) for row in ledger]})


def num_left_out(folder: Path, step: int) -> int:
    """Return how many records ledger.json counts as too long or quarantined after `step` steps; 0 where it is of another step."""
    try:
        found = json.loads((folder / NAME).read_bytes())
        rows = found["sources"] if found["step"] == step else []
        return sum(int(row["too_long"]) + int(row["quarantined"]) for row in rows)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0


def format_ledger(ledger: Sequence[SourceLedger]) -> str:
    """Format the ledger for people: one line per source, without columns that are zero everywhere."""
    names = [field.name for field in fields(SourceLedger)[1:]]
    names = [name for name in names if name in ("size", "samples", "trained") or any(getattr(row, name) for row in ledger)]
    rows = [["source", *(name.replace("_", " ") for name in names)]]
    rows += [[row.source, *(f"{getattr(row, name):,}" for name in names)] for row in ledger]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]) for row in rows)
