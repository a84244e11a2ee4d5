"""Samples of preferences: one prompt with its media, and the answers to it one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

from data.media.record_media import RecordMedia
from data.records.record import Record, RecordError
from data.sample import Measured, Sample, assemble_sample, measure_encoded
from data.text.encoded import Encoded
from data.text.rounds import TooLongError
from data.text.template import Template

Role = Literal["chosen", "rejected", "desirable", "undesirable", "other"]
"""What an answer is: one of a pair, wanted or unwanted by itself, or the answer of another record."""
LEARNED = ("chosen", "desirable")
"""Answers that plain supervised loss learns as well."""


@dataclass(frozen=True)
class SampleAnswer:
    """One answer of a sample: its tokens stand at [start, stop) of the ids, and follow the prompt."""

    role: Role
    start: int
    stop: int
    counted: np.ndarray  # (stop - start,) bool: tokens whose probability counts, the assistant's


@dataclass(frozen=True)
class PreferenceSample(Sample):
    """A prompt and its answers in one row of ids; `labels` are those of the first answer where it is one to learn."""

    prompt: int = 0  # tokens of the prompt, media included
    answers: tuple[SampleAnswer, ...] = ()
    reference: tuple[float, ...] = ()  # log-probability of each answer under the reference; () where it is not known


@dataclass(frozen=True)
class EncodedAnswers:
    """A prompt and its answers as token ids, before placeholders are expanded."""

    encoded: Encoded  # all of it, as one round
    roles: tuple[Role, ...]
    counted: tuple[np.ndarray, ...]  # of each answer's tokens

    @property
    def num_answer_tokens(self) -> int:
        return sum(map(len, self.counted))


def encode_answers(template: Template, record: Record, other: Record | None = None) -> EncodedAnswers:
    """Encode the prompt of `record` once and its answers behind it, and then the last answer of `other`, where there is one.

    What is shared is the longest common beginning of the whole conversations' ids, up to where an answer begins. Raises
    `RecordError`.
    """
    roles: list[Role] = ["chosen"] if record.desirable is None else ["desirable" if record.desirable else "undesirable"]
    rows = [template.encode(record)]
    if record.rejected:
        roles.append("rejected")
        rows.append(template.encode(with_rejected(record)))
    if other is not None:
        roles.append("other")
        rows.append(template.encode(replace(record, turns=(*record.turns[: record.num_shared], *other.turns[other.num_shared :]))))
    shared = _num_shared(rows)
    if shared == 0:
        raise RecordError(record.where, record.id, "conversations", "nothing stands before its answers")
    if any(id in row.input_ids[shared:] for row in rows for id in template.placeholder_ids.values()):
        raise RecordError(record.where, record.id, "chosen", "media stand behind the place where the answers part")
    ids = [*rows[0].input_ids, *(id for row in rows[1:] for id in row.input_ids[shared:])]
    learned = rows[0].supervised if roles[0] in LEARNED else [False] * len(rows[0].supervised)
    supervised = [*learned, *[False] * (len(ids) - len(learned))]
    counted = tuple(np.array(row.supervised[shared:], dtype=bool) for row in rows)
    return EncodedAnswers(Encoded(ids, supervised, [len(ids)], 1, rows[0].removed), tuple(roles), counted)


def with_rejected(record: Record) -> Record:
    """Return the conversation of a record that ends with its rejected answer."""
    return replace(record, turns=(*record.turns[: record.num_shared], *record.rejected), rejected=())


def _num_shared(rows: Sequence[Encoded]) -> int:
    """Return how many first ids all rows have in common, at most those before the first id that is learned."""
    first = min(row.supervised.index(True) for row in rows)
    for row in rows[1:]:
        pairs = zip(rows[0].input_ids[:first], row.input_ids[:first])
        first = next((k for k, (one, two) in enumerate(pairs) if one != two), first)
    return first


def assemble_answers(
    found: EncodedAnswers, template: Template, media: RecordMedia, max_length: int | None, *, sample_id: int, source_id: int
) -> PreferenceSample:
    """Assemble the sample of a record. Raises `RecordError`; `TooLongError` where prompt and answers do not fit together."""
    try:
        sample = assemble_sample(
            found.encoded, template.placeholder_ids, media, max_length=max_length, sample_id=sample_id, source_id=source_id
        )
    except TooLongError as error:
        raise too_long(error) from None
    at = prompt = len(sample.input_ids) - found.num_answer_tokens
    answers = []
    for role, counted in zip(found.roles, found.counted):
        answers.append(SampleAnswer(role, at, at + len(counted), counted))
        at += len(counted)
    return PreferenceSample(**{f.name: getattr(sample, f.name) for f in fields(sample)}, prompt=prompt, answers=tuple(answers))


def measure_answers(found: EncodedAnswers, template: Template, record: Record, counts: Sequence[int], max_length: int) -> Measured:
    """Measure what `assemble_answers` makes of a record whose media take `counts` tokens. Raises `TooLongError` as it does."""
    try:
        return measure_encoded(found.encoded, template.placeholder_ids, record, counts, max_length)
    except TooLongError as error:
        raise too_long(error) from None


def too_long(error: TooLongError) -> TooLongError:
    """Return the error of a sample whose parts belong together: no round can be dropped."""
    reason = error.reason.replace("the first round takes", "its prompt and answers take")
    made = TooLongError(error.where, error.id, error.field, reason)
    made.whole = error.whole
    return made
