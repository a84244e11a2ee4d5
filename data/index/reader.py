"""The interface between the index and the file formats: a reader returns the records of one kind of file by number."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from data.index.source_files import Shards
from data.index.table import Table
from data.media.blob import Blob
from data.records.media_refs import MediaRef
from model.files.untrusted import open_regular, parse_json

MAX_RECORD_BYTES = 1 << 24
"""Bytes of one record's JSON. Media stand in files of their own; a text of this size is longer than any context that is trained."""
MAX_RECORD_BRACKETS = 1 << 20
"""Brackets of one record's JSON: objects and lists take twenty times their bytes in memory."""


class RowError(Exception):
    """A record cannot be read. The message is the reason alone; the index adds the record's place."""


class RecordReader(Protocol):
    """Records of a source, all of whose files are of one kind. Forked and pickled copies may be used side by side."""

    def raw(self, i: int) -> Any:
        """Return the JSON value of record `i`. Raises `RowError`."""

    def blob(self, i: int, ref: MediaRef) -> Blob | None:
        """Return the place of a medium of record `i` if the records' own file holds it, else None. Raises `MediaError`."""

    def describe_position(self, i: int) -> str:
        """Return where record `i` is in its file, for messages: a line, a row, a key."""


class JsonRows:
    """Objects of .json arrays and lines of .jsonl files."""

    def __init__(self, shards: Shards, table: Table) -> None:
        self._shards, self._table = shards, table

    def raw(self, i: int) -> Any:
        text = read(self._shards, self._table, i)
        try:
            value = decode_json(text)
        except RowError as error:
            raise RowError(f"{error}{layout_advice(self._path_of(i))}") from None
        if isinstance(value, list) and (advice := layout_advice(self._path_of(i))):
            raise RowError(f"is a list{advice}")
        return value

    def _path_of(self, i: int) -> str:
        return self._shards.paths[self._table.file_of(i)]

    def blob(self, i: int, ref: MediaRef) -> Blob | None:
        return None

    def describe_position(self, i: int) -> str:
        return str(self._table.line[i])


@cache
def layout_advice(path: str) -> str:
    """Describe the layout of a .jsonl file whose first lines are not one object per line; "" if they look as expected."""
    if not path.lower().endswith(".jsonl"):
        return ""
    try:
        with open_regular(Path(path)) as file:
            head = file.read(_HEAD)
    except OSError:
        return ""
    first, _, rest = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if first.startswith(b"[") and not (rest.strip() and _is_value(first)):
        return "; the file begins as one JSON array does, not with one object per line: name it .json"
    if first.strip() == b"{" and rest.lstrip().startswith(b'"'):
        return "; the file's records take several lines each: a .jsonl file has one per line, a .json file holds an array of them"
    return ""


_HEAD = 1 << 16  # bytes


def _is_value(text: bytes) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def read(shards: Shards, table: Table, i: int) -> bytes:
    """Return the bytes of record `i`. Raises `RowError`."""
    start, stop = int(table.start[i]), int(table.stop[i])
    if not 0 <= start <= stop:
        raise RowError("cannot be read: its index is damaged; remove the run's index folder and start again")
    if stop - start > MAX_RECORD_BYTES:
        raise RowError(f"has {stop - start} bytes; at most {MAX_RECORD_BYTES} are read")
    try:
        found = shards.read(table.file_of(i), start, stop)
    except OSError as error:
        raise RowError(f"cannot be read: {error.strerror}") from None
    if len(found) < stop - start:
        raise RowError("cannot be read: the file has become shorter since it was indexed")
    return found


def decode_json(text: bytes) -> Any:
    """Decode `text` as one JSON value. Raises `RowError`."""
    if (count := text.count(b"[") + text.count(b"{")) > MAX_RECORD_BRACKETS:
        raise RowError(f"has {count} opening brackets; at most {MAX_RECORD_BRACKETS} are read")
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:  # its own text counts lines from the record's start, which reads like a line of the file
        raise RowError(f"cannot be decoded: {error.msg}, at character {error.pos + 1} of the record") from None
    except ValueError as error:
        raise RowError(f"cannot be decoded: {error}") from None
