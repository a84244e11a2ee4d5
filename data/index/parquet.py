"""Records in .parquet files: the columns are the keys of a record, and pictures may be columns of bytes (extra `parquet`).

A media column holds paths, bytes, or the structs {"bytes", "path"} of Hugging Face's datasets, one or a list of them. Media that
are null, or structs of nulls, are absent. `conversations`, `messages` and `tools` are lists of structs, or strings of JSON. Files
are read by row groups, the smallest part that can be read alone: where media stand in the file, row groups of few rows make random
access fast.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from data.index.json_scan import Advance
from data.index.media_column import as_list, content_of, is_unnamed, names_of, present_media
from data.index.reader import RowError, decode_json
from data.index.source_files import Shards
from data.index.table import KINDS, Table
from data.index.token_estimate import Plan, plan_columns, plan_record
from data.media.blob import Blob, MediaError
from data.records.media_refs import MediaRef
from model.errors import ConfigError, DataError
from model.files.untrusted import Json

if TYPE_CHECKING:
    from pyarrow import Table as ArrowTable
    from pyarrow.parquet import ParquetFile

_MEDIA_COLUMNS = tuple(key for kind in KINDS for key in (kind, f"{kind}s"))
_TURN_COLUMNS = ("conversations", "messages")
_TOOL_COLUMNS = ("tools", "functions")
_ROWS_AT_ONCE = 1024
MAX_GROUP_BYTES, MAX_GROUP_ROWS = 1 << 33, 1 << 24
"""Limits for one row group, unpacked and with its media: whole columns of it are held in memory."""


class ParquetRows:
    """Rows of .parquet files. A process caches the row group it read last: once without media, and once per media column."""

    def __init__(self, shards: Shards, table: Table) -> None:
        self._shards, self._table = shards, table
        self._cached_groups: dict[
            str, tuple[tuple[int, int, int], ArrowTable]
        ] = {}  # by media column, "" for all others: (process, file, group) and its rows
        self._cached_media: dict[
            str, tuple[int, dict[str, bytes | None]]
        ] = {}  # by media column: the row that was read last, and its media by name

    def __reduce__(self) -> tuple[type[ParquetRows], tuple[Shards, Table]]:
        return ParquetRows, (self._shards, self._table)

    def raw(self, i: int) -> object:
        row = self._row(i, "")
        # A struct without a path has a medium only if it has bytes, and those are not read with the text.
        unsure = [column for column in _MEDIA_COLUMNS if any(map(is_unnamed, as_list(row.get(column))))]
        return _record(row | {column: self._row(i, column).get(column) for column in unsure})

    def blob(self, i: int, ref: MediaRef) -> Blob | None:
        for column in (ref.kind, f"{ref.kind}s"):
            try:
                content = self._media(i, column).get(ref.path)
            except RowError as error:
                raise MediaError(f"{ref.path!r} {error}") from None
            if content is not None:
                name = f"{self._shards.names[self._table.file_of(i)]}:{self.place(i)}:{ref.path}"
                return Blob(name, data=content)
        return None

    def place(self, i: int) -> str:
        return str(self._table.line[i])

    def _media(self, i: int, column: str) -> dict[str, bytes | None]:
        """Return the contents, by name, of a media column of row `i`; of a repeated name, the first."""
        if self._cached_media.get(column, (-1, {}))[0] != i:
            self._cached_media.pop(column, None)  # before reading, or the media of two rows would be in memory at once
            values = present_media(self._row(i, column).get(column))
            named = list(zip(names_of(column, values), map(content_of, values)))
            self._cached_media[column] = i, {name: content for name, content in reversed(named) if isinstance(name, str)}
        return self._cached_media[column][1]

    def _row(self, i: int, column: str) -> Json:
        file, group, row = self._table.file_of(i), int(self._table.start[i]), int(self._table.stop[i])
        wanted = (os.getpid(), file, group)  # a file opened before a fork is not used after it
        if column not in self._cached_groups or self._cached_groups[column][0] != wanted:
            self._cached_groups.pop(column, None)  # before reading, or two groups would be in memory at once
            try:
                opened = _open(self._shards.paths[file])
                leaves = (
                    _columns_without_bytes(opened)
                    if not column
                    else [leaf for leaf in _leaves(opened) if leaf.split(".")[0] == column]
                )
                self._cached_groups[column] = wanted, _group(opened, group, leaves)
            except _damage() as error:
                raise RowError(f"cannot be read: {error}") from None
        return _values(self._cached_groups[column][1], row)


def scan_parquet(path: Path, advance: Advance) -> Table:
    """Return the table of a .parquet file. Raises `DataError` if it is damaged, has no column of turns, or no row."""
    opened = _open(str(path))
    if not set(_TURN_COLUMNS) & set(opened.schema_arrow.names):
        raise DataError(f"{path}: has no column {' or '.join(_TURN_COLUMNS)}; its columns: {', '.join(opened.schema_arrow.names)}")
    plans: list[Plan] = []
    sizes = []
    for group in range(opened.num_row_groups):
        try:
            rows = _group(opened, group, _columns_without_bytes(opened))
        except _damage() as error:
            raise DataError(f"{path}: row group {group} cannot be read: {error}") from None
        sizes.append(rows.num_rows)  # the rows that were read, not the number that the file declares
        for first in range(0, rows.num_rows, _ROWS_AT_ONCE):
            plans.extend(_plans(rows.slice(first, _ROWS_AT_ONCE)))
            advance(0)  # a group may take minutes
        advance(opened.metadata.row_group(group).total_byte_size)
    if not plans:
        raise DataError(f"{path}: holds no record")
    text_tokens, media = plan_columns(plans)
    return Table(
        start=np.repeat(np.arange(len(sizes)), sizes),
        stop=np.concatenate([np.arange(size) for size in sizes]),
        line=np.arange(1, sum(sizes) + 1),
        text_tokens=text_tokens,
        media=media,
    )


def _values(rows: ArrowTable, k: int) -> Json:
    """Return row k of a table; {} if the table has no such row. Raises `RowError` for a damaged row."""
    try:
        return next(iter(rows.slice(k, 1).to_pylist()), {})
    except _damage() as error:
        raise RowError(f"cannot be decoded: {error}") from None


def _all_values(rows: ArrowTable) -> list[Json]:
    """Return every row of a table; {} for damaged rows."""
    try:
        return rows.to_pylist()
    except _damage():
        found: list[Json] = []
        for k in range(rows.num_rows):
            try:
                found.append(_values(rows, k))
            except RowError:
                found.append({})
        return found


def _plans(rows: ArrowTable) -> Iterator[Plan]:
    for row in _all_values(rows):
        try:
            text = json.dumps(_record(row), ensure_ascii=False, default=str)
        except RowError:  # found and named when the record is read
            text = json.dumps(row, ensure_ascii=False, default=str)
        yield plan_record(text.encode("utf-8", "surrogatepass"))


def _open(path: str) -> ParquetFile:
    _arrow()
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(path)
        _ = opened.schema_arrow.names, _leaves(opened)  # read here, so that damage in them is reported here
        return opened
    except _damage() as error:
        raise DataError(f"{path}: is no readable parquet file: {error}") from None


def _group(opened: ParquetFile, group: int, leaves: list[str]) -> ArrowTable:
    """Return the columns `leaves` of one row group. Raises `DataError` if the group declares more than fits into memory."""
    facts = opened.metadata.row_group(group)
    # The size is that of the whole group: asking a column of a damaged file for its own size crashes the process.
    if facts.total_byte_size > MAX_GROUP_BYTES or facts.num_rows > MAX_GROUP_ROWS:
        raise DataError(
            f"it holds {facts.num_rows} rows of {facts.total_byte_size} bytes; at most {MAX_GROUP_ROWS} and {MAX_GROUP_BYTES} are "
            "read at once: write the file with smaller row groups"
        )
    return opened.read_row_group(group, columns=leaves, use_threads=False)


def _damage() -> tuple[type[Exception], ...]:
    """Return the exceptions that pyarrow raises for broken bytes, names that are no UTF-8, and dates of no calendar."""
    return DataError, OSError, ValueError, OverflowError, KeyError, _arrow().lib.ArrowException


def _arrow() -> ModuleType:
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError("reading .parquet files needs pyarrow: pip install -e '.[parquet]'") from error
    return pyarrow


def _leaves(opened: ParquetFile) -> list[str]:
    return [opened.schema.column(i).path for i in range(len(opened.schema))]


def _columns_without_bytes(opened: ParquetFile) -> list[str]:
    """Return the columns of a record without the bytes of its media, which are read on demand."""
    leaves, found = _leaves(opened), []
    for i, leaf in enumerate(leaves):
        column = opened.schema.column(i)
        is_bytes = column.physical_type == "BYTE_ARRAY" and column.logical_type.type == "NONE"
        # Bytes without a path beside them are read: nothing else says whether a row has a medium.
        beside = any(other != leaf and other.startswith(leaf.removesuffix("bytes")) for other in leaves)
        if not is_bytes or (leaf.split(".")[0] in _MEDIA_COLUMNS and not (leaf.endswith(".bytes") and beside)):
            found.append(leaf)
    return found


def _record(row: Json) -> Json:
    """Return a row as the JSON of a record: media by name, turns decoded, nulls left out. Raises `RowError`."""
    found = {key: value for key, value in row.items() if value is not None}
    for column in _MEDIA_COLUMNS:
        if column in found:
            names = names_of(column, present_media(found[column]))
            found[column] = names if isinstance(found[column], list) else next(iter(names), None)
    for column in (*_TURN_COLUMNS, *_TOOL_COLUMNS):
        if isinstance(found.get(column), str) and column in _TURN_COLUMNS:
            found[column] = decode_json(found[column].encode("utf-8", "surrogatepass"))
        elif column in found:
            found[column] = _without_nulls(found[column])
    return found


def _without_nulls(value: object) -> object:
    """Return a value without its null fields: all structs of a column have the same fields, and unused ones are null."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value
