"""Records that say which answer is preferred, or whether their answer is wanted, read as conversations.

A pair is `chosen` and `rejected`, each a text, a turn or a list of turns, behind the turns of `conversations` or `messages`, behind
TRL's `prompt`, behind MMPR's `question`, or each a whole conversation; ms-swift's `rejected_response` stands beside turns that end
with the preferred answer. A single answer is a record of any format with `desirable`, TRL's `label` or LLaMA-Factory's `kto_tag`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from data.records.fields import FieldError, is_absent, kind_of
from data.records.shapes import TURN_KEYS
from model.files.untrusted import Json

PAIR_KEYS = ("chosen", "rejected")
REJECTED = "rejected_response"
"""ms-swift's key for the answer that is not preferred to the last of the turns."""
WANTED_KEYS = ("desirable", "label", "kto_tag")
_PROMPTS = ("prompt", "question")
_MESSAGE = re.compile(r"messages\[(\d+)\](\.content)?")


class _Told(NamedTuple):
    """A turn, and where the record has it."""

    field: str
    content: str  # what follows `field` where the turn's words stand
    message: object  # as OpenAI writes it


@dataclass(frozen=True)
class Preference:
    """A record with preferences as the records that hold one answer each."""

    answered: Json  # with the preferred answer, or the only one
    rejected: Json | None  # with the other one
    desirable: bool | None  # of a single answer; None of a pair
    fields: tuple[tuple[_Told, ...], tuple[_Told, ...]] = ((), ())

    def field(self, name: str, rejected: bool = False) -> str:
        """Return the field of the record that a field of one of the two records was read from."""
        match, told = _MESSAGE.match(name), self.fields[rejected]
        if not match or not told:
            return name
        place, content, _ = told[int(match[1])]
        return place + (content if match[2] else "") + name[match.end() :]


def is_preference(raw: Json) -> bool:
    """Tell whether a record says which answer is preferred or wanted."""
    return any(not is_absent(raw.get(key)) for key in (*PAIR_KEYS, REJECTED)) or _wanted_key(raw) is not None


def _wanted_key(raw: Json) -> str | None:
    """Return the key that says whether the answer is wanted; a `label` that is no boolean is a note."""
    keys = [key for key in WANTED_KEYS if isinstance(raw.get(key), bool) or (key == WANTED_KEYS[0] and raw.get(key) is not None)]
    return keys[0] if keys else None


def read_preference(raw: Json) -> Preference:
    """Read a record that `is_preference`. Raises `FieldError`."""
    key = _wanted_key(raw)
    pair = [name for name in (*PAIR_KEYS, REJECTED) if not is_absent(raw.get(name))]
    if key is not None:
        if pair:
            raise FieldError(key, f"says whether one answer is wanted, and {pair[0]!r} is there as well; keep one")
        if not isinstance(raw[key], bool):
            raise FieldError(key, f"is {kind_of(raw[key])}, not true (wanted) or false (unwanted)")
        return Preference({name: value for name, value in raw.items() if name not in WANTED_KEYS}, None, raw[key])
    if REJECTED in pair:
        return _response(raw)
    if missing := [name for name in PAIR_KEYS if name not in pair]:
        raise FieldError(missing[0], f"missing; {pair[0]!r} is there, and a pair has both")
    return _pair(raw)


def _pair(raw: Json) -> Preference:
    """Read `chosen` and `rejected`."""
    prompt, used = _prompt(raw)
    answers = [[*prompt, *_turns(raw[key], key)] for key in PAIR_KEYS]
    kept = {name: value for name, value in raw.items() if name not in (*PAIR_KEYS, *used)}
    return _made(kept, answers)


def _response(raw: Json) -> Preference:
    """Read `rejected_response` beside turns that end with the preferred answer."""
    keys = [key for key in TURN_KEYS if raw.get(key) is not None]
    if any(not is_absent(raw.get(key)) for key in PAIR_KEYS) or not keys or not isinstance(raw[keys[0]], list):
        raise FieldError(REJECTED, "is read beside messages that end with the preferred answer, and without chosen and rejected")
    turns = _turns(raw[keys[0]], keys[0])
    kept = {name: value for name, value in raw.items() if name not in (REJECTED, *TURN_KEYS)}
    return _made(kept, [turns, [*turns[:-1], *_turns(raw[REJECTED], REJECTED)]])


def _made(kept: Json, answers: list[list[_Told]]) -> Preference:
    records = [{**kept, "messages": [told.message for told in turns]} for turns in answers]
    return Preference(records[0], records[1], None, (tuple(answers[0]), tuple(answers[1])))


def _prompt(raw: Json) -> tuple[list[_Told], tuple[str, ...]]:
    """Return the turns before both answers, and the keys that they stand under; none where the answers are whole conversations."""
    found = [key for key in (*TURN_KEYS, *_PROMPTS) if not is_absent(raw.get(key))]
    turns = [key for key in found if key in TURN_KEYS]
    if len(turns) > 1 or (not turns and len(found) > 1):
        raise FieldError(found[0], f"and {found[1]!r} could both be what is asked; keep one")
    if not found:
        if not all(isinstance(raw[key], list) and len(raw[key]) > 1 for key in PAIR_KEYS):
            raise FieldError("chosen", f"answers nothing: name what is asked in {', '.join((*TURN_KEYS, *_PROMPTS))}")
        return [], ()
    key = found[0]
    if isinstance(raw[key], str) and key in _PROMPTS:
        return [_Told(key, "", {"role": "user", "content": raw[key]})], (key,)
    if not isinstance(raw[key], list):
        raise FieldError(key, f"is {kind_of(raw[key])}, not a list of turns")
    told = _turns(raw[key], key)
    if told and isinstance(told[-1].message, dict) and told[-1].message.get("role") in ("gpt", "assistant"):
        raise FieldError(key, "ends with an answer, and chosen and rejected are answers to its last turn; remove it")
    return told, (key,)


def _turns(value: object, key: str) -> list[_Told]:
    """Return a text, a turn or a list of turns as messages."""
    if isinstance(value, str):
        return [_Told(key, "", {"role": "assistant", "content": value})]
    if isinstance(value, dict):
        return [_told(value, key)]
    if not isinstance(value, list) or not value:
        raise FieldError(key, f"is {'empty' if value == [] else kind_of(value)}, not a text, a turn or a list of turns")
    return [_told(turn, f"{key}[{i}]") for i, turn in enumerate(value)]


def _told(turn: object, field: str) -> _Told:
    """Return a turn as OpenAI writes it."""
    if not isinstance(turn, dict) or "from" not in turn:
        return _Told(field, ".content", turn)
    renamed = {"from": "role", "value": "content"}
    return _Told(field, ".value", {renamed.get(key, key): value for key, value in turn.items()})
