"""Copies of record files without some of their records: every record that stays has the bytes, or the values, that it had."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.index.row_groups import arrow
from data.index.sidecar import open_atomically
from data.index.table import Table
from data.index.tar_headers import ArchiveMap, members

_PIECE = 1 << 20  # bytes


def write_json_subset(source: Path, table: Table, first: int, kept: np.ndarray, target: Path) -> None:
    """Write the records of a .json or .jsonl file for which `kept` is true, in their order and byte for byte.

    `first`: number of the file's first record in `table`; `kept` (N,) bool begins there. This holds for all functions here.
    """
    before, between, after = (b"[\n", b",\n", b"\n]\n") if source.suffix.lower() == ".json" else (b"", b"\n", b"\n")
    with source.open("rb") as file, open_atomically(target) as out:
        out.write(before)
        for place, i in enumerate(np.flatnonzero(kept) + first):
            out.write(between if place else b"")
            _copy(file, out, int(table.start[i]), int(table.stop[i]))
        out.write(after)


def write_tar_subset(source: Path, table: Table, first: int, kept: np.ndarray, target: Path) -> None:
    """Write a .tar archive byte for byte, but without the members of the records that do not stay."""
    starts = {start for i in np.flatnonzero(~kept) + first for _, start, _ in table.members_of(int(i))}
    with source.open("rb") as file, open_atomically(target) as out:
        data = ArchiveMap(file.fileno(), 0, access=mmap.ACCESS_READ)
        at = 0
        for member in members(data, str(source)):
            if member.start in starts:
                _copy(file, out, at, member.begin)
                at = member.end
        _copy(file, out, at, len(data))


def write_rows_subset(source: Path, table: Table, first: int, kept: np.ndarray, target: Path) -> None:
    """Write the rows of a .parquet or .arrow file that stay, by the same groups, with the file's schema and its notes."""
    pa = arrow()
    from pyarrow import parquet

    rows: dict[int, list[int]] = {}
    for i in np.flatnonzero(kept) + first:  # of columns `start` is the group, `stop` the row in it
        rows.setdefault(int(table.start[i]), []).append(int(table.stop[i]))
    with open_atomically(target) as out:
        if source.suffix.lower() == ".arrow":
            with pa.ipc.open_stream(pa.memory_map(str(source))) as stream, pa.ipc.new_stream(out, stream.schema) as writer:
                for group, batch in enumerate(stream):
                    if group in rows:
                        writer.write_batch(batch.take(pa.array(rows[group])))
            return
        with parquet.ParquetFile(source) as file, parquet.ParquetWriter(out, file.schema_arrow) as writer:
            for group, wanted in rows.items():
                writer.write_table(file.read_row_group(group, use_threads=False).take(wanted), row_group_size=len(wanted))


def _copy(file: BinaryIO, out: BinaryIO, start: int, stop: int) -> None:
    """Copy bytes [start, stop)."""
    file.seek(start)
    while start < stop:
        piece = file.read(min(_PIECE, stop - start))
        if not piece:
            raise OSError(f"{file.name} has become shorter while it was copied")
        out.write(piece)
        start += len(piece)
