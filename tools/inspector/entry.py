"""A record as the inspector shows it: its place, its length, and what is learned of it, token by token and medium by medium.

The terminal and the page of `tools.inspect_data` show the same entries.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from data.dataset import MultimodalDataset, Rejected
from data.media.record_media import RecordMedia
from data.records.fields import shorten
from data.records.record import Record, RecordError
from data.sample import Sample, SampleMedia
from data.text.template import Encoded, Template
from model.batch import IGNORE_INDEX
from model.media_spec import AudioSpec, MediaSpec
from tools.inspector.answers import AnswerText, answer_texts, prompt_of
from tools.inspector.tokens import Piece, token_pieces
from trainer.records.quarantine import QuarantineRow

Status = Literal["trained", "shortened", "too long", "bad", "quarantined"]
RAW_LIMIT = 4000
"""Characters of a rejected record that are shown as raw text."""


@dataclass(frozen=True)
class Box:
    """One medium in the place of its tokens."""

    path: str  # as the record names it
    medium: SampleMedia
    spec: MediaSpec
    grid: tuple[int, int]  # tiles across and down, without the thumbnail
    span: tuple[float, float] | None  # the range of a video that is used, in seconds

    @property
    def has_thumbnail(self) -> bool:
        return len(self.medium.values) > self.grid[0] * self.grid[1]

    @property
    def extent(self) -> str:
        """Return the medium's size in the unit of its kind; "" for a picture that is seen in one view of the tower's size."""
        if isinstance(self.spec, AudioSpec):
            return f"{sum(self.medium.frames) * self.spec.hop / self.spec.sampling_rate:.2f} s"
        watched = f" from {self.span[0]:g} s to {self.span[1]:g} s" if self.span else ""
        if (native := self.medium.native) is not None:
            times, high, wide = self.medium.grid
            size = f"{wide * native.patch} x {high * native.patch} pixels"
            return size if self.medium.kind == "image" else f"{times * self.medium.values.shape[2]} frames of {size}{watched}"
        if self.medium.kind == "video":
            return f"{len(self.medium.values)} frames{watched}"
        if len(self.medium.values) > 1:
            return f"{self.grid[0]} x {self.grid[1]} tiles{' + thumbnail' * self.has_thumbnail}"
        return ""

    @property
    def num_columns(self) -> int:
        """Return the mel frames of all rows of a clip, padding included."""
        return self.medium.values.shape[0] * self.medium.values.shape[-1]

    @property
    def state(self) -> str:
        """Return the user state that is learned after the medium, or ""."""
        return "" if self.medium.label == IGNORE_INDEX else f"state {self.medium.label}"

    @property
    def facts(self) -> str:
        return ", ".join(filter(None, (f"{self.medium.length:,} tokens", self.extent, self.state)))


@dataclass(frozen=True)
class InspectorEntry:
    sample_id: int
    where: str  # file:line
    id: str
    status: Status
    planned: int  # planned tokens, by which the run orders samples
    kinds: tuple[str, ...]  # kinds of media, each once; empty: text only
    reason: str = ""  # why the record is not trained on, or only in part
    raw: str = ""  # text of a record that is not trained on
    pieces: tuple[Piece | Box, ...] = ()
    num_tokens: int = 0
    num_learned: int = 0
    num_unlearned: int = 0  # answers that are read and not learned, because the record says so
    num_removed: int = 0  # answers whose thoughts the template leaves out
    answers: tuple[AnswerText, ...] = ()  # that are compared, behind the prompt in `pieces`

    @property
    def boxes(self) -> list[Box]:
        return [piece for piece in self.pieces if isinstance(piece, Box)]


def entry_of(dataset: MultimodalDataset, i: int, quarantined: dict[int, QuarantineRow]) -> InspectorEntry:
    """Return the entry of sample `i`; `quarantined` are the rows of the run's quarantine.jsonl by sample."""
    item, planned = dataset[i], int(dataset.lengths[i])
    row = quarantined.get(i)
    if row is not None or isinstance(item, Rejected):
        return _rejected(dataset, i, planned, item, row)
    record = dataset.record(i)
    encoded = dataset.template.encode(record)
    answers = answer_texts(item, dataset.template.tokenizer)
    rounds, dropped = (1, 0) if answers else _rounds(encoded, item)
    notes = [f"{dropped} of {rounds} rounds dropped: they do not fit"] if dropped else []
    notes += ["a first turn of the assistant was dropped: nobody had asked"] if record.num_dropped_turns else []
    return InspectorEntry(
        sample_id=i,
        where=record.where,
        id=record.id,
        status="shortened" if notes else "trained",
        planned=planned,
        kinds=_kinds(record),
        reason="; ".join(notes),
        pieces=tuple(_pieces(prompt_of(item), record, dataset.media(i, record), dataset.template, encoded)),
        num_tokens=len(item.input_ids),
        num_learned=sum(answer.num_tokens for answer in answers) or int((item.labels != IGNORE_INDEX).sum()),
        num_unlearned=record.num_unlearned,
        num_removed=encoded.removed,
        answers=answers,
    )


def _rejected(
    dataset: MultimodalDataset, i: int, planned: int, item: Sample | Rejected, row: QuarantineRow | None
) -> InspectorEntry:
    _, index, number = dataset.locate(i)
    try:
        record: Record | None = dataset.record(i, timed=False)
    except RecordError:
        record = None
    try:
        raw = json.dumps(index.raw(number), indent=1, ensure_ascii=False, default=lambda value: f"({type(value).__name__})")
    except RecordError as error:
        raw = error.reason
    status: Status = "bad"
    reason, name = "", record.id if record else ""
    if isinstance(item, Rejected):
        status, reason, name = "too long" if item.too_long else "bad", item.reason, item.id or name
    if row is not None:
        status, reason, name = "quarantined", f"at step {row['step']}: {row['reason']}", name or row["id"]
    more = f"\n... {len(raw) - RAW_LIMIT:,} characters more" if len(raw) > RAW_LIMIT else ""
    kinds = _kinds(record) if record else ()
    return InspectorEntry(i, index.where(number), name, status, planned, kinds, reason, raw[:RAW_LIMIT] + more)


def _kinds(record: Record) -> tuple[str, ...]:
    return tuple(dict.fromkeys(ref.kind for ref in record.media))


def _rounds(encoded: Encoded, sample: Sample) -> tuple[int, int]:
    """Return the rounds of the record, and how many of them the sample left out at its end."""
    lengths = [medium.length for found in sample.media.values() for medium in found]
    kept = len(sample.input_ids) - sum(lengths) + len(lengths)  # each medium is one id before it is expanded
    return len(encoded.round_ends), sum(end > kept for end in encoded.round_ends)


def _pieces(sample: Sample, record: Record, media: RecordMedia, template: Template, encoded: Encoded) -> Iterator[Piece | Box]:
    """Yield all text pieces and media of the sample in order."""
    learned = [False, *(sample.labels[:-1] != IGNORE_INDEX).tolist()]  # labels are shifted: position t says what t + 1 is
    boxes = sorted(boxes_of(sample, record, media), key=lambda box: box.medium.start)
    answers = _answers(record, template, encoded.input_ids, boxes)[: len(learned)] if record.num_unlearned else learned
    ids, at = sample.input_ids.tolist(), 0
    for start, box in [*((box.medium.start, box) for box in boxes), (len(ids), None)]:
        part = slice(at, start)
        yield from token_pieces(template.tokenizer, ids[part], learned[part], ids[max(at - 1, 0) : at], answers[part])
        if box is not None:
            yield box
            at = start + box.medium.length


def _answers(record: Record, template: Template, ids: list[int], boxes: list[Box]) -> list[bool]:
    """Return which tokens would be learned if the record excluded no answers from the loss; `ids` are the record's."""
    other = template.encode(replace(record, turns=tuple(replace(turn, learn=True) for turn in record.turns)))
    answers = np.zeros(len(ids), dtype=bool)
    # The ids are nearly always the same; white space at the start of an answer may be tokenised in two ways.
    matcher = difflib.SequenceMatcher(None, other.input_ids, ids, autojunk=False)
    for theirs, ours, length in [(0, 0, len(ids))] if ids == other.input_ids else matcher.get_matching_blocks():
        answers[ours : ours + length] = other.supervised[theirs : theirs + length]
    widths = np.ones(len(ids), dtype=np.int64)
    placeholders = np.flatnonzero(np.isin(ids, list(template.placeholder_ids.values())))
    widths[placeholders[: len(boxes)]] = [box.medium.length for box in boxes]
    return np.repeat(answers, widths).tolist()


def boxes_of(sample: Sample, record: Record, media: RecordMedia) -> Iterator[Box]:
    """Yield the media that `sample` kept of `record`, by modality."""
    for modality, found in sample.media.items():
        refs = [ref for ref in record.media if ref.modality == modality]
        for medium, ref in zip(found, refs):  # media of dropped rounds have no place in the sample
            grid = media.measure(ref).grid if medium.kind == "image" else (len(medium.values), 1)
            yield Box(shorten(ref.path), medium, media.specs[modality], grid, ref.span)
