"""Limits on untrusted files: bytes of a record and of a medium, depth of JSON, regular files alone."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MAX_RECORD_BYTES = 1 << 24
"""Bytes of one record's JSON. Media stand in files of their own; a text of this size is longer than any context that is trained."""
MAX_RECORD_BRACKETS = 1 << 20
"""Brackets of one record's JSON: objects and lists take twenty times their bytes in memory."""
MAX_TURNS = 1 << 15
"""Turns of one record. A turn takes several tokens: so many turns fill a million tokens."""
MAX_MEDIA = 1 << 13
"""Media of one kind in one record: the frames of two hours, one a second. Each of them is a file to be opened."""
MAX_JSON_BYTES = 1 << 26
"""Bytes of a JSON file that describes something."""
MAX_JSON_DEPTH = 64
MAX_TOKENIZER_BYTES = 1 << 28
"""Bytes of each file of a tokenizer; the largest vocabularies take a tenth of it."""
MAX_MEMBER_BYTES = 1 << 31
"""Bytes of a medium inside an archive, which is read into memory as a whole."""


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading. Raises `OSError` for what is no regular file: a pipe or a device would be waited for without end."""
    # The open file is checked, not the path: a path may be exchanged in between.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{str(path)!r} is not a regular file")
    return os.fdopen(descriptor, "rb")


def load_json(path: Path) -> Any:
    """Load the value of a JSON file.

    Raises `OSError` if it cannot be read, `ValueError` if it is no JSON, or too large or too deep.
    """
    with open_regular(path) as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"it has more than {MAX_JSON_BYTES} bytes")
    return parse_json(text)


def parse_json(text: bytes) -> Any:
    """Parse the JSON in `text`. Raises `ValueError` when it is no JSON, or deeper than MAX_JSON_DEPTH brackets."""
    try:
        value = json.loads(text.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH}") from None
    if text.count(b"[") + text.count(b"{") > MAX_JSON_DEPTH:
        _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_JSON_DEPTH):
        children = (item for held in level for item in (held.values() if isinstance(held, dict) else held))
        level = [item for item in children if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH}")
