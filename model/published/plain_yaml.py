"""Plain YAML, as PyYAML writes settings: nested keys with numbers, words and lists. Anything else is marked, never guessed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_KEY = re.compile(r"(?P<indent> *)(?P<key>[\w.-]+):(?: +(?P<value>.*))?$")
_ITEM = re.compile(r"(?P<indent> *)- (?P<value>[^:]*)$")
_NUMBER = re.compile(r"[-+]?\d+$")
_FRACTION = re.compile(r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$")
_WORDS = {"null": None, "~": None, "": None, "true": True, "false": False}
_QUOTED = re.compile(r"'([^']*)'$|\"([^\"\\]*)\"$")
_SPECIAL = ("&", "*", "!", "|", ">", "{", "[", "'", '"', "%", "@", "`")


@dataclass(frozen=True)
class Unread:
    """A value of another form: text of several lines, an anchor, a map in braces ..."""

    line: int


@dataclass
class _Line:
    number: int
    indent: int
    key: str  # "" for an item of a list
    value: str
    plain: bool  # False: the value goes on in lines that are no keys


def read_plain_yaml(text: str) -> dict[str, Any]:
    """Return the keys of a YAML text with their values; `Unread` where a value has another form than the plain ones."""
    lines = list(_lines(text))
    found, _ = _block(lines, 0, -1)
    return found if isinstance(found, dict) else {}


def _lines(text: str) -> Iterator[_Line]:
    """Yield keys and items. A line that is neither, or is indented more than a value before it, goes on with that value."""
    last: _Line | None = None
    for number, whole in enumerate(text.splitlines(), 1):
        content = re.sub(r"(^|\s)#.*$", "", whole).rstrip()
        if not content or content == "---":
            continue
        goes_on = last is not None and last.value and len(content) - len(content.lstrip(" ")) > last.indent
        if (match := _KEY.match(content) or _ITEM.match(content)) and not goes_on:
            parts = match.groupdict()
            if last is not None:
                yield last
            last = _Line(number, len(parts["indent"]), parts.get("key") or "", parts["value"] or "", True)
        elif last is not None:
            last.plain = False
    if last is not None:
        yield last


def _block(lines: list[_Line], start: int, above: int) -> tuple[Any, int]:
    """Read the lines from `start` on that are indented more than `above`, or that are the items of a key there."""
    found: dict[str, Any] = {}
    items: list[Any] = []
    i = start
    while i < len(lines) and (lines[i].indent > above or (not lines[i].key and lines[i].indent == above)):
        line = lines[i]
        i += 1
        if not line.key:
            items.append(_scalar(line))
        elif line.value or not line.plain:
            found[line.key] = _scalar(line)
        else:
            found[line.key], i = _block(lines, i, line.indent)
    return (items or found or None) if i > start else None, i


def _scalar(line: _Line) -> Any:
    value = line.value
    if not line.plain:
        return Unread(line.number)
    if match := _QUOTED.match(value):
        return match[1] if match[1] is not None else match[2]
    if value.startswith("[") and value.endswith("]"):
        parts = [part.strip() for part in value[1:-1].split(",") if part.strip()]
        return [_scalar(_Line(line.number, 0, "", part, True)) for part in parts]
    if value.startswith(_SPECIAL):
        return Unread(line.number)
    if _NUMBER.match(value):
        return int(value)
    return float(value) if _FRACTION.match(value) else _WORDS.get(value.lower(), value)
