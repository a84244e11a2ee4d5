"""Places in a mapped JSON file, found by its bytes alone: where an array and an object begin and end, whatever the strings hold.

Files that are no list of records are refused here, with the line and what is wrong.
"""

from __future__ import annotations

import mmap
import re
from typing import NoReturn

from model.errors import DataError

BOM = b"\xef\xbb\xbf"
_OUTSIDE, _INSIDE = re.compile(rb'["{}\[\]]'), re.compile(rb'["\\]')  # what counts outside and inside a string
_PIECE = 1 << 20  # bytes
_LONGEST_KEY, _NUM_KEYS = 200, 8  # bytes of a key, and how many keys, that an error message names
_LAST_SPACE = 0x20  # no white space has a larger byte
_SPACE = re.compile(rb"[ \t\r\n]*+")


def array_start(data: mmap.mmap, start: int, name: str) -> int:
    """Return the place of the first value of the array. Raises `DataError` if the file is no array."""
    at = skip_space(data, start)
    if data[at : at + 1] != b"[":
        if keys := _list_keys(data, at, name):
            lists = " or ".join(map(repr, keys))
            reason = f"the file is one JSON object, not a list of records; if they are the list under {lists}, "
            refuse(data, at, name, reason + "write that list alone into a file")
        refuse(data, at, name, "the file is no array; name it .jsonl if it holds one object per line")
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
        if skip_space(data, object_end(data, at, name)) != len(data):
            return []
    except DataError:  # it never ends
        return []
    found, at, word = [], at + 1, b""
    while (match := _search(_OUTSIDE, data, at)) is not None and match[0] not in b"}]":
        at = _string_end(data, match.end()) if match[0] == b'"' else object_end(data, match.start(), name)
        if match[0] == b'"':
            word = data[match.end() : at - 1]
        elif match[0] == b"[":  # the last string before a value is its key
            found.append(word[:_LONGEST_KEY].decode("utf-8", "replace"))
    return [] if {"conversations", "messages"} & set(found) else found[:_NUM_KEYS]


def skip_space(data: mmap.mmap, at: int) -> int:
    """Return the place of the first byte from `at` on that is no JSON white space, or the end of the file."""
    if at < len(data) and data[at] > _LAST_SPACE:
        return at
    match = _SPACE.match(data, at)
    return match.end() if match else at


def object_end(data: mmap.mmap, start: int, name: str) -> int:
    """Return the place after the object that begins at `start`. Raises `DataError` if it never ends."""
    depth, at = 0, start
    while (match := _search(_OUTSIDE, data, at)) is not None:
        at = match.end()
        if match[0] == b'"':
            at = _string_end(data, at)
            continue
        depth += 1 if match[0] in b"{[" else -1
        if depth == 0:
            return at
    refuse(data, start, name, "the record that starts here never ends; a quote or a bracket is missing")


def _string_end(data: mmap.mmap, at: int) -> int:
    """Return the place after the string whose inside begins at `at`; the end of the file if the string never ends."""
    while (match := _search(_INSIDE, data, at)) is not None:
        if match[0] == b'"':
            return match.end()
        at = match.end() + 1  # past the byte that the backslash escapes
    return len(data)


def _search(mark: re.Pattern[bytes], data: mmap.mmap, at: int) -> re.Match[bytes] | None:
    """Find the next of the single bytes that `mark` matches, a piece at a time: a regular expression holds the GIL."""
    for low in range(at, len(data), _PIECE):
        if (match := mark.search(data, low, low + _PIECE)) is not None:
            return match
    return None


def refuse(data: mmap.mmap, at: int, name: str, reason: str) -> NoReturn:
    """Raise the `DataError` of a file that is broken at byte `at`, with the line and what stands there."""
    found = data[at : at + 20].decode("utf-8", "replace")
    if not found:
        raise DataError(f"{name}: {reason}; found its end")
    raise DataError(f"{name}:{count_lines(data, 0, at) + 1}: {reason}; found {found!r}")


def count_lines(data: mmap.mmap, start: int, stop: int) -> int:
    """Count the line ends in [start, stop), a piece at a time because a slice is a copy."""
    if stop - start <= _PIECE:
        return data[start:stop].count(b"\n")
    return sum(data[at : min(at + _PIECE, stop)].count(b"\n") for at in range(start, stop, _PIECE))
