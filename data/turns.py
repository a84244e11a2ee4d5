"""The turns of a record, in either spelling: LLaVA's {"from", "value"} and OpenAI's {"role", "content"} with its parts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from data.fields import FieldError, kind_of, path_of
from data.limits import MAX_TURNS
from data.media_refs import MediaRef
from data.placeholders import kinds_in, leading
from model.batch import PLACEHOLDERS

MARKS = ("\ue100", "\ue101")
"""Private-use characters with which `data.render` marks contents; a record may not hold them."""

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_KEYS = {"conversations": ("from", "value"), "messages": ("role", "content")}
_PARTS = {
    **dict.fromkeys(("image", "image_url"), "image"),
    **dict.fromkeys(("video", "video_url"), "video"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
}
_BYTES = ("data", "base64", "bytes")


@dataclass(frozen=True)
class Turn:
    role: str  # system | user | assistant | tool
    content: str  # with its placeholders, as in "<image>\nWhat is this?"
    learn: bool = True  # of an assistant's turn: whether it is supervised; it is read either way
    extra: Mapping[str, Any] = field(default_factory=dict)  # what the template gets beside role and content: tool_calls ...


def read_turns(raw: dict[str, Any]) -> tuple[tuple[Turn, ...], list[MediaRef]]:
    """Turns as written, and media whose paths stand inside content parts. Raises `FieldError`."""
    found = [key for key in _KEYS if raw.get(key) is not None]
    if len(found) != 1:
        state = "both conversations and messages are there" if found else "missing"
        raise FieldError("conversations", f'{state}; a record has "conversations" or "messages"')
    field, (role_key, content_key) = found[0], _KEYS[found[0]]
    if not isinstance(raw[field], list) or not raw[field]:
        raise FieldError(field, f"is {'empty' if raw[field] == [] else kind_of(raw[field])}, not a list of turns")
    if len(raw[field]) > MAX_TURNS:
        raise FieldError(field, f"has {len(raw[field])} turns; at most {MAX_TURNS} are read: make several records of it")
    turns: list[Turn] = []
    inline: list[MediaRef] = []
    for i, value in enumerate(raw[field]):
        turns.append(_turn(value, f"{field}[{i}]", role_key, content_key, inline))
    return tuple(turns), inline


def _turn(value: Any, field: str, role_key: str, content_key: str, inline: list[MediaRef]) -> Turn:
    if not isinstance(value, dict):
        raise FieldError(field, f"is {kind_of(value)}, not an object")
    said_by = value.get(role_key)
    if said_by is None:
        raise FieldError(f"{field}.{role_key}", f"missing; a turn has {role_key!r} and {content_key!r}")
    if not isinstance(said_by, str) or said_by not in _ROLES:
        raise FieldError(f"{field}.{role_key}", f"{said_by!r} is no role; allowed: {', '.join(_ROLES)}")
    role = _ROLES[said_by]
    content = value.get(content_key)
    if content_key not in value:
        raise FieldError(f"{field}.{content_key}", f"missing; a turn has {role_key!r} and {content_key!r}")
    if isinstance(content, list) and content_key == "content":
        # Lines of their own: the same sample then has the same text in both spellings.
        content = "\n".join(_part(part, f"{field}.{content_key}[{j}]", inline) for j, part in enumerate(content))
    if not isinstance(content, str):
        raise FieldError(f"{field}.{content_key}", f"is {kind_of(content)}, not a string")
    _check_text(content, f"{field}.{content_key}")
    if role == "assistant" and not content.strip():
        raise FieldError(f"{field}.{content_key}", "is an empty answer")
    if role == "assistant" and (kinds := kinds_in(content)):
        raise FieldError(f"{field}.{content_key}", f"holds {PLACEHOLDERS[kinds[0]]}; media cannot stand in an answer")
    return Turn(role, content)


def _part(part: Any, field: str, inline: list[MediaRef]) -> str:
    """Text of one OpenAI content part; a medium's path, if it stands here, goes to `inline`."""
    name = part.get("type") if isinstance(part, dict) else None
    if name == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if not isinstance(name, str) or name not in _PARTS:
        raise FieldError(field, f"is no text and none of the parts {', '.join(_PARTS)} (type {name!r})")
    holder = part.get(name)
    boxes = [holder, part] if isinstance(holder, dict) else [part]
    if key := next((key for box in boxes for key in _BYTES if box.get(key) is not None), None):
        raise FieldError(field, f"holds the bytes of a medium ({key}); only paths of local files are read")
    places = [box.get(key) for box in boxes for key in ("path", "url")]
    path = next((v for v in [*([] if isinstance(holder, dict) else [holder]), *places] if v is not None), None)
    if path is not None:
        inline.append(MediaRef(_PARTS[name], path_of(path, field)))
    return PLACEHOLDERS[_PARTS[name]]


def _check_text(text: str, field: str) -> None:
    if mark := next((m for m in MARKS if m in text), None):
        raise FieldError(field, f"holds the private-use character U+{ord(mark):04X}, which the trainer reserves")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise FieldError(field, "holds half of a surrogate pair, which is no character")


def leading_answer(turns: tuple[Turn, ...]) -> int | None:
    """Place of an assistant's turn that nobody asked for; LLaVA's preprocessing drops it."""
    at = 1 if turns[0].role == "system" else 0
    return at if len(turns) > at and turns[at].role == "assistant" else None


def place_unplaced(turns: tuple[Turn, ...], media: dict[str, list[MediaRef]]) -> tuple[Turn, ...]:
    """Puts the placeholders of a record that has none before its first user's turn: images, then videos, then clips."""
    if not any(media.values()) or any(kinds_in(turn.content) for turn in turns):
        return turns
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        return turns
    content = leading(ref.kind for kind in PLACEHOLDERS for ref in media[kind]) + turns[first].content
    return turns[:first] + (replace(turns[first], content=content),) + turns[first + 1 :]


def in_reading_order(turns: tuple[Turn, ...], media: dict[str, list[MediaRef]]) -> tuple[MediaRef, ...]:
    """All media as their placeholders stand: the k-th `<image>` is the k-th image, and so on. Raises `FieldError`."""
    written = [kind for turn in turns for kind in kinds_in(turn.content)]
    counts = Counter(written)
    for kind, refs in media.items():
        if counts[kind] != len(refs):
            raise FieldError(kind, f"{counts[kind]} {PLACEHOLDERS[kind]} in the turns, {len(refs)} {kind} files in the record")
    left = {kind: iter(refs) for kind, refs in media.items()}
    return tuple(next(left[kind]) for kind in written)


def check_order(turns: tuple[Turn, ...], needs_answer: bool) -> None:
    """Raises `FieldError` unless user and assistant take turns after an optional system turn, and an answer comes last."""
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    for i, turn in enumerate(spoken):
        if turn.role != (expected := ("user", "assistant")[i % 2]):
            raise FieldError("conversations", f"turn {i + 1} is the {turn.role}'s, the {expected}'s is due")
    if not spoken or (needs_answer and spoken[-1].role != "assistant"):
        state = "the last turn is the user's" if spoken else "no turn is left that anybody asked for"
        raise FieldError("conversations", f"{state}; an answer must come last")
