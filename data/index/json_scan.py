"""Tables of .json and .jsonl files, built by numpy on whole windows of the file, without decoding a record.

A window ends with the last record that is whole in it and the next window begins there, so windows share no state and the table
does not depend on their size. Irregular files, and every error message, are left to `data.index.json_borders`.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.index.json_borders import (
    BOM,
    array_start,
    check_encoding,
    count_lines,
    line_borders,
    next_object,
    skip_space,
)
from data.index.json_exact_scan import plan_record, scan_one_by_one
from data.index.json_structure import Events, find_events, nesting
from data.index.table import Table
from data.index.token_estimate import Plans, plan_by_parsing, plan_records
from data.limits import MAX_RECORD_BYTES
from model.errors import DataError

Advance = Callable[[int], object]
"""Callback that receives the number of bytes processed since the last call."""
WINDOW = 1 << 22  # bytes
_LARGEST = 1 << 22  # bytes; a longer record is scanned by itself: its events could take twenty times its size
_BRACE, _ARRAY_END, _COMMA, _NEWLINE = b"{],\n"
_JSON_SPACE, _SPACE = np.zeros((2, 256), dtype=bool)
_JSON_SPACE[list(b" \t\r\n")] = True
_SPACE[list(b" \t\r\n\x0b\x0c")] = True


class _Irregular(Exception):
    """The file is broken, or so unusual that its records are read one by one."""


@dataclass(frozen=True)
class _Part:
    """Records of one window: their places in the window, and their lines counted from the window's first line."""

    start: np.ndarray
    stop: np.ndarray
    line: np.ndarray
    plans: Plans
    size: int  # bytes that are processed
    lines: int  # line ends among them
    is_last: bool


def scan(path: Path, advance: Advance) -> Table:
    """Return the table of a .json or .jsonl file. Raises `DataError` if it holds no record or is no list of records."""
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; expected at least one record")
    with path.open("rb") as file:
        # The map is not closed here: arrays may still refer to it while an error propagates.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    check_encoding(data, str(path))
    first = len(BOM) if data[: len(BOM)] == BOM else 0
    is_array = path.suffix.lower() == ".json"
    at = array_start(data, first, str(path)) if is_array else first
    if at == len(data) and not is_array:  # a byte order mark alone
        raise DataError(f"{path}: holds no record")
    try:
        table = _table_of_parts(_parts(data, at, path, advance), count_lines(data, 0, at))
    except _Irregular:
        table = scan_one_by_one(data, first, path)
    if not len(table):
        raise DataError(f"{path}: holds no record")
    return table


def plan_values(values: list[bytes]) -> Plans:
    """Plan JSON values, none of which is blank or contains a line end. Values that are too large to be read are not planned."""
    lines = b"\n".join(value if len(value) <= _LARGEST else b"0" for value in values)
    plans = _line_window(np.frombuffer(lines, np.uint8), True, True).plans  # type: ignore[union-attr]
    for i, value in enumerate(values):
        if _LARGEST < len(value) <= MAX_RECORD_BYTES:
            plans.text_tokens[i], plans.media[i] = plan_by_parsing(value)
    return plans


def _parts(data: mmap.mmap, at: int, path: Path, advance: Advance) -> Iterator[tuple[int, _Part]]:
    """Yield (place of the window, its records) for every window. Raises `_Irregular` where the file needs the exact scan."""
    scan_window, scan_one = (_array_window, _object_alone) if path.suffix.lower() == ".json" else (_line_window, _line_alone)
    size, is_first = WINDOW, True
    while True:
        window = np.frombuffer(data, np.uint8, min(size, len(data) - at), at)
        part = scan_window(window, is_first, at + len(window) == len(data))
        if part is None:
            if at + len(window) == len(data):
                raise _Irregular
            if size < _LARGEST:
                size *= 2
                continue
            part = scan_one(data, at, is_first, str(path))
        yield at, part
        advance(part.size)
        at, size, is_first = at + part.size, WINDOW, False
        if part.is_last:
            break
    if skip_space(data, at) != len(data):
        raise _Irregular


def _table_of_parts(parts: Iterator[tuple[int, _Part]], line: int) -> Table:
    starts, stops, lines, plans = [], [], [], []
    for at, part in parts:
        starts.append(at + part.start)
        stops.append(at + part.stop)
        lines.append(1 + line + part.line)
        plans.append(part.plans)
        line += part.lines
    return Table(
        start=np.concatenate(starts),
        stop=np.concatenate(stops),
        line=np.concatenate(lines),
        text_tokens=np.concatenate([plan.text_tokens for plan in plans]),
        media=np.concatenate([plan.media for plan in plans]),
    )


def _object_alone(data: mmap.mmap, at: int, is_first: bool, name: str) -> _Part:
    """Return the next object of an array, which is larger than any window."""
    found = next_object(data, at, is_first, name)
    if found is None or found[1] == len(data):  # the end of the array is due
        raise _Irregular
    return _single_record(data, at, *found)


def _line_alone(data: mmap.mmap, at: int, is_first: bool, name: str) -> _Part:
    """Return the next line that is not blank, which is larger than any window or follows as much white space."""
    found = next(line_borders(data, at, name), None)
    if found is None:
        raise _Irregular
    return _single_record(data, at, *found)


def _single_record(data: mmap.mmap, at: int, start: int, stop: int) -> _Part:
    """Return the record at [start, stop) as the only one of a window at `at`."""
    tokens, counts = plan_record(data, start, stop)
    plans = Plans(np.array([tokens], dtype=np.int32), np.array([counts], dtype=np.int16))
    line = count_lines(data, at, start)
    return _Part(
        start=np.array([start - at]),
        stop=np.array([stop - at]),
        line=np.array([line]),
        plans=plans,
        size=stop - at,
        lines=line + count_lines(data, start, stop),
        is_last=stop == len(data),
    )


def _array_window(window: np.ndarray, is_first: bool, is_end: bool) -> _Part | None:
    """Return the whole objects in a window that begins at an array's first value or after an object; None if there is none."""
    events = find_events(window)
    inside, shift, depth = nesting(events)
    beyond = np.flatnonzero(depth < 0)[:1]
    stops = np.flatnonzero((shift < 0) & (depth == 0))
    if len(beyond):
        stops = stops[stops < beyond[0]]
    starts = np.flatnonzero((shift > 0) & (depth == 1))[: len(stops)]
    if not len(stops) and not len(beyond):
        return None
    kept = int(stops[-1]) + 1 if len(stops) else 0
    if (events.byte[starts] != _BRACE).any() or (events.escaped[:kept] & ~inside[:kept]).any():
        raise _Irregular  # outside strings a backslash escapes nothing
    start, stop = events.at[starts], events.at[stops] + 1
    size = int(stop[-1]) if len(stops) else 0
    _check_gaps(window, np.concatenate([[0], stop[:-1]])[: len(start)], start, is_first)
    newlines = events.at[events.byte == _NEWLINE]
    if len(beyond):
        end = int(events.at[beyond[0]])
        if window[end] != _ARRAY_END or not _JSON_SPACE[window[size:end]].all():
            raise _Irregular
        size = end + 1
    plans = plan_records(window, events[:kept], depth[:kept], start, stop)
    lines = int(np.searchsorted(newlines, size))
    return _Part(start, stop, np.searchsorted(newlines, start), plans, size, lines, bool(len(beyond)))


def _check_gaps(window: np.ndarray, low: np.ndarray, high: np.ndarray, is_first: bool) -> None:
    """Raise `_Irregular` unless each gap [low, high) is white space and one comma; the first gap of an array holds no comma."""
    widths = high - low
    gap = np.repeat(np.arange(len(low)), widths)
    byte = window[np.arange(len(gap)) - np.repeat(np.cumsum(widths) - widths - low, widths)]
    solid = ~_JSON_SPACE[byte]
    expected = np.ones(len(low), dtype=np.int64)
    expected[: 1 if is_first else 0] = 0
    if (byte[solid] != _COMMA).any() or (np.bincount(gap[solid], minlength=len(low)) != expected).any():
        raise _Irregular


def _line_window(window: np.ndarray, is_first: bool, is_end: bool) -> _Part | None:
    """Return the lines of a window that begins at a line start; None if none ends in it. At the end of the file, all lines end."""
    events = find_events(window)
    newlines = np.flatnonzero(events.byte == _NEWLINE)
    ends = events.at[newlines]
    if not len(ends) and not is_end:
        return None
    size = len(window) if is_end else int(ends[-1]) + 1
    low = np.concatenate([[0], ends + 1])
    high = np.concatenate([ends, [size]]) if is_end else ends
    low = low[: len(high)]
    plans_of, depth = _valid_lines(events, newlines, len(low))
    line = np.arange(len(low))
    low, high = _stripped(window, low, high)
    filled = high > low
    low, high = low[filled], high[filled]
    plans = plan_records(window, plans_of, depth, low, high)
    return _Part(low, high, line[filled], plans, size, len(ends), is_end)


def _valid_lines(events: Events, newlines: np.ndarray, num_lines: int) -> tuple[Events, np.ndarray]:
    """Return the events of the lines that may be valid JSON, and their nesting depth.

    Lines with unpaired quotes or brackets are dropped, so that an error in one line does not affect the next.
    """
    line = np.repeat(np.arange(len(newlines) + 1), np.diff(newlines + 1, prepend=0, append=len(events.at)))
    chosen = events.byte != _NEWLINE
    chosen &= line < num_lines
    for _ in range(2):  # quotes first: they decide which brackets count
        events, line = events[chosen], line[chosen]
        inside, shift, depth = nesting(events)
        broken = np.bincount(line, events.quote, num_lines) % 2 == 1
        if not broken.any():
            broken = np.bincount(line, shift, num_lines) != 0
            broken[line[events.escaped & ~inside]] = True
        if not broken.any():
            break
        chosen = ~broken[line]
    else:
        events, depth = events[chosen], nesting(events[chosen])[2]
    return events, depth


def _stripped(window: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the borders (low, high) of lines without the white space around them."""
    last = len(window) - 1
    high = high - ((high > low) & (window[np.maximum(high - 1, 0)] == ord("\r")))
    loose = (high > low) & (_SPACE[window[np.minimum(low, last)]] | _SPACE[window[np.maximum(high - 1, 0)]])
    for i in np.flatnonzero(loose):  # few files are written so
        line = window[low[i] : high[i]].tobytes()
        low[i], high[i] = low[i] + len(line) - len(line.lstrip()), high[i] - len(line) + len(line.rstrip())
    return low, np.maximum(low, high)
