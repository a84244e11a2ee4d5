"""Marks inside a record's words, which show where a template puts these words.

Marks change nothing of what a template does with the words. They stand inside the white space and the tags around the words,
because a template strips the white space and looks for the tags that it names: `<think>` and `</think>` stay as they are, and the
words before, between and after them are found piece by piece.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data.records.turns import MARKS
from model.files.untrusted import Json

OPEN, CLOSE = MARKS
CONTENT, REASONING, CALL, TOOLS = "content", "reasoning", "tool_calls", "tools"
_MARK = re.compile(f"{OPEN}(\\d*){CLOSE}")
_TAG = re.compile(r"</?[A-Za-z_]\w*>|\[/?[A-Z_]+\]|(?<=['\"])/\w+(?=['\"])")


def tags_of(source: str, control: re.Pattern[str]) -> re.Pattern[str]:
    """Return a pattern for the tags that the template `source` names, without control tokens: `<think>`, `[THINK]`, `/no_think`."""
    found = {tag for tag in _TAG.findall(source) if not control.fullmatch(tag)}
    return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))) or "(?!)")


@dataclass(frozen=True)
class MarkedPiece:
    """Words between two marks; the k-th piece of a conversation stands between the marks 2k and 2k + 1."""

    turn: int  # index of the turn; -1 for the tools
    kind: str  # CONTENT | REASONING | CALL | TOOLS
    value: str  # the string that holds the words: value[start:stop] has to stand between the marks, unless it is written as JSON
    start: int
    stop: int

    @property
    def text(self) -> str:
        return self.value[self.start : self.stop]

    @property
    def head(self) -> str:
        return self.value[: self.start]

    @property
    def tail(self) -> str:
        return self.value[self.stop :]


@dataclass
class Marker:
    """Writer of marks into the strings of one conversation; `pieces` records what each pair of marks encloses."""

    written: re.Pattern[str]  # control tokens that a person may not write, or, as group "ours", wrapped placeholders
    tags: re.Pattern[str]
    pieces: list[MarkedPiece] = field(default_factory=list)

    def message(self, turn: int, message: Mapping[str, object]) -> Json:
        """Return the message with marks in its content, its reasoning and its calls."""
        marked = dict(message)
        for key, value in message.items():
            if key == "content" and isinstance(value, str):
                marked[key] = self._text(turn, CONTENT, value, anchor=message["role"] != "assistant")
            elif key == "tool_calls":
                marked[key] = self.tree(turn, CALL, value)
            elif key not in ("role", "content", "name", "tool_call_id") and isinstance(value, str):
                marked[key] = self._text(turn, REASONING, value, anchor=False)
        return marked

    def tree(self, turn: int, kind: str, value: object, key: str = "") -> Any:
        """Return a JSON value with marks in its strings: of tools in the names only, of calls in all strings but types and ids."""
        if isinstance(value, dict):
            return {self._guard(k): self.tree(turn, kind, v, k) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.tree(turn, kind, item, key) for item in value]
        if not isinstance(value, str):
            return value
        # The name of a tool proves enough: a template may leave the rest out. Types and ids get no marks: it looks into them.
        if key in ("type", "id") or (kind == TOOLS and key != "name"):
            return self._guard(value)
        return self._between(turn, kind, value, 0, len(value))

    def _text(self, turn: int, kind: str, value: str, *, anchor: bool) -> str:
        """Return the text with marks around each stretch of words between tags; `anchor` marks the end of a text without words."""
        edges = [0, *(edge for tag in self.tags.finditer(value) for edge in tag.span()), len(value)]
        parts, at = [], 0
        for low, high in zip(edges[::2], edges[1::2]):
            if value[low:high].strip():
                parts += [value[at:low], self._between(turn, kind, value, low, high)]
                at = high
        if not parts and anchor:
            return value + self._pair(MarkedPiece(turn, kind, "", 0, 0), "")
        return "".join([*parts, value[at:]])

    def _between(self, turn: int, kind: str, value: str, low: int, high: int) -> str:
        """Return value[low:high] with marks around its words, inside the leading and trailing white space."""
        start = high - len(value[low:high].lstrip())
        stop = max(start, low + len(value[low:high].rstrip()))
        piece = MarkedPiece(turn, kind, value, start, stop)
        return value[low:start] + self._pair(piece, self._guard(piece.text)) + value[stop:high]

    def _pair(self, piece: MarkedPiece, text: str) -> str:
        k = len(self.pieces)
        self.pieces.append(piece)
        return f"{OPEN}{2 * k}{CLOSE}{text}{OPEN}{2 * k + 1}{CLOSE}"

    def _guard(self, text: str) -> str:
        """Return the text with an empty mark behind the first character of each control token that a person wrote."""
        return self.written.sub(lambda m: m[0] if m["ours"] is not None else f"{m[0][0]}{OPEN}{CLOSE}{m[0][1:]}", text)


@dataclass(frozen=True)
class Read:
    """Rendering without its marks, and the places where the marks stood."""

    text: str
    at: dict[int, int]  # the first place of each mark
    guards: list[int]  # places of the empty marks
    repeated: frozenset[int]  # marks that the rendering holds more than once


def read_marks(marked: str) -> Read:
    """Remove the marks from a rendering; return the text and the places of the marks."""
    parts = _MARK.split(marked)
    at: dict[int, int] = {}
    guards, repeated, place = [], set(), 0
    for literal, mark in zip(parts[::2], [*parts[1::2], None]):
        place += len(literal)
        if mark == "":
            guards.append(place)
        elif mark is not None and int(mark) in at:
            repeated.add(int(mark))
        elif mark is not None:
            at[int(mark)] = place
    return Read("".join(parts[::2]), at, guards, frozenset(repeated))
