"""One line of a source becomes a `Record`, or an error that says where and why. Nothing is repaired in silence.

Two spellings are read: LLaVA's `conversations` of {"from", "value"} and OpenAI's `messages` of {"role", "content"}.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from data.config import DataError
from model.batch import IGNORE_INDEX, PLACEHOLDERS, READ_BY

MARKS = ("\ue100", "\ue101")
"""Private-use characters with which `data.render` marks contents; a record may not hold them."""

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TURN_KEYS = {"conversations": ("from", "value"), "messages": ("role", "content")}
_MEDIA_KEYS = {"image": ("image", "images")}
_UNSUPPORTED_KEYS = ("video", "videos", "audio", "audios")
_UNSUPPORTED_TOKENS = ("<video>", "<audio>")
_MEDIA_PARTS = {"image": "image", "image_url": "image"}
_REMOTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://|data:")


@dataclass(frozen=True)
class Turn:
    role: str  # system | user | assistant
    content: str  # with its placeholders, as in "<image>\nWhat is this?"


@dataclass(frozen=True)
class MediaRef:
    """One medium that a record names."""

    kind: str  # image | video | audio
    path: str
    set: str = ""  # key of media_root that its folder stands under (VITA); "": the one of its kind
    span: tuple[float, float] | None = None  # seconds of a video that are watched; None: all of it
    label: int = IGNORE_INDEX  # user state after a clip

    @property
    def modality(self) -> str:
        """Whose encoder reads it."""
        return READ_BY[self.kind]


@dataclass(frozen=True)
class Record:
    id: str
    turns: tuple[Turn, ...]
    media: tuple[MediaRef, ...]  # in reading order of the placeholders
    where: str  # "mix.json:12"
    num_dropped_turns: int = 0
    negative_turn: int | None = None  # turn that replies to sound that was not meant for the model (VITA `inserted_id`)
    interrupted: bool = False  # the last answer was cut off: its end token is not learned (VITA `end_tag` false)


class RecordError(DataError):
    """One record breaks the rules."""

    def __init__(self, where: str, id: str, field: str, reason: str) -> None:
        super().__init__(f"{where} {id}: {field}: {reason}")
        self.where, self.id, self.field, self.reason = where, id, field, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.where, self.id, self.field, self.reason)  # workers send it to their parent


class _Problem(Exception):
    """A field and what is wrong with it, before the record's place is known."""


def parse(raw: Any, where: str, *, needs_answer: bool = True) -> Record:
    """The record that `raw`, one decoded JSON value, stands for.

    Guaranteed: an optional system turn, then user and assistant in turn; no blank answer; as many placeholders as media,
    none of them in an answer. A record without an id is called by its line. `needs_answer=False` lets the last turn be
    the user's. Raises `RecordError`.
    """
    name = where.rpartition(":")[2]
    try:
        if not isinstance(raw, dict):
            raise _Problem("record", f"is a {_kind(raw)}, not an object")
        name = _id(raw, name)
        turns, inline = _turns(raw)
        media = _media(raw, inline)
        kept = _without_leading_answer(turns)
        kept = _place_unplaced(kept, media)
        _check_order(kept, needs_answer)
        _check_placeholders(kept, media)
    except _Problem as problem:
        raise RecordError(where, name, *problem.args) from None
    return Record(name, kept, media, where, len(turns) - len(kept))


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _id(raw: dict[str, Any], default: str) -> str:
    value = raw.get("id")
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _Problem("id", f"is a {_kind(value)}, not a string or a whole number")
    return str(value)


def _turns(raw: dict[str, Any]) -> tuple[tuple[Turn, ...], list[MediaRef]]:
    """Turns as written, and media whose paths stand inside content parts."""
    found = [key for key in _TURN_KEYS if raw.get(key) is not None]
    if len(found) != 1:
        state = "both conversations and messages are there" if found else "missing"
        raise _Problem("conversations", f'{state}; a record has "conversations" or "messages"')
    field, (role_key, content_key) = found[0], _TURN_KEYS[found[0]]
    if not isinstance(raw[field], list) or not raw[field]:
        raise _Problem(field, f"is {'empty' if raw[field] == [] else 'a ' + _kind(raw[field])}, not a list of turns")
    turns: list[Turn] = []
    inline: list[MediaRef] = []
    for i, value in enumerate(raw[field]):
        turns.append(_turn(value, f"{field}[{i}]", role_key, content_key, inline))
    return tuple(turns), inline


def _turn(value: Any, field: str, role_key: str, content_key: str, inline: list[MediaRef]) -> Turn:
    if not isinstance(value, dict):
        raise _Problem(field, f"is a {_kind(value)}, not an object")
    said_by = value.get(role_key)
    if not isinstance(said_by, str) or said_by not in _ROLES:
        raise _Problem(f"{field}.{role_key}", f"{said_by!r} is no role; allowed: {', '.join(_ROLES)}")
    role = _ROLES[said_by]
    content = value.get(content_key)
    if isinstance(content, list) and content_key == "content":
        # Lines of their own: the same sample then has the same text in both spellings.
        content = "\n".join(_part(part, f"{field}.{content_key}[{j}]", inline) for j, part in enumerate(content))
    if not isinstance(content, str):
        raise _Problem(f"{field}.{content_key}", f"is a {_kind(content)}, not a string")
    _check_text(content, f"{field}.{content_key}")
    if role == "assistant" and not content.strip():
        raise _Problem(f"{field}.{content_key}", "is an empty answer")
    if role == "assistant" and (token := next((p for p in PLACEHOLDERS.values() if p in content), None)):
        raise _Problem(f"{field}.{content_key}", f"holds {token}; media cannot stand in an answer")
    return Turn(role, content)


def _part(part: Any, field: str, inline: list[MediaRef]) -> str:
    """Text of one OpenAI content part; a medium's path, if it stands here, goes to `inline`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if not isinstance(kind, str) or kind not in _MEDIA_PARTS:
        raise _Problem(field, f"is no text, image or image_url part (type {kind!r})" + _unsupported_note(kind))
    modality = _MEDIA_PARTS[kind]
    holder = part.get(kind)
    places = [*(holder.get(k) for k in ("path", "url")), None] if isinstance(holder, dict) else [holder]
    path = next((v for v in [*places, part.get("path"), part.get("url")] if v is not None), None)
    if path is not None:
        inline.append(MediaRef(modality, _path(path, field)))
    return PLACEHOLDERS[modality]


def _unsupported_note(kind: Any) -> str:
    return "; video and audio are not supported yet" if isinstance(kind, str) and ("video" in kind or "audio" in kind) else ""


def _check_text(text: str, field: str) -> None:
    if mark := next((m for m in MARKS if m in text), None):
        raise _Problem(field, f"holds the private-use character U+{ord(mark):04X}, which the trainer reserves")
    if token := next((t for t in _UNSUPPORTED_TOKENS if t in text), None):
        raise _Problem(field, f"holds {token}; {token[1:-1]} is not supported yet")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise _Problem(field, "holds half of a surrogate pair, which is no character")


def _media(raw: dict[str, Any], inline: list[MediaRef]) -> tuple[MediaRef, ...]:
    """Media by the record's own keys or by its content parts, never by both: their order would be a guess."""
    if key := next((k for k in _UNSUPPORTED_KEYS if raw.get(k) is not None), None):
        raise _Problem(key, f"{key} is not supported yet")
    named: list[MediaRef] = []
    for modality, keys in _MEDIA_KEYS.items():
        found = [key for key in keys if raw.get(key) is not None]
        if len(found) > 1:
            raise _Problem(found[0], f"both {found[0]!r} and {found[1]!r} are there; keep one")
        for key in found:
            values = raw[key] if isinstance(raw[key], list) else [raw[key]]
            many = isinstance(raw[key], list)
            named += [MediaRef(modality, _path(v, f"{key}[{i}]" if many else key)) for i, v in enumerate(values)]
    if named and inline:
        raise _Problem(named[0].kind, "media are named both by the record and by its content parts; keep one")
    return tuple(named or inline)


def _path(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise _Problem(field, f"is {'an empty' if value == '' else 'a ' + _kind(value) + ', not a'} path")
    if _REMOTE.match(value):
        raise _Problem(field, f"{value[:60]!r} is a URL; only paths of local files are read")
    return value


def _without_leading_answer(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Drops an assistant's turn that nobody asked for, as LLaVA's preprocessing does."""
    at = 1 if turns[0].role == "system" else 0
    return turns[:at] + turns[at + 1 :] if len(turns) > at and turns[at].role == "assistant" else turns


def _place_unplaced(turns: tuple[Turn, ...], media: tuple[MediaRef, ...]) -> tuple[Turn, ...]:
    """Puts the placeholders of a record that has none before its first user's turn."""
    if not media or any(p in turn.content for turn in turns for p in PLACEHOLDERS.values()):
        return turns
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        return turns
    content = "".join(PLACEHOLDERS[m.kind] + "\n" for m in media) + turns[first].content
    return turns[:first] + (replace(turns[first], content=content),) + turns[first + 1 :]


def _check_order(turns: tuple[Turn, ...], needs_answer: bool) -> None:
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    for i, turn in enumerate(spoken):
        if turn.role != (expected := ("user", "assistant")[i % 2]):
            raise _Problem("conversations", f"turn {i + 1} is the {turn.role}'s, the {expected}'s is due")
    if not spoken or (needs_answer and spoken[-1].role != "assistant"):
        state = "the last turn is the user's" if spoken else "no turn is left"
        raise _Problem("conversations", f"{state}; an answer must come last")


def _check_placeholders(turns: tuple[Turn, ...], media: tuple[MediaRef, ...]) -> None:
    for modality, token in PLACEHOLDERS.items():
        written = sum(turn.content.count(token) for turn in turns)
        given = sum(m.kind == modality for m in media)
        if written != given:
            raise _Problem(modality, f"{written} {token} in the turns, {given} {modality} files in the record")
