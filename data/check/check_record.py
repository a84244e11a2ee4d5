"""Check of one record, as far as possible without decoding its media: every problem, its exact length, what it holds.

Checks of a whole dataset (`data.check.check_dataset`) and of a few records at the start of a run both use this module.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from data.check.certificate import encode_proven
from data.check.check_medium import CheckedMedium, MediumCheck, hash_key
from data.dataset import MultimodalDataset
from data.preference.sample import measure_answers, with_rejected
from data.records.fields import record_line
from data.records.placeholders import without_placeholders
from data.records.record import Record, RecordError
from data.sample import Measured, measure_encoded
from data.text.rounds import TooLongError
from model.media_spec import MediaMeta, num_tokens

BAD, TOO_LONG = "bad", "too_long"
TOGETHER, TOGETHER_CHARACTERS = 32, 1 << 20
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


def check_record(dataset: MultimodalDataset, i: int, *, decode: bool = False, near: bool = False, keys: bool = True) -> Checked:
    """Check sample `i` alone, as `check_records` does."""
    (found,) = check_records(dataset, (i,), decode=decode, near=near, keys=keys)
    return found


def check_records(
    dataset: MultimodalDataset,
    ids: Iterable[int],
    *,
    decode: bool = False,
    near: bool = False,
    keys: bool = True,
    on_media: Callable[[str], object] = lambda at: None,
) -> Iterator[Checked]:
    """Check the samples `ids`: yield, in their order, all that is wrong with each, and what it holds. Raises nothing of its own.

    decode: media are decoded in full. near: pictures are decoded small and words get a key, to find records that are nearly the
    same. keys: records get keys, by which those that are the same are found. `on_media` is called with the place of each record
    whose media are next.

    A step is taken with up to TOGETHER samples before the next step: code and tables of a step stay in the processor's cache then,
    where one sample after the other took a third more time.
    """
    together: list[_Check | Checked] = []
    characters = 0
    for i in ids:
        together.append(one := _begin(dataset, i))
        characters += one.characters if isinstance(one, _Check) else 0
        if len(together) == TOGETHER or characters > TOGETHER_CHARACTERS:
            yield from _finished(together, decode, near, keys, on_media)
            together, characters = [], 0
    yield from _finished(together, decode, near, keys, on_media)


def _begin(dataset: MultimodalDataset, i: int) -> _Check | Checked:
    """Read sample `i`; return the result if it cannot be read."""
    try:
        return _Check(dataset, i, dataset.record(i, timed=False))
    except Exception as error:
        return Checked((_problem(dataset, i, error),))


def _finished(
    together: Sequence[_Check | Checked], decode: bool, near: bool, keys: bool, on_media: Callable[[str], object]
) -> Iterator[Checked]:
    """Take the steps after reading, each with all samples; yield the results."""
    begun = [one for one in together if isinstance(one, _Check)]
    for one in begun:
        one.look(decode, near, on_media)
    for one in begun:
        one.measure()
    for found in together:
        yield found.result(keys, near) if isinstance(found, _Check) else found


class _Check:
    """Check of sample `i`, whose record could be read, in steps that never raise."""

    def __init__(self, dataset: MultimodalDataset, i: int, record: Record) -> None:
        self._dataset, self._i, self._record = dataset, i, record
        self._media = dataset.media(i, record)
        self._problems: list[Problem] = []
        self._found: list[CheckedMedium] = []
        self._metas: list[MediaMeta] = []
        self._size: Measured | None = None
        self._whole = self._removed = 0

    @property
    def characters(self) -> int:
        """Return the characters that the record holds, with the media inside it."""
        return sum([len(turn.content) for turn in self._record.turns]) + sum([len(ref.path) for ref in self._record.media])

    def look(self, decode: bool, near: bool, on_media: Callable[[str], object]) -> None:
        """Check every medium."""
        if self._record.media:
            on_media(self._record.where)
        for ref in self._record.media:
            medium = MediumCheck(self._dataset, self._i, self._media, ref)
            try:
                medium.run(decode, near)
            except Exception as error:
                self._problems.append(_problem(self._dataset, self._i, error))
            self._found.append(medium.found())
            self._metas += [] if medium.meta is None else [medium.meta]

    def measure(self) -> None:
        """Prove and count the record's ids."""
        is_too_long, metas = False, self._metas
        try:
            self._record = record = self._record if self._problems else self._media.timed()
            self._size, self._removed = _measured(self._dataset, self._i, record, metas)
            self._whole = self._size.whole if self._size else 0
        except Exception as error:
            self._whole = getattr(error, "whole", 0)
            self._problems.append(_problem(self._dataset, self._i, error))
            is_too_long = isinstance(error, TooLongError)
        if not self._whole and (self._size or is_too_long) and len(metas) == len(self._record.media):
            self._whole = _whole_length(self._dataset, self._record, metas)

    def result(self, keys: bool, near: bool) -> Checked:
        """Return what was found, with the record's keys if `keys`, and of them the one of its words if `near`."""
        record, counts = self._record, (self._whole, self._record.num_unlearned, self._removed)
        text_keys = _text_key(record) if keys else 0, _words_key(record) if keys and near else 0
        return Checked(tuple(self._problems), self._size, *text_keys, tuple(self._found), *counts)


def _measured(dataset: MultimodalDataset, i: int, record: Record, metas: list[MediaMeta]) -> tuple[Measured | None, int]:
    """Prove the record's ids and return its size, None without the sizes of all its media, and how many answers are shortened."""
    template, limit, in_full = dataset.template, dataset.config.max_length, i % IN_FULL == 0
    sized = len(metas) == len(record.media)
    counts = [num_tokens(dataset.specs[ref.modality], meta) for ref, meta in zip(record.media, metas)]
    if dataset.answers != "one":
        for one in (record, *([with_rejected(record)] if record.rejected else [])):
            encode_proven(template, one, in_full=in_full)
        answers = dataset.encode_answers(i, record)
        return measure_answers(answers, template, record, counts, limit) if sized else None, answers.encoded.removed
    encoded = encode_proven(template, record, limit, in_full=in_full)
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
