"""Synthetic samples as large as a run allows, for a plan made where the data are not available."""

from __future__ import annotations

import math

import numpy as np
import torch

from data.config import DataConfig
from data.media.pixel_budget import largest_meta
from data.sample import Sample, SampleMedia
from model.batch import IGNORE_INDEX
from model.media_spec import (
    AudioSpec,
    MediaMeta,
    MediaSpec,
    NativeSpec,
    least_frames,
    num_tokens,
    row_frames,
    row_shape,
    row_width,
    token_rows,
)
from trainer.config import RunConfig
from trainer.records.run_data import RunData


def build_synthetic_samples(config: RunConfig, data: RunData) -> list[Sample]:
    """Build a micro-batch of samples of data.max_length tokens, for the media that the model reads.

    Each sample has an image of one view and a clip of one window, where the model reads them; half of its other tokens are
    supervised. An image at its own size is the largest that is allowed and fits. A clip that is not filled up to the window lasts
    data.max_seconds at most.
    """
    length = config.data.max_length
    count = max(1, config.batch.micro_batch_tokens // length) if config.data.packing else config.batch.micro_batch_size
    return [_sample(i, config.data, data.card.specs) for i in range(count)]


def _sample(i: int, config: DataConfig, specs: dict[str, MediaSpec]) -> Sample:
    """Build one sample with a medium of each modality that still fits into data.max_length tokens."""
    media, start, length = {}, 0, config.max_length
    for modality, spec in specs.items():
        if isinstance(spec, NativeSpec):
            made = _picture(spec, start, largest_meta(spec, config, length - start - 2), config)
        else:
            made = _medium(modality, spec, start, config.max_seconds)
        if start + made.length < length:
            media[modality] = [made]
            start += made.length
    ids = np.zeros(length, dtype=np.int64)
    labels = np.where(np.arange(length) < start + (length - start) // 2, IGNORE_INDEX, ids)
    axes = max((spec.axes for spec in specs.values() if isinstance(spec, NativeSpec)), default=1)
    return Sample(i, 0, ids, labels, media, np.tile(np.arange(length), (axes, 1)) if axes > 1 else None)


def _picture(spec: NativeSpec, start: int, meta: MediaMeta, config: DataConfig) -> SampleMedia:
    """Build one blank picture at its own size that begins at token `start`."""
    shape = (math.prod(meta.patches), 3, 1, spec.patch, spec.patch)
    values = torch.zeros(shape, dtype=torch.uint8 if config.image_decode == "fast" else torch.float32)
    rows = token_rows(spec, meta, 1)
    return SampleMedia("image", values, start, num_tokens(spec, meta), rows, 1, native=spec, grid=meta.patches)


def _medium(modality: str, spec: MediaSpec, start: int, max_seconds: float) -> SampleMedia:
    """Build one blank medium that begins at token `start`; a clip is at most `max_seconds` long."""
    frames = 0
    if isinstance(spec, AudioSpec):
        longest = max(least_frames(spec), int(max_seconds * spec.sampling_rate) // spec.hop)
        frames = spec.window_frames if spec.full_window else min(spec.window_frames, longest)
    meta = MediaMeta(num_frames=frames)
    width = row_width(spec, frames)
    values = torch.zeros(1, *row_shape(spec), dtype=torch.float32 if frames else torch.uint8)
    if isinstance(spec, AudioSpec):
        values = torch.zeros(1, spec.num_mels, frames)
    lengths = row_frames(spec, meta) if isinstance(spec, AudioSpec) else ()
    return SampleMedia(modality, values, start, num_tokens(spec, meta), token_rows(spec, meta, width), width, lengths)
