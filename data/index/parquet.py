"""Records in files of columns, .parquet and .arrow (extra `parquet`): a column is a key of the records, pictures may be bytes.

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
from typing import TYPE_CHECKING

import numpy as np

from data.index.json_scan import Advance
from data.index.media_column import as_list, content_of, is_unnamed, names_of, present_media
from data.index.reader import RowError, decode_json
from data.index.row_groups import MEDIA_COLUMNS, damage, open_groups
from data.index.source_files import Shards
from data.index.table import Table
from data.index.token_estimate import Plan, plan_columns, plan_record
from data.media.blob import Blob, MediaError
from data.records.media_refs import MediaRef
from data.records.preferences import PAIR_KEYS
from data.records.shapes import SHAPES, TURN_KEYS
from model.errors import DataError
from model.files.untrusted import Json

if TYPE_CHECKING:
    from pyarrow import Table as ArrowTable

_TOOL_COLUMNS = ("tools", "functions")
_PAIR_COLUMNS = ("prompt", *PAIR_KEYS)
_ROWS_AT_ONCE = 1024
_NEEDED = tuple((key,) for key in TURN_KEYS) + tuple(shape.needs for shape in SHAPES) + (PAIR_KEYS,)
"""Columns of which a file needs one group."""


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
        unsure = [column for column in MEDIA_COLUMNS if any(map(is_unnamed, as_list(row.get(column))))]
        return _record(row | {column: self._row(i, column).get(column) for column in unsure})

    def blob(self, i: int, ref: MediaRef) -> Blob | None:
        for column in (ref.kind, f"{ref.kind}s"):
            try:
                content = self._media(i, column).get(ref.path)
            except RowError as error:
                raise MediaError(f"{ref.path!r} {error}") from None
            if content is not None:
                name = f"{self._shards.names[self._table.file_of(i)]}:{self.describe_position(i)}:{ref.path}"
                return Blob(name, data=content)
        return None

    def describe_position(self, i: int) -> str:
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
                self._cached_groups[column] = wanted, open_groups(self._shards.paths[file]).read(group, column)
            except damage() as error:
                raise RowError(f"cannot be read: {error}") from None
        return _values(self._cached_groups[column][1], row)


def scan_parquet(path: Path, advance: Advance) -> Table:
    """Return the table of a .parquet file. Raises `DataError` if it is damaged, has no column of turns, or no row."""
    opened = open_groups(str(path))
    if not any({*needed} <= {*opened.names} for needed in _NEEDED):
        columns = ", ".join("+".join(needed) for needed in _NEEDED)
        raise DataError(f"{path}: has no columns that a record is read from ({columns}); it has {', '.join(opened.names)}")
    plans: list[Plan] = []
    sizes = []
    for group in range(opened.num_groups):
        try:
            rows = opened.read(group)
        except damage() as error:
            raise DataError(f"{path}: row group {group} cannot be read: {error}") from None
        sizes.append(rows.num_rows)  # the rows that were read, not the number that the file declares
        for first in range(0, rows.num_rows, _ROWS_AT_ONCE):
            plans.extend(_plans(rows.slice(first, _ROWS_AT_ONCE)))
            advance(0)  # a group may take minutes
        advance(opened.num_bytes(group))
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
    except damage() as error:
        raise RowError(f"cannot be decoded: {error}") from None


def _all_values(rows: ArrowTable) -> list[Json]:
    """Return every row of a table; {} for damaged rows."""
    try:
        return rows.to_pylist()
    except damage():
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


def _record(row: Json) -> Json:
    """Return a row as the JSON of a record: media by name, turns decoded, nulls left out. Raises `RowError`."""
    found = {key: value for key, value in row.items() if value is not None}
    for column in MEDIA_COLUMNS:
        if column in found:
            names = names_of(column, present_media(found[column]))
            found[column] = names if isinstance(found[column], list) else next(iter(names), None)
    for column in (*TURN_KEYS, *_TOOL_COLUMNS, *_PAIR_COLUMNS):
        if isinstance(found.get(column), str) and column in TURN_KEYS:
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
