"""Check of one record, as far as possible without decoding its media: every problem, its exact length, what it holds.

Checks of a whole dataset (`data.check.check_dataset`) and of a few records at the start of a run both use this module.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from data.check.certificate import encode_proven, prove_encoded
from data.check.check_medium import CheckedMedium, MediumCheck, hash_key
from data.dataset import MultimodalDataset
from data.preference.sample import measure_answers, with_rejected
from data.records.fields import record_line
from data.records.placeholders import without_placeholders
from data.records.record import Record, RecordError
from data.sample import Measured, measure_encoded
from data.text.rounds import TooLongError
from data.text.steps import Steps, take_together
from model.media_spec import MediaMeta, num_tokens

BAD, TOO_LONG = "bad", "too_long"
TOGETHER, TOGETHER_CHARACTERS = 64, 1 << 20
"""Most samples that are checked together; and characters after which no further one is taken, because all are held in memory."""
IN_FULL = 64
"""One record of so many is proven in full, whatever was proven of its layout."""
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


LOOK_TOKENS, LOOK_CHARACTERS = 1 << 15, 1 << 15
"""Most tokens that are counted of a record that does not fit, to tell what length would hold it. Of a longer record so many
characters are tokenised, and the others are taken to be like them."""


@dataclass(frozen=True)
class Checked:
    """Facts about one record."""

    problems: tuple[Problem, ...] = ()
    size: Measured | None = None  # None for a record without a length
    text: int = 0  # 64-bit hash, equal for equal conversations; 0 for a record that cannot be read
    words: int = 0  # the same hash without regard to case, spaces, punctuation and placeholders; 0 if not asked for
    media: tuple[CheckedMedium, ...] = ()
    whole: int = 0  # tokens of all rounds, also of a record that is too long; 0 where they were not counted
    unlearned: int = 0  # answers that are read and not learned, because the record says so
    removed: int = 0  # answers that the template shortens: it leaves out the thoughts before the last question


@dataclass(frozen=True)
class Depth:
    """Depth of a check: what is examined beside records and headers."""

    decode: bool = False  # decode every medium in full
    near: bool = False  # compare what pictures look like, and words
    keys: bool = True  # give records keys, by which equal ones are found


SHALLOW = Depth()


def check_record(dataset: MultimodalDataset, i: int, depth: Depth = SHALLOW) -> Checked:
    """Check sample `i` alone, as `check_records` does."""
    (found,) = check_records(dataset, (i,), depth)
    return found


def check_records(
    dataset: MultimodalDataset, ids: Iterable[int], depth: Depth = SHALLOW, on_media: Callable[[str], object] = lambda at: None
) -> Iterator[Checked]:
    """Check the samples `ids`: yield, in their order, all that is wrong with each, and what it holds. Raises nothing of its own.

    Up to TOGETHER of them are read, then take every step together, which takes a third less time. `on_media` is called with the
    place of each record whose media are next.
    """
    works: list[Steps[Checked]] = []
    characters = 0
    for i in ids:
        read = _read(dataset, i)
        works.append(_steps(dataset, i, read, depth, on_media))
        if isinstance(read, Record):
            characters += _size(read)
        if len(works) == TOGETHER or characters > TOGETHER_CHARACTERS:
            yield from take_together(works)
            works, characters = [], 0
    yield from take_together(works)


def _size(record: Record) -> int:
    """Return about how many characters of text a record holds."""
    turns = record.turns + record.rejected
    rare = [turn.extra for turn in turns if turn.extra] + [*record.tools]  # thoughts, calls of tools
    paths = sum([len(ref.path) for ref in record.media])
    return sum([len(turn.content) for turn in turns]) + paths + sum(map(len, map(repr, rare)))


def _read(dataset: MultimodalDataset, i: int) -> Record | Problem:
    """Read the record of sample `i`, or find why it cannot be read."""
    try:
        return dataset.record(i, timed=False)
    except Exception as error:
        return _problem(dataset, i, error)


def _steps(
    dataset: MultimodalDataset, i: int, record: Record | Problem, depth: Depth, on_media: Callable[[str], object]
) -> Steps[Checked]:
    """Check what was read of sample `i`, step by step. Raises nothing of its own."""
    if isinstance(record, Problem):
        return Checked((record,))
    if record.media:
        on_media(record.where)
    seen = _check_media(dataset, i, record, depth)
    record, metas, problems = seen.record, seen.metas, seen.problems
    yield
    size, whole, removed, is_too_long = None, 0, 0, False
    try:
        if not seen.is_untimed:
            size, removed = yield from _measured(dataset, i, record, metas)
        whole = size.whole if size else 0
    except Exception as error:
        whole = getattr(error, "whole", 0)
        problems.append(_problem(dataset, i, error))
        is_too_long = isinstance(error, TooLongError)
    if not whole and (size or is_too_long) and len(metas) == len(record.media):
        whole = _whole_length(dataset, record, metas)
    yield
    text_keys = _text_key(record) if depth.keys else 0, _words_key(record) if depth.keys and depth.near else 0
    return Checked(tuple(problems), size, *text_keys, tuple(seen.found), whole, unlearned=record.num_unlearned, removed=removed)


@dataclass(frozen=True)
class _MediaSeen:
    """Results of the check of a record's media, without their bytes: 64 records are held at a time."""

    record: Record  # with the times of its frames, where texts tell them
    found: list[CheckedMedium]
    metas: list[MediaMeta]
    problems: list[Problem]
    is_untimed: bool = False  # times are told, and could not be read


def _check_media(dataset: MultimodalDataset, i: int, record: Record, depth: Depth) -> _MediaSeen:
    """Check all media of a record."""
    media = dataset.media(i, record)
    seen = _MediaSeen(record, [], [], [])
    for ref in record.media:
        medium = MediumCheck(dataset, i, media, ref)
        try:
            medium.run(depth.decode, depth.near)
        except Exception as error:
            seen.problems.append(_problem(dataset, i, error))
        seen.found.append(medium.found())
        seen.metas.extend([] if medium.meta is None else [medium.meta])
    if seen.problems:
        return seen
    try:
        return replace(seen, record=media.timed())
    except Exception as error:
        return replace(seen, problems=[_problem(dataset, i, error)], is_untimed=True)


def _measured(dataset: MultimodalDataset, i: int, record: Record, metas: list[MediaMeta]) -> Steps[tuple[Measured | None, int]]:
    """Prove the record's ids and return its size, None without the sizes of all its media, and how many answers are shortened."""
    template, limit, in_full = dataset.template, dataset.config.max_length, i % IN_FULL == 0
    sized = len(metas) == len(record.media)
    counts = [num_tokens(dataset.specs[ref.modality], meta) for ref, meta in zip(record.media, metas)]
    if dataset.answers != "one":
        for one in (record, *([with_rejected(record)] if record.rejected else [])):
            encode_proven(template, one, in_full=in_full)
        answers = dataset.encode_answers(i, record)
        return measure_answers(answers, template, record, counts, limit) if sized else None, answers.encoded.removed
    encoded = yield from template.encoding(record, limit)
    prove_encoded(template, record, encoded, limit, in_full=in_full)
    return measure_encoded(encoded, template.placeholder_ids, record, counts, limit) if sized else None, encoded.removed


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


def _text_key(record: Record) -> int:
    """Hash all that a record says, media by their kind and settings only."""
    turns = [[turn.role, turn.content, turn.learn, dict(turn.extra)] for turn in (*record.turns, *record.rejected)]
    marks = [[ref.kind, ref.span, ref.label] for ref in record.media]
    return hash_key(json.dumps([turns, marks, record.negative_turn, record.interrupted, record.tools]).encode())


def _words_key(record: Record) -> int:
    """Hash the words that a record says, without regard to case, spaces, punctuation and placeholders."""
    texts = [
        (turn.role, turn.content + json.dumps(dict(turn.extra), ensure_ascii=False) if turn.extra else turn.content)
        for turn in record.turns
    ]
    texts += [("tools", json.dumps(tool, ensure_ascii=False)) for tool in record.tools]
    return hash_key(json.dumps([[role, _WORD.findall(without_placeholders(text).casefold())] for role, text in texts]).encode())
