"""Collating of samples into one `Batch`. All that the model looks up by position is computed here, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.sample import Sample, SampleMedia
from model.batch import IGNORE_INDEX, Batch, Media
from model.media_spec import ONE_ROW
from model.patch_layout import patch_layout

BLANK = -1  # sample id and source id of a row that is only padding


def collate(samples: Sequence[Sample], pad_id: int, side: Literal["right", "left"] = "right") -> Batch:
    """Collate samples into one row each, as long as the longest sample (T) and padded on `side`.

    Training pads on the right, prompts for generation on the left. No samples give one row of one pad token, which supervises
    nothing and has no mask: a rank without work runs it like any other. Positions count real tokens. Rows of media come in reading
    order: by sample, then by place in it.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    num_rows, width = max(len(samples), 1), max([*lengths, 1])
    input_ids = np.full((num_rows, width), pad_id, dtype=np.int64)
    labels = np.full((num_rows, width), IGNORE_INDEX, dtype=np.int64)
    mask = np.zeros((num_rows, width), dtype=np.int64)
    starts = [width - length if side == "left" else 0 for length in lengths]
    for row, (sample, start, length) in enumerate(zip(samples, starts, lengths)):
        input_ids[row, start : start + length] = sample.input_ids
        labels[row, start : start + length] = sample.labels
        mask[row, start : start + length] = 1
    positions = np.maximum(mask.cumsum(1) - 1, 0) if side == "left" else np.tile(np.arange(width), (num_rows, 1))
    if any(sample.positions is not None for sample in samples):
        positions = np.repeat(positions[None], 3, axis=0)
        for row, (sample, start, length) in enumerate(zip(samples, starts, lengths)):
            positions[:, row, start : start + length] = own_positions(sample, 3)
    supervised = np.flatnonzero(labels != IGNORE_INDEX)
    media = _media(samples, [row * width + start for row, start in enumerate(starts)])
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        attention_mask=torch.from_numpy(mask) if samples and not mask.all() else None,
        position_ids=torch.from_numpy(positions),
        supervised=torch.from_numpy(supervised),
        owners=torch.from_numpy(supervised // width),
        **_names(samples),
        media=media,
        pictures=picture_runs(media, np.arange(num_rows + 1) * width),
    )


def collate_packed(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Collate samples one after the other into one row (1, T), T their tokens together: no padding, no mask.

    Positions start anew with every sample, and `segment_lengths` tells the attention where each one ends. The last position of a
    sample has no target, so no label reaches over a border. No samples give one segment of one pad token.
    """
    ids = [sample.input_ids for sample in samples] or [np.array([pad_id])]
    lengths = [len(part) for part in ids]
    borders = np.cumsum([0, *lengths])
    labels = np.concatenate([sample.labels for sample in samples] or [np.array([IGNORE_INDEX])])
    supervised = np.flatnonzero(labels != IGNORE_INDEX)
    media = _media(samples, borders[:-1].tolist())
    return Batch(
        input_ids=torch.from_numpy(np.concatenate(ids)[None]),
        labels=torch.from_numpy(labels[None]),
        attention_mask=None,
        position_ids=torch.from_numpy(packed_positions(samples, lengths)),
        supervised=torch.from_numpy(supervised),
        owners=torch.from_numpy(np.searchsorted(borders, supervised, side="right") - 1),
        **_names(samples),
        segment_lengths=tuple(lengths),
        segment_borders=torch.from_numpy(borders.astype(np.int32)),
        media=media,
        pictures=picture_runs(media, borders),
    )


def picture_runs(media: Mapping[str, Media], borders: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Return the first flat position and the length of each run of pictures' tokens; none goes over one of `borders`, which rows or
    segments have between them.
    """
    if (seen := media.get("image")) is None:
        return ()
    slots = np.sort(seen.slots.numpy())
    begins = np.flatnonzero(np.diff(slots, prepend=-2) != 1)
    begins = np.union1d(begins, np.flatnonzero(np.isin(slots, borders)))
    lengths = np.diff(begins, append=len(slots))
    return tuple(zip(slots[begins].tolist(), lengths.tolist()))


def own_positions(sample: Sample, axes: int) -> np.ndarray:
    """Return the positions of a sample's tokens (axes, T): its own, or 0, 1, 2 ... on all axes."""
    return np.tile(np.arange(len(sample.input_ids)), (axes, 1)) if sample.positions is None else sample.positions


def packed_positions(samples: Sequence[Sample], lengths: Sequence[int]) -> np.ndarray:
    """Return the positions (1, T) of a packed row, which start anew with every sample; (3, 1, T) where one has three axes."""
    if any(sample.positions is not None for sample in samples):
        return np.concatenate([own_positions(sample, 3) for sample in samples], axis=1)[:, None]
    return np.concatenate([np.arange(length) for length in lengths])[None]


class _Names(TypedDict):
    """Fields of `Batch` that name its samples."""

    sample_ids: Tensor
    source_ids: Tensor
    lengths: tuple[int, ...]


def _names(samples: Sequence[Sample]) -> _Names:
    return {
        "sample_ids": torch.tensor([sample.sample_id for sample in samples] or [BLANK]),
        "source_ids": torch.tensor([sample.source_id for sample in samples] or [BLANK]),
        "lengths": tuple(len(sample.input_ids) for sample in samples),
    }


def _media(samples: Sequence[Sample], offsets: list[int]) -> dict[str, Media]:
    """Collect the media by modality; offsets[i] is the flat position of the first token of sample i."""
    found: dict[str, list[tuple[int, SampleMedia]]] = {}
    for sample, offset in zip(samples, offsets):
        for modality, media in sample.media.items():
            found.setdefault(modality, []).extend((offset + medium.start, medium) for medium in media)
    return {modality: _joined(placed) for modality, placed in found.items()}


def _joined(placed: list[tuple[int, SampleMedia]]) -> Media:
    """Join all media of one modality. No padding becomes a token."""
    media = [medium for _, medium in placed]
    slots = torch.cat([_slots(first, medium) for first, medium in placed])
    values = _values(media)
    width = max(medium.width for medium in media)
    firsts = np.cumsum([0, *(len(medium.values) // (medium.native.shrink**2 if medium.native else 1) for medium in media)])
    moved = [_moved(medium, first, width, int(firsts[-1])) for medium, first in zip(media, firsts)]
    frames = [count for medium in media for count in medium.frames]
    weighted = any(medium.weights is not None for medium in media)
    if weighted:  # each token is a sum of four rows
        moved = [rows if rows.ndim == 2 else np.repeat(rows[:, None], 4, axis=1) for rows in moved]
    return Media(
        values,
        torch.from_numpy(np.concatenate(moved)),
        slots,
        lengths=torch.tensor(frames) if frames else None,
        ends=torch.tensor([first + medium.length - 1 for first, medium in placed]),
        labels=torch.tensor([medium.label for medium in media]),
        weights=torch.from_numpy(np.concatenate([_weights(medium) for medium in media])) if weighted else None,
        patches=None if media[0].native is None else patch_layout([medium.grid for medium in media], media[0].native),
    )


def _slots(first: int, medium: SampleMedia) -> Tensor:
    """Return the flat positions of a medium's features; its first token stands at `first`."""
    return torch.arange(first, first + medium.length) if medium.places is None else torch.from_numpy(medium.places + first)


def _values(media: Sequence[SampleMedia]) -> Tensor:
    """Join the encoder's input: clips filled with zeros to the longest, still pictures repeated over frames beside videos."""
    if media[0].native is not None:
        frames = max(medium.values.shape[2] for medium in media)
        return torch.cat([medium.values.expand(-1, -1, frames, -1, -1) for medium in media])
    longest = max(medium.values.shape[-1] for medium in media)
    return torch.cat([_filled(medium.values, longest) for medium in media])


def _weights(medium: SampleMedia) -> np.ndarray:
    """Return the weights (K, 4) float32 of a medium's tokens, also of a medium each token of which is one row."""
    return np.tile(np.array(ONE_ROW, dtype=np.float32), (len(medium.rows), 1)) if medium.weights is None else medium.weights


def _moved(medium: SampleMedia, first: int, width: int, num_rows: int) -> np.ndarray:
    """Return the medium's rows among all rows of the batch, `num_rows` encoder rows of `width` each; its own begin at `first`."""
    row, place = np.divmod(medium.rows, medium.width)
    return np.where(medium.rows < 0, num_rows * width - 1 - medium.rows, (first + row) * width + place)


def _filled(rows: Tensor, width: int) -> Tensor:
    """Pad rows to (n, ..., width) with zeros behind; rows of pictures are as wide already, and are not copied."""
    missing = width - rows.shape[-1]
    return F.pad(rows, (0, missing)) if missing else rows
