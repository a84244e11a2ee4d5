"""Reading of one value of a record: its kind, whether it can be a path, the error that names its field, and safe printing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

_REMOTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://|data:")
_INLINE = re.compile(r"data:[\w.+/-]*(?:;[\w.+=-]+)*;base64,")
"""Start of a data URI whose bytes are written in base64 (RFC 2397)."""
INLINE = "data:;base64,"
"""Shortest such start: the kind of a medium is told by its bytes."""
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}


class FieldError(Exception):
    """A field and what is wrong with it, before the record's place is known."""


def kind_of(value: object) -> str:
    """Return the name that JSON has for the value's type, with its article."""
    return _KINDS.get(type(value), "a null")


def is_absent(value: object) -> bool:
    """Return whether a value says nothing: null, or an empty string, list or object."""
    return value is None or value in ("", [], {})


def strings_in(value: object) -> Iterator[str]:
    """Yield all strings of a JSON value, including the keys of its objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from strings_in(item)


def inline_bytes(path: str) -> str | None:
    """Return the base64 text of a data URI, which holds a medium itself; None for the path of a file."""
    match = _INLINE.match(path)
    return path[match.end() :] if match else None


def inline_path(content: object, field: str) -> str:
    """Return the data URI of a medium's `content`, a string of base64 or a data URI already. Raises `FieldError`."""
    if not isinstance(content, str):
        raise FieldError(field, f"is {kind_of(content)}, not a string of base64")
    return local_path(content if content.startswith("data:") else INLINE + content, field)


def local_path(value: object, field: str) -> str:
    """Return the value if it is a path that may name a local file, or a data URI of base64.

    Raises `FieldError` for anything else, remote addresses included.
    """
    if not isinstance(value, str) or not value:
        raise FieldError(field, "is an empty path" if value == "" else f"is {kind_of(value)}, not a path")
    if inline_bytes(value) is not None:
        return value
    if _REMOTE.match(value):
        raise FieldError(field, f"{value[:60]!r} is a URL; only paths of local files are read{_instead(value)}")
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        raise FieldError(field, f"{value[:60]!r} holds half of a surrogate pair, which no file's name can") from None
    return value


def _instead(url: str) -> str:
    """Return the part of a message that says what to write in place of a URL."""
    if url.startswith("file://"):
        return ": write the path without file://"
    if url.startswith("data:"):
        return ": a data URI holds base64 and says so, as data:image/png;base64,..."
    if url.startswith(("http://", "https://")):
        return ": download it into media_root (curl -LO URL) and name the file"
    return ": copy it into media_root and name the file"


SHOWN = 200
"""Most characters of a value that a message shows."""
MAX_NAME = 100
"""Most characters of a source's name, which is part of metric keys and file names."""
LINE, LINES = 2_000, 200
"""Most characters of a message's line, and most lines: nobody reads more, whatever the message was made of."""


def shorten(text: str, most: int = SHOWN) -> str:
    """Cut the text for a message: a text of more than `most` characters becomes its beginning and its length."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def bound_message(text: str) -> str:
    """Cut a whole message to its bounds. Every error passes through here before it is printed or written down."""
    lines = text.split("\n")
    more = [f"... and {len(lines) - LINES} more lines"] if len(lines) > LINES else []
    return "\n".join([*(shorten(line, LINE) for line in lines[:LINES]), *more])


def printable(text: str, keep: str = "") -> str:
    """Replace the characters that a terminal could obey by escapes, except those of `keep`: records may hold anything."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def record_line(where: str, id: str, field: str, reason: str) -> str:
    """Return one line that says what is wrong with a record: safe to print, and short whatever the record holds."""
    return printable(f"{shorten(where, LINE // 2)} {shorten(id)}: {shorten(field)}: {shorten(reason, LINE // 2)}")
