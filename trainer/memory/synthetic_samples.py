"""Synthetic samples as large as a run allows, for a plan made where the data are not available."""

from __future__ import annotations

import numpy as np
import torch

from data.sample import Sample, SampleMedia
from model.batch import IGNORE_INDEX
from model.media_spec import AudioSpec, MediaMeta, MediaSpec, num_tokens, row_frames, row_shape, row_width, token_rows
from trainer.config import RunConfig
from trainer.records.run_data import RunData


def build_synthetic_samples(config: RunConfig, data: RunData) -> list[Sample]:
    """Build a micro-batch of samples of data.max_length tokens, for the media that the model reads.

    Each sample has an image of one view and a clip of one window, where the model reads them; half of its other tokens are
    supervised.
    """
    length = config.data.max_length
    count = max(1, config.batch.micro_batch_tokens // length) if config.data.packing else config.batch.micro_batch_size
    return [_sample(i, length, data.card.specs) for i in range(count)]


def _sample(i: int, length: int, specs: dict[str, MediaSpec]) -> Sample:
    """Build one sample with a medium of each modality that still fits into `length` tokens."""
    media, start = {}, 0
    for modality, spec in specs.items():
        made = _medium(modality, spec, start)
        if start + made.length < length:
            media[modality] = [made]
            start += made.length
    ids = np.zeros(length, dtype=np.int64)
    labels = np.where(np.arange(length) < start + (length - start) // 2, IGNORE_INDEX, ids)
    return Sample(i, 0, ids, labels, media)


def _medium(modality: str, spec: MediaSpec, start: int) -> SampleMedia:
    """Build one blank medium that begins at token `start`."""
    frames = spec.window_frames if isinstance(spec, AudioSpec) else 0
    meta = MediaMeta(num_frames=frames)
    width = row_width(spec, frames)
    values = torch.zeros(1, *row_shape(spec), dtype=torch.float32 if frames else torch.uint8)
    if isinstance(spec, AudioSpec):
        values = torch.zeros(1, spec.num_mels, frames)
    lengths = row_frames(spec, meta) if isinstance(spec, AudioSpec) else ()
    return SampleMedia(modality, values, start, num_tokens(spec, meta), token_rows(spec, meta, width), width, lengths)
