"""A record as text and ids, and what has to hold of them."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from data.records.record import Record, RecordError
from data.text.render import Rendering
from data.text.tokens import Tokens
from model.media_spec import READ_BY


@dataclass(frozen=True)
class Encoded:
    input_ids: list[int]
    supervised: list[bool]  # the assistant's tokens and what ends its turns
    round_ends: list[int]  # ids up to and including round k, a user's turn and all that answer it
    num_rounds: int = 0  # that can be told apart; more than `round_ends` where the last ones cannot fit and were not tokenised
    removed: int = 0  # answers of which the template leaves something out: the thoughts before the last question


@dataclass(frozen=True)
class Row:
    """A record as text and ids."""

    rendering: Rendering
    tail: str  # what the template writes after the end of the last turn, there or not
    tokens: Tokens
    supervised: list[bool]


def check_row(
    record: Record,
    row: Row,
    tokenizer: PreTrainedTokenizerFast,
    control_ids: frozenset[int],
    placeholder_ids: dict[str, int],
    unread: frozenset[int],
) -> None:
    """Raises `RecordError` for control tokens that the template did not write, for more or fewer placeholders than media, and for
    tokens that are `unread`: their rows mean nothing.
    """
    if found := unread.intersection(row.tokens.ids):
        reason = f"the template writes {tokenizer.convert_ids_to_tokens(min(found))!r}, which has no row in the base's embedding"
        raise RecordError(record.where, record.id, "conversations", f"{reason} and learns none")
    if _control_in_plain(row, tokenizer, control_ids):
        raise RecordError(record.where, record.id, "conversations", "the tokenizer makes a control token of a content's plain text")
    for modality in sorted(set(READ_BY.values())):
        given = [media.kind for media in record.media if media.modality == modality]
        if given and modality not in placeholder_ids:
            raise RecordError(record.where, record.id, given[0], f"{len(given)} files, but the model has no part for this modality")
        written = row.tokens.ids.count(placeholder_ids.get(modality, -1))
        if written != len(given):
            raise RecordError(record.where, record.id, modality, f"{written} placeholders in the ids, {len(given)} files")


def _control_in_plain(row: Row, tokenizer: PreTrainedTokenizerFast, control_ids: frozenset[int]) -> bool:
    """Whether a control id stands for another text than its token, or for one that a person wrote."""
    plain = {start for start, _ in row.rendering.written}
    return any(
        id in control_ids and (start in plain or row.rendering.text[start:stop].strip() != tokenizer.convert_ids_to_tokens(id))
        for id, start, stop in zip(row.tokens.ids, row.tokens.starts, row.tokens.stops)
    )


def round_ends(row: Row) -> list[int]:
    """Where rounds end: after the turn's end and what the template writes after the last one, if it is there as well."""
    text, spans, ends = row.rendering.text, row.rendering.spans, []
    for span, after in zip(spans, spans[1:] if row.rendering.first_round_apart else ()):
        if span.role == "assistant" and after.role == "user":
            stop = span.end + (len(row.tail) if text.startswith(row.tail, span.end) else 0)
            ends.append(bisect_left(row.tokens.starts, stop))
    return [*ends, len(row.tokens.ids)]
