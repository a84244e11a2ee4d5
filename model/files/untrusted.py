"""Small files of strangers: regular ones of bounded size, and JSON of bounded depth. What is more is refused, never read.

The same stands in data.limits: `data` takes nothing of `model` but the batch.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_BYTES = 1 << 26
"""Of a JSON file that describes something: the longest index of a model's shards has a few million bytes."""
MAX_JSON_DEPTH = 64


def open_regular(path: Path) -> BinaryIO:
    """The file, opened for reading. OSError for what is no regular file: a pipe or a device would be waited for without end."""
    # Asked of what was opened, not of the path: that may be exchanged in between.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return os.fdopen(descriptor, "rb")


def load_json(path: Path) -> Any:
    """The value in a JSON file. OSError when it cannot be read, ValueError when it is no JSON, or larger or deeper than allowed."""
    with open_regular(path) as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"it has more than {MAX_JSON_BYTES} bytes")
    return parse_json(data)


def parse_json(data: bytes) -> Any:
    """The value that `data` spells. ValueError when it is no JSON, or deeper than MAX_JSON_DEPTH brackets."""
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH}") from None
    if data.count(b"[") + data.count(b"{") > MAX_JSON_DEPTH and is_deeper(value, MAX_JSON_DEPTH):
        raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH}")
    return value


def is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects stand more than `depth` deep in each other."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(depth):
        children = (item for held in level for item in (held.values() if isinstance(held, dict) else held))
        level = [item for item in children if isinstance(item, dict | list)]
        if not level:
            return False
    return True


SHOWN, LISTED = 200, 8
"""Characters of a value in a message, and values of a list."""


def shown(value: Any) -> str:
    """A value as messages show it: they stay readable whatever it holds."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def listed(values: Sequence[Any]) -> str:
    """A few of the values as messages show them, and how many more there are."""
    more = f" and {len(values) - LISTED} more" if len(values) > LISTED else ""
    return ", ".join(map(shown, values[:LISTED])) + more
