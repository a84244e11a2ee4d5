"""A record's turns as messages for a template: placeholders in their places and wrapped, answers with their state token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from data.records.frame_times import with_frame_texts
from data.records.placeholders import only_placeholders, placeholders_first, with_tokens
from data.records.record import Record, RecordError
from data.text.abilities import Message
from data.text.state_tokens import STATE_TOKENS, reply_state, split_state


@dataclass(frozen=True)
class Wording:
    """Rules by which contents are rewritten before the template gets them."""

    template: str  # name of the template, for error messages
    placeholders: str  # as_written | first
    media_wrap: tuple[str, ...]
    state_tokens: str  # none | glyphs | digits
    tokens: Mapping[str, str]  # what stands for a medium in the contents, by modality
    placeholders_only: bool  # keep nothing of the question but its placeholders
    parts: bool = False  # the template takes contents as lists of parts


def media_kinds(record: Record) -> tuple[str, ...]:
    """Return the kinds of media that the record holds, once each: some templates have a system text for each kind."""
    return tuple(dict.fromkeys(media.kind for media in record.media))


def write_messages(record: Record, wording: Wording) -> list[Message]:
    """Write one message per turn, with all that the template gets of the turn.

    Raises `RecordError` if the wording cannot express it.
    """
    contents = [turn.content for turn in record.turns]
    if wording.placeholders_only:
        if [turn.role for turn in record.turns] != ["user", "assistant"]:
            raise _error(record, f"{len(contents)} turns; template {wording.template!r} takes one question and one answer")
        contents[0] = only_placeholders(contents[0])
        if not contents[0]:
            raise _error(record, f"no placeholder in the question; template {wording.template!r} keeps nothing else of it")
    if wording.placeholders == "first":
        contents = [placeholders_first(content) for content in contents]
    if any(ref.times for ref in record.media):
        times = iter([ref.times for ref in record.media])
        contents = [with_frame_texts(content, times, parts=wording.parts) for content in contents]
    contents = [with_tokens(content, wording.tokens, wording.media_wrap) for content in contents]
    if tokens := STATE_TOKENS[wording.state_tokens]:
        for i, turn in enumerate(record.turns):
            if turn.role == "assistant":
                contents[i] = tokens[reply_state(record, i)] + _stateless(record, contents[i], wording.state_tokens)
    return [{"role": turn.role, "content": content, **turn.extra} for turn, content in zip(record.turns, contents)]


def _stateless(record: Record, answer: str, state_tokens: str) -> str:
    """Return the answer, which may not start with a state token of its own. Raises `RecordError` if it does.

    With two state tokens, the second would be read as speech.
    """
    state, _ = split_state(answer, state_tokens)
    if state is not None:
        token = STATE_TOKENS[state_tokens][state]
        raise _error(
            record, f"an answer starts with {token!r}, which data.state_tokens = {state_tokens!r} writes by itself; remove it"
        )
    return answer


def _error(record: Record, reason: str) -> RecordError:
    return RecordError(record.where, record.id, "conversations", reason)
