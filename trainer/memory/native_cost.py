"""Cost of pictures and videos at their own size: a patch costs what it costs, and attention over a whole picture grows with it."""

from __future__ import annotations

import numpy as np

from data.dataset import MultimodalDataset
from data.index.token_estimate import media_tokens
from model.llm.causal_lm import blocks
from model.media_spec import READ_BY, NativeSpec
from model.vision.native_tower import NativeTower

KINDS = tuple(kind for kind, modality in READ_BY.items() if modality == "image")


def planned_patches(spec: NativeSpec, dataset: MultimodalDataset) -> np.ndarray:
    """Return the patches (N,) float32 of each sample's pictures and videos together, before anything is decoded.

    What a sample's planned length differs from its estimate is put down to them: where lengths are exact, patches nearly are.
    """
    usual = media_tokens(dataset.specs, dataset.config)
    counts = {kind: _counts(dataset, kind) for kind in KINDS}
    estimate = np.concatenate([index.lengths for index in dataset.indexes]).astype(np.int64)
    tokens = sum(counts[kind] * usual[kind] for kind in KINDS) + dataset.lengths - estimate
    num = sum(counts.values())
    found: np.ndarray = np.where(num > 0, np.clip(tokens, num, np.maximum(num, dataset.lengths)), 0)
    return (found * spec.shrink**2).astype(np.float32)


def attention_work(encoder: NativeTower, spec: NativeSpec, dataset: MultimodalDataset, patches: np.ndarray) -> np.ndarray:
    """Return the work of attention at a patch (N,), in units of the products of weights there.

    A patch attends to those of its window in most blocks where there are windows, else to those of its picture or pair of frames:
    the mean of the sample's.
    """
    times = -(-dataset.config.max_frames // spec.frames)
    frames = _counts(dataset, "image") + times * _counts(dataset, "video")
    layers = blocks(encoder.tower)
    weights = sum(p.numel() for p in layers.parameters())
    whole = len(getattr(encoder.tower, "whole_blocks", layers)) if spec.window else len(layers)
    window = (spec.window // spec.patch) ** 2
    spans = whole * patches / np.maximum(frames, 1) + (len(layers) - whole) * window
    # Scores and their sum of values: as many products as a matrix of 2 x width x span.
    found: np.ndarray = 2.0 * encoder.hidden_size / encoder.levels * spans / weights
    return found


def _counts(dataset: MultimodalDataset, kind: str) -> np.ndarray:
    return np.concatenate([index.num_media(kind) for index in dataset.indexes]).astype(np.int64)
