"""Check of one record, as far as possible without decoding its media: every problem, its exact length, what it holds.

Checks of a whole dataset (`data.check.check_dataset`) and of a few records at the start of a run both use this module.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass, replace

from data.check.certificate import encode_proven
from data.check.picture_hash import picture_hash
from data.dataset import MultimodalDataset, root_of
from data.media import image
from data.media.blob import Blob, MediaError, inline_blob
from data.media.record_media import RecordMedia
from data.media.sound import is_unsized
from data.records.fields import record_line
from data.records.placeholders import without_placeholders
from data.records.record import MediaRef, Record, RecordError
from data.sample import Measured, measure_encoded
from data.text.rounds import TooLongError
from model.media_spec import AudioSpec, MediaMeta, MediaSpec, image_spec, num_tokens

BAD, TOO_LONG = "bad", "too_long"
_SAMPLED = 4096  # bytes at the start, in the middle and at the end that stand for a file's content
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Problem:
    """Reason why a record is not trained on as it is written."""

    kind: str  # bad | too_long: long records are counted separately and never stop a run
    where: str  # file:line
    id: str
    field: str
    reason: str

    @property
    def is_bad(self) -> bool:
        return self.kind == BAD

    def __str__(self) -> str:
        """Return the problem as one line that is safe to print."""
        return record_line(self.where, self.id, self.field, self.reason)


@dataclass(frozen=True)
class CheckedMedium:
    """Facts about one medium; zeros for facts that could not be found out."""

    kind: str  # image | video | audio
    watched: str = ""  # path of its file, or "" where the records' own file holds it
    tokens: int = 0
    rows: int = 0  # views of a picture, frames of a video
    width: int = 0  # pixels, of a picture
    height: int = 0
    milliseconds: int = 0  # of a clip
    content: int = 0  # 64-bit hash of the size and parts of the bytes, equal for equal bytes
    unsized: bool = False  # a WAV file that does not say how long it is
    picture: int = 0  # 64-bit hash, alike for pictures that look alike; 0 if not asked for


LOOK_TOKENS, LOOK_CHARACTERS = 1 << 15, 1 << 15
"""Most tokens that are counted of a record that does not fit, to tell what length would hold it. Of a longer record so many
characters are tokenised, and the others are taken to be like them."""


@dataclass(frozen=True)
class Checked:
    """Facts about one record."""

    problems: tuple[Problem, ...] = ()
    size: Measured | None = None  # None for a record without a length
    text: int = 0  # 64-bit hash, equal for equal conversations; 0 for a record that cannot be read
    words: int = 0  # the same hash without regard to case, spaces, punctuation and placeholders
    media: tuple[CheckedMedium, ...] = ()
    whole: int = 0  # tokens of all rounds, also of a record that is too long; 0 where they were not counted
    unlearned: int = 0  # answers that are read and not learned, because the record says so
    removed: int = 0  # answers that the template shortens: it leaves out the thoughts before the last question


def check_record(dataset: MultimodalDataset, i: int, *, decode: bool = False, near: bool = False, keys: bool = True) -> Checked:
    """Check sample `i`: return all that is wrong with it, and what it holds. Never raises.

    decode: media are decoded in full. near: pictures are decoded small, to be compared with others. keys: the record's texts get
    keys, by which they are compared with others; for a long text the keys cost more than all the rest.
    """
    try:
        record = dataset.record(i)
    except Exception as error:
        return Checked((_problem(dataset, i, error),))
    media = dataset.media(i, record)
    media = replace(media, locate=functools.cache(media.locate))
    problems: list[Problem] = []
    found: list[CheckedMedium] = []
    metas: list[MediaMeta] = []
    for ref in record.media:
        medium = CheckedMedium(ref.kind, _watched(dataset, i, ref))
        try:
            meta = media.measure(ref)
            metas.append(meta)
            medium = _sized(medium, media.specs[ref.modality], meta)
            medium = _examined(media, ref, meta, medium, decode, near)
        except Exception as error:
            problems.append(_problem(dataset, i, error))
        found.append(medium)
    size, whole, removed, is_too_long = None, 0, 0, False
    try:
        encoded = encode_proven(dataset.template, record, dataset.config.max_length)
        removed = encoded.removed
        if len(metas) == len(record.media):
            counts = [num_tokens(dataset.specs[ref.modality], meta) for ref, meta in zip(record.media, metas)]
            size = measure_encoded(encoded, dataset.template.placeholder_ids, record, counts, dataset.config.max_length)
            whole = size.whole
    except Exception as error:
        whole = getattr(error, "whole", 0)
        problems.append(_problem(dataset, i, error))
        is_too_long = isinstance(error, TooLongError)
    if not whole and (size or is_too_long) and len(metas) == len(record.media):
        whole = _whole_length(dataset, record, metas)
    text_keys = (_text_key(record), _words_key(record)) if keys else (0, 0)
    return Checked(tuple(problems), size, *text_keys, tuple(found), whole, unlearned=record.num_unlearned, removed=removed)


def _whole_length(dataset: MultimodalDataset, record: Record, metas: list[MediaMeta]) -> int:
    """Return the tokens of all rounds of a record that is not trained on whole; of a huge one an estimate."""
    limit = max(2 * dataset.config.max_length, LOOK_TOKENS)
    try:
        encoded = dataset.template.encode(record, limit)
    except TooLongError:
        encoded = None
    except RecordError:  # a round that is not trained on breaks a rule
        return dataset.config.max_length + 1
    media = sum(num_tokens(dataset.specs[ref.modality], meta) for ref, meta in zip(record.media, metas))
    if encoded is not None and len(encoded.round_ends) >= encoded.num_rounds:
        return len(encoded.input_ids) - len(metas) + media
    return max(limit + 1, _extrapolated(dataset, record) + media)


def _extrapolated(dataset: MultimodalDataset, record: Record) -> int:
    """Estimate the tokens of all words of a record, as if the others were as long as its first ones."""
    texts, size = [turn.content for turn in record.turns], 0
    shown: list[str] = []
    for text in texts:
        shown.append(text[: LOOK_CHARACTERS - size])
        size += len(shown[-1])
        if size >= LOOK_CHARACTERS:
            break
    counted = sum(map(len, dataset.template.tokenizer(shown, add_special_tokens=False, verbose=False)["input_ids"]))
    return -(-counted * sum(map(len, texts)) // max(1, size))


def _problem(dataset: MultimodalDataset, i: int, error: Exception) -> Problem:
    """Make a problem of any error, with the record's place: a fault of a reader must not end a check of a million other records."""
    if isinstance(error, RecordError):
        kind = TOO_LONG if isinstance(error, TooLongError) else BAD
        return Problem(kind, error.where, error.id, error.field, error.reason)
    _, index, row = dataset.locate(i)
    return Problem(BAD, index.where(row), index.name(row), "record", f"cannot be used: {type(error).__name__}: {error}")


def _watched(dataset: MultimodalDataset, i: int, ref: MediaRef) -> str:
    """Return the path of the medium's file as it is named, links unresolved; "" if the file is unknown or in an archive.

    When that file changes, the result for the medium is stale.
    """
    source_id, index, row = dataset.locate(i)
    try:
        if inline_blob(ref.path) is not None or index.blob(row, ref) is not None:
            return ""
        root = root_of(dataset.sources[source_id], ref)
    except MediaError:
        return ""
    return os.path.abspath(os.path.join(root, ref.path)).replace("\0", "")


def _sized(medium: CheckedMedium, spec: MediaSpec, meta: MediaMeta) -> CheckedMedium:
    milliseconds = meta.num_frames * spec.hop * 1000 // spec.sampling_rate if isinstance(spec, AudioSpec) else 0
    return replace(medium, tokens=num_tokens(spec, meta), rows=meta.num_rows, milliseconds=milliseconds)


def _examined(media: RecordMedia, ref: MediaRef, meta: MediaMeta, medium: CheckedMedium, decode: bool, near: bool) -> CheckedMedium:
    """Return the medium with what its bytes tell. Raises `RecordError`."""
    media.check(ref)
    if decode:
        media.load(ref, meta)
    blob = media.locate(ref)
    try:
        if ref.kind == "image":
            width, height = image.size(blob, image_spec(media.specs), media.config)
            picture = picture_hash(blob) if near else 0
            medium = replace(medium, width=width, height=height, picture=picture)
        elif ref.kind == "audio":
            medium = replace(medium, unsized=is_unsized(blob))
    except MediaError as error:
        raise RecordError(media.record.where, media.record.id, ref.kind, str(error)) from error
    return replace(medium, content=_content_key(blob))


def _content_key(blob: Blob) -> int:
    """Hash a medium's bytes: equal bytes have equal keys. For a folder, the names and sizes of its files stand for the bytes."""
    if blob.is_folder:
        with os.scandir(blob.path) as entries:
            names = sorted((entry.name, entry.stat().st_size) for entry in entries)
        return _key(json.dumps(names).encode())
    return _key(blob.num_bytes().to_bytes(8, "little") + blob.sampled(_SAMPLED))


def _text_key(record: Record) -> int:
    """Hash all that a record says, media by their kind and settings only."""
    turns = [[turn.role, turn.content, turn.learn, dict(turn.extra)] for turn in record.turns]
    marks = [[ref.kind, ref.span, ref.label] for ref in record.media]
    return _key(json.dumps([turns, marks, record.negative_turn, record.interrupted, record.tools]).encode())


def _words_key(record: Record) -> int:
    """Hash the words that a record says, without regard to case, spaces, punctuation and placeholders."""
    texts = [(turn.role, turn.content + json.dumps(dict(turn.extra) or "", ensure_ascii=False)) for turn in record.turns]
    texts += [("tools", json.dumps(tool, ensure_ascii=False)) for tool in record.tools]
    return _key(json.dumps([[role, _WORD.findall(without_placeholders(text).casefold())] for role, text in texts]).encode())


def _key(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
