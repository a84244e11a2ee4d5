"""Files of columns that are read by groups of rows: .parquet, and the .arrow files of a `datasets` folder (extra `parquet`)."""

from __future__ import annotations

import os
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from data.index.table import KINDS
from model.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pyarrow import Array, RecordBatch
    from pyarrow import Table as ArrowTable
    from pyarrow.parquet import ParquetFile

MEDIA_COLUMNS = tuple(key for kind in KINDS for key in (kind, f"{kind}s"))
MAX_GROUP_BYTES, MAX_GROUP_ROWS = 1 << 33, 1 << 24
"""Limits for one row group, unpacked and with its media: whole columns of it are held in memory."""
MAX_OPEN = 32  # .arrow files mapped at once by a process


class RowGroups(Protocol):
    """An open file of columns. All methods raise one of `damage()` for broken bytes."""

    names: list[str]  # of the columns
    num_groups: int

    def num_bytes(self, group: int) -> int:
        """Return the bytes of a group, for progress."""

    def read(self, group: int, column: str = "") -> ArrowTable:
        """Return one column of a group, if there is one of that name; without a name all columns.

        All columns come without the bytes of media, which are read on demand.
        """


def open_groups(path: str) -> RowGroups:
    """Open a .parquet or .arrow file. Raises `DataError` for one that is damaged, `ConfigError` where pyarrow is missing."""
    arrow()
    try:
        return _mapped(os.getpid(), path) if path.lower().endswith(".arrow") else ParquetGroups(path)
    except damage() as error:
        kind = os.path.splitext(path)[1].lower().lstrip(".")
        raise DataError(f"{path}: is no readable {kind} file: {error}") from None


def damage() -> tuple[type[Exception], ...]:
    """Return the exceptions that pyarrow raises for broken bytes, names that are no UTF-8, and dates of no calendar."""
    return DataError, OSError, ValueError, OverflowError, KeyError, arrow().lib.ArrowException


def arrow() -> ModuleType:
    """Return pyarrow. Raises `ConfigError` where it is missing."""
    try:
        import pyarrow
    except ImportError as error:
        raise ConfigError("reading .parquet and .arrow files needs pyarrow: pip install -e '.[parquet]'") from error
    return pyarrow


class ParquetGroups:
    """A .parquet file. Where media stand in it, groups of few rows make random access fast."""

    def __init__(self, path: str) -> None:
        from pyarrow import parquet

        self._file: ParquetFile = parquet.ParquetFile(path)
        self.names, self._leaves = self._file.schema_arrow.names, _leaves(self._file)
        self.num_groups = self._file.num_row_groups

    def num_bytes(self, group: int) -> int:
        return int(self._file.metadata.row_group(group).total_byte_size)

    def read(self, group: int, column: str = "") -> ArrowTable:
        facts = self._file.metadata.row_group(group)
        # The size is that of the whole group: asking a column of a damaged file for its own size crashes the process.
        _check_size(facts.num_rows, facts.total_byte_size)
        inside = [leaf for leaf in self._leaves if leaf.split(".")[0] == column]
        return self._file.read_row_group(group, columns=inside if column else self._without_bytes(), use_threads=False)

    def _without_bytes(self) -> list[str]:
        found = []
        for i, leaf in enumerate(self._leaves):
            column = self._file.schema.column(i)
            is_bytes = column.physical_type == "BYTE_ARRAY" and column.logical_type.type == "NONE"
            # Bytes without a path beside them are read: nothing else says whether a row has a medium.
            beside = any(other != leaf and other.startswith(leaf.removesuffix("bytes")) for other in self._leaves)
            if not is_bytes or (leaf.split(".")[0] in MEDIA_COLUMNS and not (leaf.endswith(".bytes") and beside)):
                found.append(leaf)
        return found


def _leaves(file: ParquetFile) -> list[str]:
    return [file.schema.column(i).path for i in range(len(file.schema))]


def _check_size(rows: int, num_bytes: int) -> None:
    if num_bytes > MAX_GROUP_BYTES or rows > MAX_GROUP_ROWS:
        raise DataError(
            f"it holds {rows} rows of {num_bytes} bytes; at most {MAX_GROUP_ROWS} and {MAX_GROUP_BYTES} are read at once: write "
            "the file with smaller row groups"
        )


@lru_cache(maxsize=MAX_OPEN)
def _mapped(process: int, path: str) -> ArrowGroups:
    return ArrowGroups(path)


class ArrowGroups:
    """An .arrow file of Hugging Face's datasets: a stream of record batches, mapped into memory. Only what is used is read."""

    def __init__(self, path: str) -> None:
        pa = arrow()
        with pa.ipc.open_stream(pa.memory_map(path)) as stream:
            self._batches: list[RecordBatch] = list(stream)
            self.names = stream.schema.names
        for batch in self._batches:
            batch.validate(full=False)  # borders of the buffers: a wrong one would be read outside the file
        self.num_groups = len(self._batches)

    def num_bytes(self, group: int) -> int:
        return int(self._batches[group].nbytes)

    def read(self, group: int, column: str = "") -> ArrowTable:
        batch = self._batches[group]
        _check_size(batch.num_rows, batch.nbytes)
        names = [name for name in self.names if column in ("", name)]
        columns = [batch.column(self.names.index(name)) for name in names]
        if not column:
            columns = [_pathed(values) if name in MEDIA_COLUMNS else values for name, values in zip(names, columns)]
        return arrow().Table.from_arrays(columns, names)


def _pathed(values: Array) -> Array:
    """Return media without their bytes where a path stands beside them; other values as they are."""
    pa = arrow()
    if pa.types.is_list(values.type):
        return pa.ListArray.from_arrays(values.offsets, _pathed(values.values), mask=values.is_null())
    if not pa.types.is_struct(values.type):
        return values
    kept = [field.name for field in values.type if field.name != "bytes"]
    if not kept or len(kept) == len(values.type):
        return values
    return pa.StructArray.from_arrays([values.field(name) for name in kept], kept, mask=values.is_null())
