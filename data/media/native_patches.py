"""Packed patches of pictures and frames at their own size: bit for bit the rows that the families' processors cut.

The values equal those of the processors with the PIL back end. (The processors of clips have none: they resize by torchvision,
whose bytes differ from Pillow's.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from PIL import Image

from data.media.image_decode import Picture, Size
from data.media.native_size import NativeRule, patch_grid

_CHANNEL_FIRST, _CHANNEL_LAST = (0, 2, 5, 3, 6, 8, 1, 4, 7), (0, 2, 5, 3, 6, 1, 4, 7, 8)
"""Order of axes in patches, of (t, frame, rows of blocks, row in block, y, blocks, column in block, x, channel)."""


def fitted_frame(picture: Picture, size: Size, rule: NativeRule) -> Image.Image:
    """Resize a decoded picture to the `size` that `fitted_size` or `fitted_video_size` picked."""
    return picture.image.resize(size, rule.resample, picture.box)


def to_patches(frames: Sequence[Image.Image], rule: NativeRule, *, as_bytes: bool = False) -> np.ndarray:
    """Cut the RGB frames of one picture or clip, all of one fitted size, into normalised patches, (t * h * w, values) float32.

    A row holds, in this order: qwen (3, frames, patch, patch), pixtral (3, patch, patch), naflex (patch, patch, 3). Rows go along
    the width, then down, then on in time; with qwen block by block, a block being the merge x merge patches of a token. The last
    frame is repeated to fill the last patches. Raises ValueError for frames that are not fitted.

    as_bytes: uint8, neither rescaled nor normalised; of a single frame each byte stands once, as if rule.frames were 1, and the
    reader repeats it.
    """
    cut = _cut(frames, rule)
    return (cut if as_bytes else _normalised(cut, rule)).reshape(math.prod(cut.shape[:5]), -1)


def _cut(frames: Sequence[Image.Image], rule: NativeRule) -> np.ndarray:
    """Return the bytes of patches (t, rows of blocks, blocks, row in block, column in block, ...), the rest as in a row."""
    depth, block = (1 if len(frames) == 1 else rule.frames), (rule.merge if rule.name == "qwen" else 1)
    t, h, w = patch_grid(frames[0].size, rule, len(frames))
    full = [*frames, *[frames[-1]] * (t * depth - len(frames))]
    pixels = np.stack([np.asarray(frame) for frame in full])  # (t * depth, H, W, 3)
    parts = pixels.reshape(t, depth, h // block, block, rule.patch, w // block, block, rule.patch, 3)
    return np.ascontiguousarray(parts.transpose(_CHANNEL_LAST if rule.name == "naflex" else _CHANNEL_FIRST))


def _normalised(cut: np.ndarray, rule: NativeRule) -> np.ndarray:
    """Return the values of bytes; a single frame is repeated over the frames of a patch.

    As in data/media/image.py, a byte has 256 values, so one table per channel is enough.
    """
    if rule.name == "naflex":
        return tables_of(rule)[np.arange(3), cut]
    values = np.empty((*cut.shape[:6], rule.frames, *cut.shape[7:]), dtype=np.float32)
    for channel, table in enumerate(tables_of(rule)):
        values[:, :, :, :, :, channel] = table[cut[:, :, :, :, :, channel]]
    return values


class Normalising(Protocol):
    """The numbers by which bytes of pixels become the values that a tower was trained on."""

    @property
    def rescale(self) -> float: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...


@lru_cache(maxsize=8)
def tables_of(rule: Normalising) -> np.ndarray:
    """Return the value that each byte becomes in each channel, (3, 256) float32, computed as the processors do.

    They multiply by rule.rescale in float64, then subtract the mean and divide by the deviation in float32.
    """
    levels = (np.arange(256, dtype=np.float64) * rule.rescale).astype(np.float32)
    mean, std = np.array(rule.mean, dtype=np.float32), np.array(rule.std, dtype=np.float32)
    return (levels - mean[:, None]) / std[:, None]
