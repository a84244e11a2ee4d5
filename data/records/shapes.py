"""Records of formats without a list of turns, read as messages: one entry of a table each.

A shape is recognised by the keys it needs. The record's other keys stay as they are; those that no turn holds are refused later
(`data.records.record_keys`), so nothing is dropped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from data.records.fields import FieldError, is_absent, kind_of
from data.records.turn_keys import LEARN_KEYS
from model.files.untrusted import Json

TURN_KEYS = ("conversations", "messages")
_TURN = re.compile(r"messages\[(\d+)\](\.content)?")
_CONTENT = ".content"


@dataclass(frozen=True)
class Shape:
    """A format: the keys it needs, the optional keys it uses up, and how its turns are read from them."""

    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    turns: Callable[[Json], list[tuple[str, Json]]]
    """Return (field of the record that holds the content, OpenAI message) for each turn. Raises `FieldError`."""


def as_messages(raw: Json) -> tuple[Json, list[str]]:
    """Return the record with `messages` in place of another format's keys, and the field that each message was read from.

    A record with turns is returned as it is. Raises `FieldError` where two formats could be meant.
    """
    found = shapes_of(raw)
    if not found:
        return raw, []
    if len(found) > 1:
        names = " and ".join(f"{shape.name} ({', '.join(shape.needs)})" for shape in found)
        raise FieldError(found[0].needs[0], f"the record can be read as {names}; keep the keys of one")
    shape = found[0]
    turns = shape.turns(raw)
    kept = {key: value for key, value in raw.items() if key not in (*shape.needs, *shape.may)}
    return {**kept, "messages": [message for _, message in turns]}, [field for field, _ in turns]


def shapes_of(raw: Json) -> list[Shape]:
    """Return the formats whose keys a record has; none for a record with turns."""
    for key in TURN_KEYS:
        if raw.get(key) is not None:
            return []
    return [shape for shape in SHAPES if all(raw.get(key) is not None for key in shape.needs)]


def original_field(field: str, fields: list[str]) -> str:
    """Return the field of the record that a field of its message was read from; `fields`: from `as_messages`."""
    match = _TURN.match(field)
    if not match or not fields:
        return field
    content = fields[int(match[1])]
    return (content if match[2] else content.removesuffix(_CONTENT)) + field[match.end() :]


def _said(raw: Json, key: str, role: str) -> tuple[str, Json]:
    if not isinstance(raw[key], str):
        raise FieldError(key, f"is {kind_of(raw[key])}, not a string")
    return key, {"role": role, "content": raw[key]}


def _history(raw: Json) -> list[tuple[str, Json]]:
    """Return the earlier rounds of a record: `history` is a list of [question, answer]."""
    value = raw.get("history")
    if is_absent(value):
        return []
    if not isinstance(value, list):
        raise FieldError("history", f"is {kind_of(value)}, not a list of [question, answer]")
    turns = []
    for i, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise FieldError(f"history[{i}]", "is no [question, answer] of two strings")
        turns += [(f"history[{i}][{k}]", {"role": role, "content": pair[k]}) for k, role in enumerate(("user", "assistant"))]
    return turns


def _alpaca(raw: Json) -> list[tuple[str, Json]]:
    """Return the turns of Alpaca's columns; `input` stands on a line of its own behind `instruction`, as in LLaMA-Factory."""
    _, asked = _said(raw, "instruction", "user")
    if not is_absent(raw.get("input")):
        asked["content"] += "\n" + _said(raw, "input", "user")[1]["content"]
    return [*_history(raw), ("instruction", asked), _said(raw, "output", "assistant")]


def _query(raw: Json) -> list[tuple[str, Json]]:
    return [*_history(raw), _said(raw, "query", "user"), _said(raw, "response", "assistant")]


def _completion(raw: Json) -> list[tuple[str, Json]]:
    """Return the turns of TRL's prompt and completion, two strings or two lists of messages: only the completion is learned."""
    prompt, completion = raw["prompt"], raw["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise FieldError("completion", "is of another kind than prompt; both are strings, or both lists of messages")
    if not isinstance(prompt, list):
        return [_said(raw, "prompt", "user"), _said(raw, "completion", "assistant")]
    read = [(f"prompt[{i}]{_CONTENT}", _unlearned(turn, f"prompt[{i}]")) for i, turn in enumerate(prompt)]
    return read + [(f"completion[{i}]{_CONTENT}", turn) for i, turn in enumerate(completion)]


def _unlearned(turn: Json, field: str) -> Json:
    """Return an answer of a prompt marked as not learned; other turns, and what is no turn, as they are."""
    if not isinstance(turn, dict) or turn.get("role") != "assistant":
        return turn
    if key := next((key for key in LEARN_KEYS if turn.get(key)), None):
        raise FieldError(f"{field}.{key}", "asks to learn an answer of the prompt; only the completion is learned")
    return {**{key: value for key, value in turn.items() if key not in LEARN_KEYS}, "loss": False}


def _texts(raw: Json) -> list[tuple[str, Json]]:
    """Return the turns of the Cauldron's and FineVision's `texts`: a list of {"user", "assistant"}, one per round."""
    if not isinstance(raw["texts"], list) or not all(isinstance(pair, dict) for pair in raw["texts"]):
        raise FieldError("texts", "is no list of objects with user and assistant")
    turns = []
    for i, pair in enumerate(raw["texts"]):
        for role in ("user", "assistant"):
            if not isinstance(pair.get(role), str):
                raise FieldError(f"texts[{i}].{role}", f"is {kind_of(pair.get(role))}, not a string")
            turns.append((f"texts[{i}].{role}", {"role": role, "content": pair[role]}))
        if foreign := sorted(pair.keys() - {"user", "assistant", "source"}):
            raise FieldError(f"texts[{i}].{foreign[0]}", "is not read here; a round has user, assistant and source: remove it")
    return turns


SHAPES = (
    Shape("Alpaca", ("instruction", "output"), ("input", "history"), _alpaca),
    Shape("ms-swift", ("query", "response"), ("history",), _query),
    Shape("TRL", ("prompt", "completion"), (), _completion),
    Shape("the Cauldron", ("texts",), (), _texts),
)
"""Formats without turns. To add one, add an entry: `python -m tools.check_data` shows what is made of it."""
