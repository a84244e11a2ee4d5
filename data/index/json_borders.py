"""An exact, sequential finder of record borders in a JSON file: slow, and able to say what is wrong with the file.

`data.index.json_scan` does the same for valid files in a fraction of the time and falls back to this module for all others.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from typing import NoReturn

from data.limits import MAX_RECORD_BYTES
from model.errors import DataError

BOM = b"\xef\xbb\xbf"
# Possessive: a match never backtracks, whatever the file holds.
_INSIDE = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)  # the inside of a string
_BRACKET = re.compile(
    rb'((?:[^"{}\[\]]++|"' + _INSIDE.pattern + rb'")*+)([{}\[\]])?', re.DOTALL
)  # everything up to the next bracket outside strings
_PIECE = 1 << 20  # bytes
_KEY = re.compile(rb'"([^"\\]*)"\s*:\s*\Z')
_LONGEST_KEY, _NUM_KEYS = 200, 8  # bytes that are searched for a key, and how many keys an error message names
_SPACE = re.compile(rb"[ \t\r\n]*+")


def line_borders(data: mmap.mmap, start: int, name: str) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of every line that is not blank, without the white space around it."""
    while start < len(data):
        newline = data.find(b"\n", start)
        stop = newline if newline >= 0 else len(data)
        if stop - start > MAX_RECORD_BYTES:  # refused when it is read, so white space around it does not matter
            yield start, stop
            start = stop + 1
            continue
        line = data[start:stop]
        if body := line.strip():
            low = start + len(line) - len(line.lstrip())
            yield low, low + len(body)
        start = stop + 1


def array_borders(data: mmap.mmap, start: int, name: str) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the objects of a JSON array, found by the brackets outside strings; the objects are not decoded.

    Raises `DataError` where the array is broken between them.
    """
    at = array_start(data, start, name)
    if data[at : at + 1] == b"]":
        return
    while True:
        if data[at : at + 1] != b"{":
            _broken(data, at, name, "expected the '{' of the next record")
        stop = _object_end(data, at, name)
        yield at, stop
        at = skip_space(data, stop)
        if data[at : at + 1] == b"]":
            break
        if data[at : at + 1] != b",":
            _broken(data, at, name, "expected ',' or ']' after a record")
        at = skip_space(data, at + 1)
    if (rest := skip_space(data, at + 1)) != len(data):
        _broken(data, rest, name, "there is more after the end of the array")


def next_object(data: mmap.mmap, at: int, is_first: bool, name: str) -> tuple[int, int] | None:
    """Return (start, stop) of the next object of an array, from the array's start or from the end of an object.

    Returns None if something else follows.
    """
    at = skip_space(data, at)
    if not is_first:
        if data[at : at + 1] != b",":
            return None
        at = skip_space(data, at + 1)
    return (at, _object_end(data, at, name)) if data[at : at + 1] == b"{" else None


def array_start(data: mmap.mmap, start: int, name: str) -> int:
    """Return the place of the first value of the array. Raises `DataError` if the file is no array."""
    at = skip_space(data, start)
    if data[at : at + 1] != b"[":
        if keys := _list_keys(data, at, name):
            _broken(
                data,
                at,
                name,
                f"the file is one JSON object, not a list of records; if they are the list under {' or '.join(map(repr, keys))}, "
                "write that list alone into a file",
            )
        _broken(data, at, name, "the file is no array; name it .jsonl if it holds one object per line")
    return skip_space(data, at + 1)


def check_encoding(data: mmap.mmap, name: str) -> None:
    """Raise `DataError` for bytes that begin like a compressed file or UTF-16, whatever the file is called."""
    if data[:2] == b"\x1f\x8b" or data[:4] in (b"PK\x03\x04", b"\x28\xb5\x2f\xfd") or data[:3] == b"BZh":
        raise DataError(f"{name}: is compressed; unpack it: a compressed file cannot be read at any place")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or (data[:1] in (b"[", b"{") and data[1:2] == b"\0"):
        raise DataError(f"{name}: is UTF-16; JSON is UTF-8: save it as that")


def _list_keys(data: mmap.mmap, at: int, name: str) -> list[str]:
    """Return the keys that hold lists if the whole file is one object that is no record itself; otherwise an empty list."""
    if data[at : at + 1] != b"{":
        return []
    try:
        if skip_space(data, _object_end(data, at, name)) != len(data):
            return []
    except DataError:  # it never ends
        return []
    found, at = [], at + 1
    while (match := _BRACKET.match(data, at)) is not None and match[2] in (b"{", b"["):
        opening = match.start(2)
        if match[2] == b"[" and (key := _KEY.search(data[max(at, opening - _LONGEST_KEY) : opening])):
            found.append(key[1].decode("utf-8", "replace"))
        at = _object_end(data, opening, name)
    return [] if {"conversations", "messages"} & set(found) else found[:_NUM_KEYS]


def skip_space(data: mmap.mmap, at: int) -> int:
    """Return the place of the first byte from `at` on that is no JSON white space, or the end of the file."""
    match = _SPACE.match(data, at)
    return match.end() if match else at


def _object_end(data: mmap.mmap, start: int, name: str) -> int:
    depth, at = 0, start
    # Match a piece at a time: a regular expression holds the GIL during a match.
    while (match := _BRACKET.match(data, at, at + _PIECE)) and (at := match.end() if match.end() > at else _string_end(data, at)):
        if match[2]:
            depth += 1 if match[2] in b"{[" else -1
            if depth == 0:
                return at
    _broken(data, start, name, "the record that starts here never ends; a quote or a bracket is missing")


def _string_end(data: mmap.mmap, at: int) -> int:
    """Return the place after the string that opens at `at` and is longer than a piece; 0 if there is no string or it never ends."""
    is_open, at = data[at : at + 1] == b'"', at + 1
    while is_open and at < len(data):
        piece = data[at : at + _PIECE]
        plain = b'"' not in piece and b"\\" not in piece
        inside = None if plain else _INSIDE.match(piece)  # it matches nothing, too
        end = inside.end() if inside else len(piece)
        if data[at + end : at + end + 1] == b'"':
            return at + end + 1
        is_open = end > 0
        at += end
    return 0


def _broken(data: mmap.mmap, at: int, name: str, reason: str) -> NoReturn:
    found = data[at : at + 20].decode("utf-8", "replace")
    if not found:
        raise DataError(f"{name}: {reason}; found its end")
    raise DataError(f"{name}:{count_lines(data, 0, at) + 1}: {reason}; found {found!r}")


def count_lines(data: mmap.mmap, start: int, stop: int) -> int:
    """Count the line ends in [start, stop), a piece at a time because a slice is a copy."""
    return sum(data[at : min(at + _PIECE, stop)].count(b"\n") for at in range(start, stop, _PIECE))
