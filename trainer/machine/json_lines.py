"""Files of a run folder with one JSON object per line, written at their end: what is sound of them, and what is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_lines(path: Path, fields: Mapping[str, type]) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines that are objects with `fields`; and of each other one, for people, where it stands and why it is none.

    What a crash or a power cut leaves, half a line at the end or zeros, is in neither: nothing that was relied on stood there. A
    file that is not there has no lines.
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


def read_sound(path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """The same of a file that nothing depends on: people are told what is left out."""
    rows, problems = read_lines(path, fields)
    for problem in problems:
        print(f"left out: {problem}", flush=True)
    return rows


def _row(line: bytes, fields: Mapping[str, type]) -> dict[str, Any]:
    """ValueError where the line is not what was written."""
    try:
        row = json.loads(line.decode())
    except ValueError as error:
        raise ValueError(f"is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError("is no object")
    if wrong := [name for name, kind in fields.items() if type(row.get(name)) is not kind]:
        raise ValueError(f"{wrong[0]} = {row.get(wrong[0])!r} is no {fields[wrong[0]].__name__}")
    return row
