"""Find records one by one, by the exact rules of JSON: slower than `json_scan`, and the source of every error message."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from data.index.json_borders import array_borders, count_lines, line_borders
from data.index.table import KINDS, Table
from data.index.token_estimate import plan_by_parsing
from data.limits import MAX_RECORD_BYTES


def plan_record(data: mmap.mmap, start: int, stop: int) -> tuple[int, tuple[int, ...]]:
    """Return the planned text tokens of one record and how many media of each of `KINDS` it names.

    A record of more than MAX_RECORD_BYTES is refused when it is read, so it is neither copied nor planned: (1, zeros).
    """
    return (1, (0,) * len(KINDS)) if stop - start > MAX_RECORD_BYTES else plan_by_parsing(data[start:stop])


def scan_one_by_one(data: mmap.mmap, first: int, path: Path) -> Table:
    """Return the table of a file, built record by record. Raises `DataError` where an array is broken."""
    line, seen, rows, media = 1, 0, [], []
    for start, stop in (array_borders if path.suffix.lower() == ".json" else line_borders)(data, first, str(path)):
        line += count_lines(data, seen, start)
        seen = start
        tokens, counts = plan_record(data, start, stop)
        rows.append((start, stop, line, tokens))
        media.append(counts)
    columns = np.array(rows, dtype=np.int64).reshape(-1, 4)
    per_kind = np.array(media, dtype=np.int16).reshape(-1, len(KINDS))
    return Table(columns[:, 0], columns[:, 1], columns[:, 2], columns[:, 3].astype(np.int32), per_kind)
