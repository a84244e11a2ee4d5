"""Samples of rendered records: placeholders take their media's tokens, labels are shifted, too long ones are cut by rounds.

Training and `data.processor` both use this module, so a model sees at inference what it saw in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from torch import Tensor

from data.media.record_media import RecordMedia
from data.positions import FeatureRun, feature_places, feature_runs, positions_of, write_inside
from data.records.record import MediaRef, Record, RecordError
from data.text.rounds import TooLongError
from data.text.template import Encoded
from model.batch import IGNORE_INDEX
from model.media_spec import (
    AudioSpec,
    MediaMeta,
    MediaSpec,
    NativeSpec,
    num_tokens,
    row_frames,
    row_width,
    token_rows,
    token_weights,
)


@dataclass(frozen=True)
class SampleMedia:
    """One medium and the tokens that it takes: [start, start + length). All are features, but those inside it at other `places`."""

    kind: str  # image | video | audio
    values: Tensor  # (n, ...) encoder rows: (n, 3, S, S) pixels or (n, M, F) log-mel
    start: int
    length: int
    rows: np.ndarray  # (length,) or (length, 4) int64 which projected rows each token is, see `model.media_spec.token_rows`
    width: int  # rows L that the encoder and its projector make of each of `values`, including rows of padding
    frames: tuple[int, ...] = ()  # (n,) valid mel frames of each row
    label: int = IGNORE_INDEX  # user state after the medium
    weights: np.ndarray | None = None  # (length, 4) float32, weights of the rows of each token
    places: np.ndarray | None = None  # (K,) int64 where its K features stand among its tokens; None: all of them are features
    native: NativeSpec | None = None  # of a picture or video at its own size, a row of whose values is one patch
    grid: tuple[int, int, int] = (1, 1, 1)  # its patches: pairs of frames, down and across


@dataclass(frozen=True)
class Sample:
    """One record as token ids, labels and encoder input."""

    sample_id: int  # index over all sources
    source_id: int
    input_ids: np.ndarray  # (T,) int64, placeholders expanded
    labels: np.ndarray  # (T,) int64, shifted: the target of position t, or IGNORE_INDEX
    media: dict[str, list[SampleMedia]]  # by modality, in reading order
    positions: np.ndarray | None = None  # (3, T) int64 for a language model with positions of three axes; None: 0, 1, 2 ...


@dataclass(frozen=True)
class Measured:
    """Length of a sample, known before its media are decoded."""

    length: int  # tokens in all
    supervised: int  # targets
    media: int  # tokens of media
    whole: int = 0  # tokens of all rounds, those included that do not fit; 0 where they were not counted
    removed: int = 0  # answers that the template shortens, see `data.text.encoded.Encoded`


def assemble_sample(
    encoded: Encoded, placeholder_ids: dict[str, int], media: RecordMedia, *, max_length: int | None, sample_id: int, source_id: int
) -> Sample:
    """Assemble the sample of a record that its template rendered as `encoded`, where each placeholder is still one id.

    Every medium is measured, and decoded only if it is kept. With a `max_length`, whole rounds are dropped from the end until the
    rest fits, and their media with them. Raises `RecordError`; `TooLongError` if the first round does not fit.
    """
    ids = np.array(encoded.input_ids, dtype=np.int64)
    at = np.flatnonzero(_is_medium(ids, placeholder_ids))
    record, specs = media.record, media.specs
    refs = record.media[: len(at)]  # media of rounds that cannot fit are not even measured
    metas = [media.measure(ref) for ref in refs]
    widths = np.ones(len(ids), dtype=np.int64)
    widths[at] = [num_tokens(specs[ref.modality], meta) for ref, meta in zip(refs, metas)]
    ends = np.cumsum(widths)
    kept = len(ids) if max_length is None else _fitting(record, ends, encoded, max_length)
    placed: dict[str, list[SampleMedia]] = {}
    expanded = np.repeat(ids[:kept], widths[:kept])
    runs: list[FeatureRun] = []
    for position, ref, meta in zip(at[at < kept], refs, metas):
        start, spec = int(ends[position] - widths[position]), specs[ref.modality]
        placed.setdefault(ref.modality, []).append(_placed(spec, ref, meta, media.load(ref, meta), start))
        write_inside(expanded, start, ref.kind, spec, meta, media.inside)
        if isinstance(spec, NativeSpec):
            runs += feature_runs(start, spec, meta)
    supervised = np.repeat(np.array(encoded.supervised[:kept], dtype=bool), widths[:kept])
    has_axes = any(isinstance(spec, NativeSpec) and spec.axes == 3 for spec in specs.values())
    positions = positions_of(len(expanded), runs) if has_axes else None
    return Sample(sample_id, source_id, expanded, _shifted(expanded, supervised), placed, positions)


def measure_encoded(
    encoded: Encoded, placeholder_ids: dict[str, int], record: Record, counts: Sequence[int], max_length: int
) -> Measured:
    """Measure what `assemble` would make of a record whose first media take `counts` tokens each.

    Raises `TooLongError` as it does.
    """
    length = len(encoded.input_ids) + sum(counts) - len(counts)
    if length <= max_length and len(encoded.round_ends) >= encoded.num_rounds:  # all of it fits
        return Measured(length, sum(encoded.supervised[1:]), sum(counts), length, encoded.removed)
    ids = np.array(encoded.input_ids, dtype=np.int64)
    is_medium = _is_medium(ids, placeholder_ids)
    widths = np.ones(len(ids), dtype=np.int64)
    widths[is_medium] = counts[: int(is_medium.sum())]
    ends = np.cumsum(widths)
    kept = _fitting(record, ends, encoded, max_length)
    media = int(widths[:kept][is_medium[:kept]].sum())
    return Measured(int(ends[kept - 1]), sum(encoded.supervised[1:kept]), media, _whole(ends, encoded), encoded.removed)


def _is_medium(ids: np.ndarray, placeholder_ids: dict[str, int]) -> np.ndarray:
    """Return which ids are placeholders, (T,) bool; a comparison each, as there are few: `np.isin` sorts first."""
    found = np.zeros(len(ids), dtype=bool)
    for id in placeholder_ids.values():
        found |= ids == id
    return found


def _placed(spec: MediaSpec, ref: MediaRef, meta: MediaMeta, values: Tensor, start: int) -> SampleMedia:
    """Make the medium that stands at `start` of the expanded ids."""
    frames = row_frames(spec, meta) if isinstance(spec, AudioSpec) else ()
    width = row_width(spec, values.shape[-1])
    rows = _fixed_rows(spec, meta, width) if meta.size == (0, 0) else token_rows(spec, meta, width)
    length, weights, places = num_tokens(spec, meta), token_weights(spec, meta), feature_places(spec, meta)
    found = SampleMedia(ref.kind, values, start, length, rows, width, frames, ref.label, weights, places)
    return replace(found, native=spec, grid=meta.patches) if isinstance(spec, NativeSpec) else found


@lru_cache(maxsize=64)
def _fixed_rows(spec: MediaSpec, meta: MediaMeta, width: int) -> np.ndarray:
    """Return `token_rows` of media that are mostly alike, once for all of them; nobody may write into it."""
    rows = token_rows(spec, meta, width)
    rows.flags.writeable = False
    return rows


def check_media(record: Record, specs: dict[str, MediaSpec], max_images: int) -> None:
    """Raise `RecordError` for media and states that no part reads, or for more than `max_images` images (0: no limit)."""
    for ref in record.media:
        if ref.modality not in specs:
            raise RecordError(record.where, record.id, ref.kind, "the record has one, the model has no part that reads it")
        spec = specs[ref.modality]
        # A model without a state head does not read the class, and may share the file.
        classes = spec.num_states if isinstance(spec, AudioSpec) else 0
        if ref.label != IGNORE_INDEX and ref.label >= classes > 0:
            problem = f"{ref.label} is no class: model.state_head.classes = {classes}, so they are 0 to {classes - 1}"
            raise RecordError(record.where, record.id, "audio_state", problem)
    num_images = sum(ref.kind == "image" for ref in record.media)
    if 0 < max_images < num_images:
        raise RecordError(record.where, record.id, "image", f"{num_images} images; data.max_images allows {max_images}")


def _fitting(record: Record, ends: np.ndarray, encoded: Encoded, max_length: int) -> int:
    """Return how many of the unexpanded ids are kept; ends[i] is the expanded length up to and including id i.

    Raises `TooLongError` if no round with an answer to learn fits.
    """
    if len(ends) == 0 or ends[-1] <= max_length:
        return len(ends)
    fitting = [stop for stop in encoded.round_ends if ends[stop - 1] <= max_length]
    reason = f"the first round takes {ends[encoded.round_ends[0] - 1]} tokens"
    if fitting and not any(encoded.supervised[: max(fitting)]):
        fitting, reason = [], "no round that fits has an answer to learn"
    if not fitting:
        error = TooLongError(record.where, record.id, "conversations", f"{reason}, data.max_length is {max_length}")
        error.whole = _whole(ends, encoded)
        raise error
    return max(fitting)


def _whole(ends: np.ndarray, encoded: Encoded) -> int:
    """Return the tokens of all rounds, or 0 where the last ones were not tokenised."""
    return int(ends[-1]) if len(encoded.round_ends) >= encoded.num_rounds else 0


def _shifted(ids: np.ndarray, supervised: np.ndarray) -> np.ndarray:
    """Return the labels: at each position the next id if it is supervised, else IGNORE_INDEX."""
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int64)
    labels[:-1] = np.where(supervised[1:], ids[1:], IGNORE_INDEX)
    return labels
