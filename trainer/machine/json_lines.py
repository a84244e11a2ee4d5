"""Files of a run folder with one JSON object per line, appended at the end: written, read back, and cut to the step of a resume."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from model.files.untrusted import Json
from trainer.machine.atomic_files import replace_text


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


def rows_up_to(path: Path, step: int) -> list[Json]:
    """Drop the lines of steps beyond `step`: those steps run again, and their lines would be there twice. Return the others."""
    rows = read_valid_lines(path, {"step": int}) if step else []
    kept = [row for row in rows if row["step"] <= step]
    if path.exists():
        replace_text(path, lines_of(kept))
    return kept


def append_lines(path: Path, rows: Iterable[object]) -> None:
    """Append a line for each row."""
    with path.open("a") as out:
        out.write(lines_of(rows))


def lines_of(rows: Iterable[object]) -> str:
    """Return rows as text, one line each, in ASCII: nothing in them can break a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


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
