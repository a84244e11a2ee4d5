"""A record as text and token ids, and the checks that both have to pass."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerFast

from data.records.record import Record, RecordError
from data.text.layouts import Rendering
from data.text.tokens import Tokens
from model.media_spec import READ_BY

_MODALITIES = sorted(set(READ_BY.values()))


@dataclass(frozen=True)
class Encoded:
    """One record as token ids, with the ids that are learned and the ends of its rounds."""

    input_ids: list[int]
    supervised: list[bool]  # the assistant's tokens and what ends its turns
    round_ends: list[int]  # number of ids up to and including round k, a user's turn and all turns that answer it
    num_rounds: int = 0  # rounds of the record; more than `round_ends` holds where the last ones cannot fit and were not tokenised
    removed: int = 0  # answers that the template shortens: it leaves out the thoughts before the last question
    rendering: Rendering | None = field(default=None, repr=False, compare=False)  # with a short round where rounds were left out


@dataclass(frozen=True)
class Row:
    """One record as rendered text and token ids."""

    rendering: Rendering
    tail: str  # what the template writes after the end of the last turn, whether the text holds it or not
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
    """Raise `RecordError` if a row breaks a rule about control tokens, placeholders or unread tokens.

    The ids may hold no control token that the template did not write, as many placeholders of each modality as there are media, and
    no id in `unread`: the embedding rows of those tokens mean nothing.
    """
    if unread and (found := unread.intersection(row.tokens.ids)):
        reason = f"the template writes {tokenizer.convert_ids_to_tokens(min(found))!r}, which has no row in the base's embedding"
        raise RecordError(record.where, record.id, "conversations", f"{reason} and learns none")
    if _control_in_plain(row, tokenizer, control_ids):
        raise RecordError(record.where, record.id, "conversations", "the tokenizer makes a control token of a content's plain text")
    for modality in _MODALITIES:
        given = [media.kind for media in record.media if media.modality == modality]
        if given and modality not in placeholder_ids:
            raise RecordError(record.where, record.id, given[0], f"{len(given)} files, but the model has no part for this modality")
        written = row.tokens.ids.count(placeholder_ids.get(modality, -1))
        if written != len(given):
            raise RecordError(record.where, record.id, modality, f"{written} placeholders in the ids, {len(given)} files")


def _control_in_plain(row: Row, tokenizer: PreTrainedTokenizerFast, control_ids: frozenset[int]) -> bool:
    """Return whether a control id stands for a text other than its token, or for a control token that a person wrote."""
    plain = {start for start, _ in row.rendering.written}
    text, ids, offsets = row.rendering.text, row.tokens.ids, row.tokens.offsets
    found = [(id, *offsets[k]) for k, id in enumerate(ids) if id in control_ids]
    words = {id: tokenizer.convert_ids_to_tokens(id) for id in {id for id, _, _ in found}}
    return any(start in plain or text[start:stop].strip() != words[id] for id, start, stop in found)


def round_ends(row: Row) -> list[int]:
    """Return the number of ids up to the end of each round.

    A round ends after its last turn's end and after what the template writes behind the last turn, if that is there as well. Where
    rounds cannot be separated, the whole row is the only round.
    """
    text, spans, ends = row.rendering.text, row.rendering.spans, []
    for span, after in zip(spans, spans[1:] if row.rendering.first_round_apart else ()):
        if span.role == "assistant" and after.role == "user":
            stop = span.end + (len(row.tail) if text.startswith(row.tail, span.end) else 0)
            ends.append(row.tokens.starting_before(stop))
    return [*ends, len(row.tokens.ids)]
