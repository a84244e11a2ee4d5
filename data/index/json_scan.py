"""Tables of .json and .jsonl files: where each record stands and what it is planned with, found in one walk over the file.

Objects of an array are decoded in windows of the file. One that a window cuts, or that is broken, is measured by its brackets.
"""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.index.json_borders import BOM, array_start, check_encoding, count_lines, object_end, refuse, skip_space
from data.index.reader import MAX_RECORD_BYTES
from data.index.table import KINDS, Table
from data.index.token_estimate import Plan, plan_range, plan_value
from model.errors import DataError

Advance = Callable[[int], object]
"""Callback that receives the number of bytes processed since the last call."""
WINDOW = 1 << 18
"""Bytes that are decoded to text at once. A decoder's error counts the lines of the whole window, so larger ones are no faster."""
_REPORTED = 1 << 20  # bytes between two reports of progress
_Found = tuple[int, int, Plan]
"""First byte of a record, one past its last byte, and its plan."""


def scan(path: Path, advance: Advance) -> Table:
    """Return the table of a .json or .jsonl file. Raises `DataError` if it holds no record or is no list of records."""
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; expected at least one record")
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    check_encoding(data, str(path))
    find = _objects if path.suffix.lower() == ".json" else _lines
    rows = array("q")  # a list of tuples would take ten times the memory
    line, seen, reported = 1, 0, 0
    for start, stop, (tokens, media) in find(data, len(BOM) if data[: len(BOM)] == BOM else 0, str(path)):
        line += count_lines(data, seen, start)
        seen = start
        rows.extend((start, stop, line, tokens, *media))
        if stop - reported >= _REPORTED:
            advance(stop - reported)
            reported = stop
    advance(len(data) - reported)
    if not rows:
        raise DataError(f"{path}: holds no record")
    columns = np.frombuffer(rows, dtype=np.int64).reshape(-1, 4 + len(KINDS))
    media_counts = np.minimum(columns[:, 4:], np.iinfo(np.int16).max).astype(np.int16)
    return Table(columns[:, 0], columns[:, 1], columns[:, 2], columns[:, 3].astype(np.int32), media_counts)


def _lines(data: mmap.mmap, at: int, name: str) -> Iterator[_Found]:
    """Yield every line that is not blank, without the white space around it."""
    while at < len(data):
        newline = data.find(b"\n", at)
        start, stop = at, newline if newline >= 0 else len(data)
        at = stop + 1
        if stop - start <= MAX_RECORD_BYTES:  # a longer one is refused when it is read, so white space does not matter
            line = data[start:stop]
            stop -= len(line) - len(line.rstrip())
            start += len(line) - len(line.lstrip())
        if start < stop:
            yield start, stop, plan_range(data, start, stop)


def _objects(data: mmap.mmap, at: int, name: str) -> Iterator[_Found]:
    """Yield the objects of a JSON array. Raises `DataError` where the array is broken between them."""
    at = array_start(data, at, name)
    if data[at : at + 1] == b"]":
        return
    window = _Window(data)
    while True:
        if data[at : at + 1] != b"{":
            refuse(data, at, name, "expected the '{' of the next record")
        if (decoded := window.decode(at)) is not None:
            stop, value = decoded
            yield at, stop, plan_value(value, stop - at)
        else:
            stop = object_end(data, at, name)
            yield at, stop, plan_range(data, at, stop)
        at = skip_space(data, stop)
        if data[at : at + 1] == b"]":
            break
        if data[at : at + 1] != b",":
            refuse(data, at, name, "expected ',' or ']' after a record")
        at = skip_space(data, at + 1)
    if (rest := skip_space(data, at + 1)) != len(data):
        refuse(data, rest, name, "there is more after the end of the array")


class _Window:
    """Text of a part of the file, from which objects that follow one another are decoded."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._text, self._is_ascii = data, "", True
        self._byte, self._char = 0, 0  # one place of the file, counted in bytes of the file and in characters of the text

    def decode(self, at: int) -> tuple[int, Any] | None:
        """Return the end of the object at byte `at` and the object; None if it is no JSON or the window ends within it."""
        self._char += at - self._byte  # between two objects stand white space and a comma: a byte each
        if self._char >= len(self._text):
            # Bytes that are no UTF-8 become one character each and are encoded to the same bytes again.
            self._text, self._char = self._data[at : at + WINDOW].decode("utf-8", "surrogateescape"), 0
            self._is_ascii = self._text.isascii()
        try:
            value, end = _DECODER.raw_decode(self._text, self._char)
        except (ValueError, RecursionError):
            self._text = ""
            return None
        length = end - self._char
        self._byte = at + (length if self._is_ascii else len(self._text[self._char : end].encode("utf-8", "surrogateescape")))
        self._char = end
        return self._byte, value


_DECODER = json.JSONDecoder()
