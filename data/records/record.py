"""Parsing of one line of a source: a `Record`, or an error that says where and why. Nothing is repaired in silence."""

from __future__ import annotations

from dataclasses import dataclass

from data.records.fields import FieldError, kind_of, record_line
from data.records.media_refs import MediaRef, media_by_kind
from data.records.record_keys import check_record_keys, with_system
from data.records.shapes import as_messages, original_field
from data.records.tool_calls import read_tools
from data.records.turns import Turn, check_order, check_words, in_reading_order, leading_answer, place_unplaced, read_turns
from model.errors import DataError
from model.files.untrusted import Json
from model.media_spec import PLACEHOLDERS

__all__ = ["MediaRef", "Record", "RecordError", "Turn", "parse"]


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
    `needs_answer=False` lets the last turn be the user's or a tool's. Raises `RecordError`.
    """
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
    written = {i + shift: i for i in range(len(turns)) if _answers_sound(turns, i)}
    if value not in written:
        allowed = ", ".join(map(str, written)) or "none"
        raise FieldError("inserted_id", f"turn {str(value)[:60]} answers no turn with <audio>; turns that do: {allowed}")
    return written[value]


def _answers_sound(turns: tuple[Turn, ...], i: int) -> bool:
    return i > 0 and turns[i].role == "assistant" and PLACEHOLDERS["audio"] in turns[i - 1].content


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
