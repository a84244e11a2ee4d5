"""Size and depth limits for small untrusted files: regular files of bounded size, and JSON of bounded depth.

A larger file is not read, a deeper value is refused.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

Json = dict[str, Any]
"""A JSON object whose keys others choose: config.json, a record, a row of a file. Objects with fixed keys are TypedDicts."""
MAX_JSON_BYTES = 1 << 26
"""Upper limit of a descriptive JSON file: the longest weight indexes have a few million bytes."""
MAX_JSON_DEPTH = 64


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading. Raises `OSError` for anything else: reading a pipe or a device could block forever."""
    # The open descriptor is checked, not the path: the file behind a path may be replaced in between.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{str(path)!r} is not a regular file")
    return os.fdopen(descriptor, "rb")


def load_json(path: Path) -> Any:
    """Read the value of a JSON file.

    Raises `OSError` when the file cannot be read, `ValueError` when it is not JSON, too large or too deep.
    """
    with open_regular(path) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"it has more than {MAX_JSON_BYTES} bytes")
    return parse_json(data)


def parse_json(data: bytes) -> Any:
    """Parse JSON bytes. Raises `ValueError` when `data` is not JSON, or nested deeper than MAX_JSON_DEPTH brackets."""
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH}") from None
    if data.count(b"[") + data.count(b"{") > MAX_JSON_DEPTH and is_deeper(value, MAX_JSON_DEPTH):
        raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH}")
    return value


def is_deeper(value: object, depth: int) -> bool:
    """Tell whether lists and objects in `value` are nested more than `depth` deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        children = (item for held in level for item in (held.values() if isinstance(held, dict) else held))
        level = [item for item in children if isinstance(item, dict | list)]
        if not level:
            return False
    return True


SHOWN, LISTED = 200, 8
"""Most characters of a value in a message, and most values of a list in a message."""


def shown(value: object) -> str:
    """Return a value as text for a message, shortened so that the message stays readable."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def listed(values: Sequence[object]) -> str:
    """Return the first values as text for a message, and how many more there are."""
    more = f" and {len(values) - LISTED} more" if len(values) > LISTED else ""
    return ", ".join(map(shown, values[:LISTED])) + more
