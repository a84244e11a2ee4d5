"""A rendered record becomes a sample: placeholders take their media's tokens, labels are shifted, too long ones are cut by rounds.

Training and `data.processor` both come through here, so a model sees at inference what it saw in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from data.image import MediaError
from data.record import MediaRef, Record, RecordError
from data.template import Encoded
from model.batch import IGNORE_INDEX, MediaMeta, MediaSpec, num_tokens


@dataclass(frozen=True)
class SampleMedia:
    """One medium and the positions its features take: [start, start + length)."""

    values: Tensor  # (n, 3, S, S) float32
    start: int
    length: int


@dataclass(frozen=True)
class Sample:
    sample_id: int  # index over all sources
    source_id: int
    input_ids: np.ndarray  # (T,) int64, placeholders expanded
    labels: np.ndarray  # (T,) int64, shifted: the target of position t, or IGNORE_INDEX
    media: dict[str, list[SampleMedia]]  # by modality, in reading order


class TooLongError(RecordError):
    """Not even the first round of a record fits."""


def assemble(
    record: Record,
    encoded: Encoded,
    placeholder_ids: dict[str, int],
    specs: dict[str, MediaSpec],
    read: Callable[[MediaRef], Tensor],
    *,
    max_length: int | None,
    sample_id: int,
    source_id: int,
) -> Sample:
    """The sample of a record that its template rendered as `encoded`, where each placeholder is still one id.

    `read` gives the values (n, 3, S, S) of a medium; it is asked only for media that are kept. With a `max_length`, whole
    rounds are dropped from the end until the rest fits, and their media with them. Raises `RecordError`; `TooLongError`
    if the first round does not fit.
    """
    ids = np.array(encoded.input_ids, dtype=np.int64)
    at = np.flatnonzero(np.isin(ids, list(placeholder_ids.values())))
    widths = np.ones(len(ids), dtype=np.int64)
    widths[at] = [num_tokens(specs[ref.modality], MediaMeta()) for ref in record.media]
    ends = np.cumsum(widths)
    kept = len(ids) if max_length is None else _fitting(record, ends, encoded.round_ends, max_length)
    media: dict[str, list[SampleMedia]] = {}
    for position, ref in zip(at[at < kept], record.media):
        start, length = int(ends[position] - widths[position]), int(widths[position])
        media.setdefault(ref.modality, []).append(SampleMedia(_read(record, ref, read), start, length))
    expanded = np.repeat(ids[:kept], widths[:kept])
    supervised = np.repeat(np.array(encoded.supervised[:kept], dtype=bool), widths[:kept])
    return Sample(sample_id, source_id, expanded, _shifted(expanded, supervised), media)


def check_media(record: Record, specs: dict[str, MediaSpec], max_images: int) -> None:
    """Raises `RecordError` for media that no part reads, or for more than `max_images` of them (0: no limit)."""
    for ref in record.media:
        if ref.modality not in specs:
            raise RecordError(record.where, record.id, ref.modality, "the record has one, the model has no part that reads it")
    if 0 < max_images < len(record.media):
        raise RecordError(record.where, record.id, "image", f"{len(record.media)} images; data.max_images allows {max_images}")


def _fitting(record: Record, ends: np.ndarray, round_ends: Sequence[int], max_length: int) -> int:
    """How many of the unexpanded ids are kept; ends[i] is the expanded length up to and including id i."""
    if len(ends) == 0 or ends[-1] <= max_length:
        return len(ends)
    fitting = [stop for stop in round_ends if ends[stop - 1] <= max_length]
    if not fitting:
        reason = f"the first round takes {ends[round_ends[0] - 1]} tokens, data.max_length is {max_length}"
        raise TooLongError(record.where, record.id, "conversations", reason)
    return max(fitting)


def _read(record: Record, ref: MediaRef, read: Callable[[MediaRef], Tensor]) -> Tensor:
    try:
        return read(ref)
    except MediaError as error:
        raise RecordError(record.where, record.id, ref.modality, str(error)) from error


def _shifted(ids: np.ndarray, supervised: np.ndarray) -> np.ndarray:
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
    labels[:-1] = np.where(supervised[1:], ids[1:], IGNORE_INDEX)
    return labels
