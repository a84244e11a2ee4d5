"""Files of a run folder with one JSON object per line, appended at the end: reading the valid lines and reporting the others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from model.files.untrusted import Json


def read_lines(path: Path, fields: Mapping[str, type]) -> tuple[list[Json], list[str]]:
    """Return the lines that are objects with `fields`, and a message for each invalid line: where it is and what is wrong.

    What a crash or a power cut leaves, half a line at the end or zero bytes, is in neither list: nothing relied on it. A missing
    file has no lines.
    """
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    rows, problems = [], []
    for number, line in enumerate(lines, 1):
        if b"\0" in line:
            continue
        try:
            rows.append(_row(line, fields))
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}:{number}: {error}")
    return rows, problems


def read_valid_lines(path: Path, fields: Mapping[str, type]) -> list[Json]:
    """Return the valid lines of a file that nothing depends on; print a message for each invalid line."""
    rows, problems = read_lines(path, fields)
    for problem in problems:
        print(f"left out: {problem}", flush=True)
    return rows


def _row(line: bytes, fields: Mapping[str, type]) -> Json:
    """Parse a line. Raises ValueError where it is not an object with `fields`."""
    try:
        row = json.loads(line.decode())
    except ValueError as error:
        raise ValueError(f"is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError("is no object")
    if wrong := [name for name, kind in fields.items() if type(row.get(name)) is not kind]:
        raise ValueError(f"{wrong[0]} = {row.get(wrong[0])!r} is no {fields[wrong[0]].__name__}")
    return row
