"""Turns of a record, in either spelling: LLaVA's {"from", "value"} and OpenAI's {"role", "content"} with its parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from data.records.content_parts import Parts
from data.records.fields import FieldError, kind_of, shorten, strings_in
from data.records.media_refs import MediaRef
from data.records.placeholders import kinds_in, leading_placeholders
from data.records.tool_calls import read_calls
from data.records.turn_keys import check_keys, for_template, is_learned
from model.files.untrusted import Json
from model.media_spec import PLACEHOLDERS

MAX_NAMED = 8
"""Keys that are named of a record without turns."""
MAX_TURNS = 1 << 15
"""Turns of one record. A turn takes several tokens: so many turns fill a million tokens."""
MARKS = ("\ue100", "\ue101")
"""Private-use characters with which `data.text.render` marks contents; a record may not hold them."""

_ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"},
    **dict.fromkeys(("tool", "tool_response", "observation", "function"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
_CALL_ROLES = ("function_call", "tool_call")
"""Roles of LLaMA-Factory and ms-swift whose text is the JSON of calls."""
_KEYS = {"conversations": ("from", "value"), "messages": ("role", "content")}
_OTHER_FORMATS = ("prompt", "completion", "instruction", "output", "chosen", "text", "segments")


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation."""

    role: str  # system | user | assistant | tool
    content: str  # with its placeholders, as in "<image>\nWhat is this?"
    learn: bool = True  # for an assistant's turn, whether it is supervised; it is read either way
    extra: Mapping[str, Any] = field(default_factory=dict)  # what the template gets beside role and content: tool_calls ...


def read_turns(raw: Json) -> tuple[tuple[Turn, ...], list[MediaRef]]:
    """Read the turns as written, and the media whose paths stand inside content parts. Raises `FieldError`."""
    found = [key for key in _KEYS if raw.get(key) is not None]
    if len(found) != 1:
        state = "both conversations and messages are there" if found else "missing"
        others = [key for key in _OTHER_FORMATS if raw.get(key) is not None] or [*raw][:MAX_NAMED]
        named = "" if found else ", ".join(repr(shorten(key)) for key in others)
        more = f"; it has {named}, which are not read as turns" if named else ""
        raise FieldError("conversations", f'{state}; a record has "conversations" or "messages"{more}')
    field, keys = found[0], _KEYS[found[0]]
    if not isinstance(raw[field], list) or not raw[field]:
        raise FieldError(field, f"is {'empty' if raw[field] == [] else kind_of(raw[field])}, not a list of turns")
    if len(raw[field]) > MAX_TURNS:
        raise FieldError(field, f"has {len(raw[field])} turns; at most {MAX_TURNS} are read: make several records of it")
    parts = Parts(raw)
    turns = tuple(_turn(value, f"{field}[{i}]", keys, parts) for i, value in enumerate(raw[field]))
    return turns, parts.media


def _turn(value: object, field: str, keys: tuple[str, str], parts: Parts) -> Turn:
    if not isinstance(value, dict):
        raise FieldError(field, f"is {kind_of(value)}, not an object")
    role_key, content_key = keys
    said_by = value.get(role_key)
    if said_by is None:
        raise FieldError(f"{field}.{role_key}", f"missing; a turn has {role_key!r} and {content_key!r}")
    if not isinstance(said_by, str) or said_by not in _ROLES:
        raise FieldError(f"{field}.{role_key}", f"{repr(said_by)[:60]} is no role; allowed: {', '.join(_ROLES)}")
    role = _ROLES[said_by]
    if len(value) == 2 and content_key in value and said_by not in _CALL_ROLES:  # most turns say nothing more
        return Turn(role, _content(value, role, field, keys, False, parts))
    learn, extra = is_learned(value, role, field), for_template(value, role, field)
    if said_by in _CALL_ROLES:
        if "tool_calls" in extra:
            raise FieldError(f"{field}.tool_calls", f"stands on a turn of {said_by!r}, whose text is its calls; keep one")
        content, extra["tool_calls"] = "", read_calls(value.get(content_key), f"{field}.{content_key}")
    else:
        content = _content(value, role, field, keys, "tool_calls" in extra, parts)
    check_keys(value, keys, field)
    for key, found in extra.items():
        check_words(found, f"{field}.{key}")
    return Turn(role, content, learn, extra)


def _content(turn: Json, role: str, field: str, keys: tuple[str, str], has_calls: bool, parts: Parts) -> str:
    key = keys[1]
    content = turn.get(key)
    if content is None and has_calls:
        return ""
    field = f"{field}.{key}"
    if key not in turn:
        raise FieldError(field, f"missing; a turn has {keys[0]!r} and {key!r}")
    if isinstance(content, list) and key == "content":
        content = parts.text(content, field)
    if not isinstance(content, str):
        raise FieldError(field, f"is {kind_of(content)}, not a string")
    check_text(content, field)
    if role == "assistant" and not content.strip() and not has_calls:
        raise FieldError(field, "is an empty answer")
    if role == "assistant" and (kinds := kinds_in(content)):
        raise FieldError(field, f"holds {PLACEHOLDERS[kinds[0]]}; media cannot stand in an answer")
    return content


def check_words(value: object, field: str) -> None:
    """Raise `FieldError` for a string inside a JSON value that a template would write and that a content may not hold."""
    for text in strings_in(value):
        check_text(text, field)
        if kinds := kinds_in(text):
            raise FieldError(field, f"holds {PLACEHOLDERS[kinds[0]]}; media stand in the contents of turns")


def check_text(text: str, field: str) -> None:
    """Raise `FieldError` for a text that holds what the trainer reserves, or what is no character."""
    if text.isascii():
        return
    if mark := next((m for m in MARKS if m in text), None):
        raise FieldError(field, f"holds the private-use character U+{ord(mark):04X}, which the trainer reserves")
    if re.search("[\ud800-\udfff]", text):
        raise FieldError(field, "holds half of a surrogate pair, which is no character")


def leading_answer(turns: tuple[Turn, ...]) -> int | None:
    """Return the place of an assistant's first turn that nobody asked for, or None; LLaVA's preprocessing drops that turn."""
    at = 1 if turns[0].role == "system" else 0
    return at if len(turns) > at and turns[at].role == "assistant" else None


def place_unplaced(turns: tuple[Turn, ...], media: dict[str, list[MediaRef]]) -> tuple[Turn, ...]:
    """Put the placeholders of a record that has none before its first user's turn: images, then videos, then clips."""
    if not any(media.values()) or any(kinds_in(turn.content) for turn in turns):
        return turns
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        return turns
    content = leading_placeholders(ref.kind for kind in PLACEHOLDERS for ref in media[kind]) + turns[first].content
    return turns[:first] + (replace(turns[first], content=content),) + turns[first + 1 :]


def in_reading_order(turns: tuple[Turn, ...], media: dict[str, list[MediaRef]]) -> tuple[MediaRef, ...]:
    """Return all media in the order of their placeholders: the k-th `<image>` is the k-th image, and so on. Raises `FieldError`."""
    written = [kind for turn in turns for kind in kinds_in(turn.content)]
    for kind, refs in media.items():
        if (count := written.count(kind)) != len(refs):
            raise FieldError(kind, f"{count} {PLACEHOLDERS[kind]} in the turns, {len(refs)} {kind} files in the record")
    left = {kind: iter(refs) for kind, refs in media.items()}
    return tuple(next(left[kind]) for kind in written)


def check_order(turns: tuple[Turn, ...], needs_answer: bool) -> None:
    """Raise `FieldError` unless user and assistant take turns after an optional system turn, and an answer comes last.

    Between an assistant's turn with calls and the next one stand the results of the calls, in their order. If `needs_answer` is
    false, any turn may come last; if it is true, at least one answer has to be learned.
    """
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    due: tuple[str, ...] = ("user",)
    calls: list[Json] = []
    num_results = 0
    for i, turn in enumerate(spoken):
        if turn.role not in due:
            raise FieldError("conversations", f"turn {i + 1} is the {turn.role}'s, the {due[0]}'s is due{_hint(turn, calls)}")
        if turn.role == "tool":
            _check_result(turn, calls, num_results, i + 1)
            num_results, due = num_results + 1, ("assistant", "tool")
        else:
            calls, num_results = list(turn.extra.get("tool_calls", ())), 0
            due = ("assistant",) if turn.role == "user" else ("user", "tool") if calls else ("user",)
    if not spoken or (needs_answer and spoken[-1].role != "assistant"):
        state = f"the last turn is the {spoken[-1].role}'s" if spoken else "no turn is left that anybody asked for"
        raise FieldError("conversations", f"{state}; an answer must come last")
    answers = [turn for turn in spoken if turn.role == "assistant"]
    if needs_answer and not any(turn.learn for turn in answers):
        which = f"none of its {len(answers)} answers is" if len(answers) > 1 else "its only answer is not"
        raise FieldError("conversations", f"{which} to be learned (weight, loss, trainable or train): leave the record out")


def _hint(turn: Turn, calls: list[Json]) -> str:
    """Return a hint for the message of a turn that is out of order, or an empty string."""
    if turn.role == "tool":
        return "; results of tools follow a turn of the assistant with tool_calls, and calls that stand in its text are not read"
    if calls and "tool_calls" in turn.extra:
        return "; calls made at once stand in one turn"
    return ""


def _check_result(turn: Turn, calls: list[Json], k: int, place: int) -> None:
    """Raise `FieldError` unless the k-th result answers the k-th call: a template that writes no ids would pair them so."""
    if k == len(calls):
        raise FieldError("conversations", f"turn {place} is result {k + 1} of a tool, but only {len(calls)} calls were made")
    call = calls[k]
    for key, wanted in (("tool_call_id", call.get("id")), ("name", call["function"]["name"])):
        given = turn.extra.get(key)
        if given is not None and wanted is not None and given != wanted:
            reason = f"turn {place} answers the call {given[:60]!r} ({key}), the call {wanted[:60]!r} comes first"
            raise FieldError("conversations", f"{reason}: results stand in the order of their calls")
