"""Parsing of one line of a source: a `Record`, or an error that says where and why. Nothing is repaired in silence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from data.records.fields import FieldError, kind_of, record_line
from data.records.media_refs import MediaRef, media_by_kind
from data.records.preferences import is_preference, read_preference
from data.records.record_keys import check_record_keys, with_system
from data.records.shapes import as_messages, original_field
from data.records.tool_calls import read_tools
from data.records.turns import Turn, check_order, check_words, in_reading_order, leading_answer, place_unplaced, read_turns
from model.errors import DataError
from model.files.untrusted import Json
from model.media_spec import PLACEHOLDERS

__all__ = ["MediaRef", "Record", "RecordError", "Turn", "parse"]


Answers = Literal["one", "pairs", "judged"]
"""What a run reads of a record: one answer, a pair of which one is preferred, or answers that are wanted or not."""


@dataclass(frozen=True)
class Record:
    """One record whose rules were checked by `parse`."""

    id: str
    turns: tuple[Turn, ...]
    media: tuple[MediaRef, ...]  # in reading order of the placeholders
    where: str  # "mix.json:12"
    num_dropped_turns: int = 0
    negative_turn: int | None = None  # the turn that replies to sound that was not meant for the model (VITA `inserted_id`)
    interrupted: bool = False  # the last answer was cut off: its end token is not learned (VITA `end_tag` false)
    tools: tuple[Json, ...] = ()  # definitions for the template of what the assistant may call
    num_shared: int = 0  # first turns that both answers of a pair follow, or that a judged answer follows
    rejected: tuple[Turn, ...] = ()  # turns to which those behind the shared ones are preferred
    desirable: bool | None = None  # whether the last answer is wanted, where the record says so and has no other

    @property
    def is_preference(self) -> bool:
        """Return whether the record says which answer is preferred, or whether its answer is wanted."""
        return bool(self.rejected) or self.desirable is not None

    @property
    def num_unlearned(self) -> int:
        """Return the number of answers that are read and not learned."""
        return sum(turn.role == "assistant" and not turn.learn for turn in self.turns)


class RecordError(DataError):
    """One record breaks the rules. The message is one line that is safe to print; its parts are kept unchanged as attributes."""

    def __init__(self, where: str, id: str, field: str, reason: str) -> None:
        super().__init__(record_line(where, id, field, reason))
        self.where, self.id, self.field, self.reason = where, id, field, reason

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.where, self.id, self.field, self.reason)  # pickled by workers, which send it to their parent


def parse(raw: object, where: str, name: str = "", *, needs_answer: bool = True) -> Record:
    """Parse `raw`, one decoded JSON value, into a record.

    Guaranteed: an optional system turn, then user and assistant in turn, results of tools behind the calls of an assistant; no
    blank answer without calls; as many placeholders as media of each kind, none of them in an answer; unless `needs_answer` is
    false, an answer that is learned. A field that is null is absent. A record without an id is called `name`, or by its line.
    `needs_answer=False` lets the last turn be the user's or a tool's. A record of preferences is that of its chosen answer, with
    what the rejected one says instead. Raises `RecordError`.
    """
    if not isinstance(raw, dict) or not is_preference(raw):
        return _parsed(raw, where, name, needs_answer)
    name = name or where.rpartition(":")[2]
    try:
        name = _id(raw, name)
        found = read_preference(raw)
    except FieldError as error:
        raise RecordError(where, name, *error.args) from None
    records = []
    for rejected, one in enumerate((found.answered, found.rejected)):
        try:
            records += [] if one is None else [_parsed(one, where, name)]
        except RecordError as error:
            raise RecordError(where, name, found.field(error.field, bool(rejected)), error.reason) from None
    try:
        return _compared(*records) if found.desirable is None else _judged(records[0], found.desirable)
    except FieldError as error:
        raise RecordError(where, name, *error.args) from None


def _compared(chosen: Record, rejected: Record) -> Record:
    """Return the record of a pair: turns that both share are read and not learned. Raises `FieldError`."""
    turns, others = chosen.turns, rejected.turns
    shared = next((i for i, (one, two) in enumerate(zip(turns, others)) if one != two), min(len(turns), len(others)))
    if shared == len(turns) == len(others):
        raise FieldError("rejected", "says the same as chosen: there is nothing to prefer; leave the record out")
    for turn in (*turns[shared : shared + 1], *others[shared : shared + 1]):
        if turn.role != "assistant":
            raise FieldError("rejected", f"differs from chosen in a turn of the {turn.role}, not in an answer to the same turn")
    if shared in (len(turns), len(others)):
        raise FieldError("rejected", "goes on where chosen ends, or ends where it goes on: one of them answers nothing")
    if chosen.media != rejected.media:
        raise FieldError("rejected", "has other media than chosen")
    return replace(chosen, turns=_unlearned(turns, shared), num_shared=shared, rejected=others[shared:])


def _judged(record: Record, desirable: bool) -> Record:
    """Return the record of an answer that is wanted or not: earlier answers are read and not learned."""
    shared = max(i for i, turn in enumerate(record.turns) if turn.role == "user") + 1
    return replace(record, turns=_unlearned(record.turns, shared), num_shared=shared, desirable=desirable)


def _unlearned(turns: tuple[Turn, ...], count: int) -> tuple[Turn, ...]:
    return (*(replace(turn, learn=turn.role != "assistant") for turn in turns[:count]), *turns[count:])


def _parsed(raw: object, where: str, name: str, needs_answer: bool = True) -> Record:
    """Parse a record of one answer, as `parse` does."""
    name = name or where.rpartition(":")[2]
    fields: list[str] = []
    try:
        if not isinstance(raw, dict):
            raise FieldError("record", f"is {kind_of(raw)}, not an object")
        name = _id(raw, name)
        raw, fields = as_messages(raw)
        written, inline = read_turns(raw)
        turns = with_system(raw, written)
        check_record_keys(raw, turns)
        tools = read_tools(raw)
        check_words(list(tools), "tools")
        media = media_by_kind(raw, inline)
        dropped = leading_answer(turns)
        kept = place_unplaced(tuple(turn for i, turn in enumerate(turns) if i != dropped), media)
        check_order(kept, needs_answer)
        ordered = in_reading_order(kept, media)
        negative_turn = _negative_turn(raw.get("inserted_id"), kept, len(written) - len(kept))
        interrupted = _interrupted(raw.get("end_tag"), len(media["audio"]))
    except FieldError as error:
        field, reason = error.args
        raise RecordError(where, name, original_field(field, fields), reason) from None
    return Record(name, kept, ordered, where, len(turns) - len(kept), negative_turn, interrupted, tools)


def check_answers(record: Record, answers: Answers) -> None:
    """Raise `RecordError` unless the record has the answers that a run reads: one, a pair, or a pair or one that is judged."""
    field, reason = "", ""
    if answers == "one" and record.is_preference:
        field = "rejected" if record.rejected else "desirable"
        reason = (
            "says which answer is preferred, which only a run with [preference] learns: name a kind there, or leave the key out"
        )
    elif answers == "pairs" and not record.rejected:
        field, reason = "chosen", "the record has no chosen and rejected answer, and this kind of [preference] compares two"
    elif answers == "judged" and not record.is_preference:
        field, reason = "desirable", "the record has neither desirable nor chosen and rejected, from which [preference] learns"
    if field:
        raise RecordError(record.where, record.id, field, reason)


def _id(raw: Json, default: str) -> str:
    value = raw.get("id")
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise FieldError("id", f"is {kind_of(value)}, not a string or a whole number")
    return str(value)


def _negative_turn(value: object, turns: tuple[Turn, ...], shift: int) -> int | None:
    """Return the turn that `inserted_id` names, which has to answer sound.

    `inserted_id` counts turns as they stand in the file, where there are `shift` more than here before any answer. Raises
    `FieldError`.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise FieldError("inserted_id", f"is {kind_of(value)}, not the number of a turn, counted from 0")
    answers = [i for i in range(1, len(turns)) if turns[i].role == "assistant" and PLACEHOLDERS["audio"] in turns[i - 1].content]
    written = {i + shift: i for i in answers}
    if value not in written:
        allowed = ", ".join(map(str, written)) or "none"
        raise FieldError("inserted_id", f"turn {str(value)[:60]} answers no turn with <audio>; turns that do: {allowed}")
    return written[value]


def _interrupted(value: object, num_clips: int) -> bool:
    """Return whether `end_tag` says that the last answer was cut off. Raises `FieldError` in records without audio.

    VITA lets speech alone interrupt an answer, so the field has no place in other records.
    """
    if value is None:
        return False
    if not isinstance(value, bool):
        raise FieldError("end_tag", f"is {kind_of(value)}, not true or false")
    if not num_clips:
        raise FieldError("end_tag", "is only for records with audio; remove it")
    return not value
