"""The columns that describe every record of a source: in memory while they are built, afterwards mapped from one file."""

from __future__ import annotations

import json
import math
import mmap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np

from data.index.sidecar import open_atomically
from model.files.untrusted import Json, open_regular, parse_json
from model.media_spec import PLACEHOLDERS

KINDS = tuple(PLACEHOLDERS)
"""Kinds of media, in the order of the columns of `Table.media`."""
_VERSION = 4  # version of the columns: raise it when one of them or a rule of planning changes
_ALIGNED = 64  # bytes
_LAYOUT = {
    **dict.fromkeys(("start", "stop", "line", "file_stops", "member_stops", "members", "name_stops"), "<i8"),
    **{"text_tokens": "<i4", "media": "<i2", "names": "|u1"},
}
"""Type of each column in a file."""
_PIECE = 1 << 20  # bytes


_NONE = partial(np.zeros, 0, dtype=np.int64)


@dataclass(frozen=True)
class Table:
    """Columns of N records in F files, with M members of archives."""

    start: np.ndarray  # (N,) int64 first byte of the record in its file; parquet: its row group
    stop: np.ndarray  # (N,) int64 one past its last byte; parquet: its row in the group
    line: np.ndarray  # (N,) int64 line it starts on, parquet row; counted from 1
    text_tokens: np.ndarray  # (N,) int32 planned tokens of its texts
    media: np.ndarray  # (N, 3) int16 how many media of each of `KINDS`
    file_stops: np.ndarray = field(default_factory=_NONE)  # (F,) records up to and including each file
    member_stops: np.ndarray = field(default_factory=_NONE)  # (N,) members up to and including each record's
    members: np.ndarray = field(
        default_factory=partial(np.zeros, (0, 2), dtype=np.int64)
    )  # (M, 2) first byte of each member, and its size
    name_stops: np.ndarray = field(default_factory=_NONE)  # (M,) bytes of names up to and including each member's
    names: np.ndarray = field(
        default_factory=partial(np.zeros, 0, dtype=np.uint8)
    )  # UTF-8 of the members' names, one after the other

    def __len__(self) -> int:
        return len(self.start)

    def file_of(self, i: int) -> int:
        """Return the number of the file that holds record `i`."""
        return int(np.searchsorted(self.file_stops, i, side="right"))

    def members_of(self, i: int) -> Iterator[tuple[str, int, int]]:
        """Yield name, first byte and size of each member of record `i` of an archive."""
        first = int(self.member_stops[i - 1]) if i else 0
        for k in range(first, int(self.member_stops[i])):
            name = self.names[self.name_stops[k - 1] if k else 0 : self.name_stops[k]]
            yield name.tobytes().decode("utf-8", "surrogateescape"), int(self.members[k, 0]), int(self.members[k, 1])


def join_tables(tables: list[Table]) -> Table:
    """Join the tables of several files, in order, into one; cumulative columns continue over the files."""
    columns = {f.name: np.concatenate([getattr(table, f.name) for table in tables]) for f in fields(Table)}
    for name, counted in (("member_stops", "members"), ("name_stops", "names")):
        before = np.cumsum([0] + [len(getattr(table, counted)) for table in tables])[:-1]
        columns[name] = columns[name] + np.repeat(before, [len(getattr(table, name)) for table in tables])
    columns["file_stops"] = np.cumsum([len(table) for table in tables])
    return Table(**columns)


FileStamp = tuple[str, int, int]
"""Path, size in bytes and modification time in ns of a file."""


def file_stamps(paths: list[Path]) -> list[FileStamp]:
    """Return path, size in bytes and modification time in ns of each file: a table is valid for these."""
    found = [(path, path.stat()) for path in paths]
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found]


def write_table(sidecar: Path, table: Table, files: list[FileStamp]) -> None:
    """Write header and columns into one file, atomically."""
    columns = {f.name: np.ascontiguousarray(getattr(table, f.name), dtype=_LAYOUT[f.name]) for f in fields(Table)}
    layout = [[name, column.dtype.str, list(column.shape)] for name, column in columns.items()]
    body = [padded for column in columns.values() for padded in (column.tobytes(), bytes(-column.nbytes % _ALIGNED))]
    crc = 0
    for piece in body:
        crc = zlib.crc32(piece, crc)
    header = json.dumps({"version": _VERSION, "files": files, "columns": layout, "crc32": crc}).encode() + b"\n"
    with open_atomically(sidecar) as file:
        file.write(header)
        file.write(bytes(-file.tell() % _ALIGNED))
        file.writelines(body)


def read_table_header(sidecar: Path, *, all_bytes: bool = False) -> list[FileStamp] | None:
    """Return the `stamps` of the files that a complete table of this version was built from; None if there is no such table.

    `all_bytes`: also compare the checksum, so that not one flipped bit is accepted.
    """
    try:
        with open_regular(sidecar) as file:
            line = file.readline(_LONGEST_HEADER)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header = parse_json(line)
        sizes = _sizes(header)
        begin = _aligned(len(line))
        whole = header["version"] == _VERSION and len(mapped) == begin + sum(map(_aligned, sizes)) and line.endswith(b"\n")
        if whole and all_bytes:
            crc = 0
            for at in range(begin, len(mapped), _PIECE):
                crc = zlib.crc32(mapped[at : at + _PIECE], crc)
            whole = header["crc32"] == crc and not any(mapped[len(line) : begin])
        files = [(path, size, time) for path, size, time in header["files"]]
    except (OSError, ValueError, TypeError, KeyError, OverflowError):  # missing, cut short, or no table
        return None
    return files if whole else None


_LONGEST_HEADER = 1 << 26


def _sizes(header: Json) -> list[int]:
    """Return the bytes of each column.

    Raises an error that `read_table_header` catches unless the columns are those of a table and their lengths agree.
    """
    shapes = {}
    for name, dtype, shape in header["columns"]:
        if dtype != _LAYOUT[name] or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"column {name!r} is not as it is written")
        shapes[name] = tuple(shape)
    n, m = shapes["start"], shapes["name_stops"]
    wanted = {**dict.fromkeys(("start", "stop", "line", "text_tokens"), n), "media": (*n, len(KINDS)), "members": (*m, 2)}
    lines_up = all(shapes[name] == shape for name, shape in wanted.items()) and shapes["member_stops"] in (n, (0,))
    if not lines_up or list(shapes) != [f.name for f in fields(Table)] or any(len(shapes[name]) != 1 for name in _FLAT):
        raise ValueError("columns do not agree")
    return [np.dtype(_LAYOUT[name]).itemsize * math.prod(shape) for name, shape in shapes.items()]


_FLAT = ("start", "file_stops", "name_stops", "names")


def map_table(sidecar: Path) -> Table:
    """Map the table that `read_table_header` has approved; its memory pages are shared by all processes that map it."""
    with open_regular(sidecar) as file:
        header = file.readline(_LONGEST_HEADER)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    columns, at = {}, _aligned(len(header))
    for name, dtype, shape in json.loads(header)["columns"]:
        count = math.prod(shape)
        columns[name] = np.frombuffer(mapped, dtype, count, at if count else 0).reshape(shape)
        at += _aligned(columns[name].nbytes)
    return Table(**columns)


def _aligned(size: int) -> int:
    return size + -size % _ALIGNED
