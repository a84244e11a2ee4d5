"""Encoder inputs turned back into pictures for a page: pixels unchanged, log-mel rows as drawings."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.sample import SampleMedia
from model.media_spec import ImageSpec

EXACT_SIDE = 128
"""Pictures up to this many pixels wide are kept bit for bit, as PNG; larger ones become JPEG, a tenth of the bytes."""
QUALITY = 92


class Album:
    """Pictures as data: addresses, until they have taken `limit` bytes together."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used, self.num_left_out = limit, 0, 0

    @property
    def full(self) -> str:
        """Return the text that a page shows in place of a medium that has no room."""
        return f"left out: the pictures of this source fill the {self.limit / 2**20:.3g} MiB they may take; ask for fewer samples"

    def add(self, made: Callable[[], list[str]]) -> list[str]:
        """Return the addresses of one medium; [] if there is no room for all of them. After that, no medium is encoded."""
        if self.num_left_out or self.used + sum(map(len, addresses := made())) > self.limit:
            self.num_left_out += 1
            return []
        self.used += sum(map(len, addresses))
        return addresses


def pixels(values: Tensor, spec: ImageSpec) -> np.ndarray:
    """Convert encoder rows (n, 3, H, W) to bytes (n, H, W, 3): bytes unchanged, floats without their normalisation."""
    if values.dtype != torch.uint8:
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (spec.mean, spec.std))
        values = ((values.double() * std + mean) / spec.rescale).round().clamp(0, 255).to(torch.uint8)
    return values.permute(0, 2, 3, 1).numpy()


def seen_views(medium: SampleMedia, spec: ImageSpec) -> np.ndarray:
    """Return the pictures (n, H, W, 3) of bytes that the tower sees of a medium; those cut into patches are put together again."""
    if medium.native is None:
        return pixels(medium.values, spec)
    (times, high, wide), group, side = medium.grid, spec.shrink, spec.patch
    depth = medium.values.shape[2]
    parts = pixels(medium.values.transpose(1, 2).flatten(0, 1), spec)
    parts = parts.reshape(times, high // group, wide // group, group, group, depth, side, side, 3)
    return parts.transpose(0, 5, 1, 3, 6, 2, 4, 7, 8).reshape(times * depth, high * side, wide * side, 3)


def picture_address(view: np.ndarray) -> str:
    """Encode bytes (H, W, 3) as a data: address."""
    image = Image.fromarray(np.ascontiguousarray(view))
    if max(image.size) <= EXACT_SIDE:
        return _address(image, "png")
    return _address(image, "jpeg", quality=QUALITY, subsampling=0)


def sound_address(row: Tensor, num_frames: int) -> str:
    """Draw a log-mel row (M, F) as a data: address: time to the right, pitch upwards, louder is brighter; padding is grey."""
    values = row.flip(0).double().numpy()
    heard = values[:, :num_frames]
    low, high = (float(heard.min()), float(heard.max())) if heard.size else (0.0, 0.0)
    levels = ((values - low) / max(high - low, 1e-9) * 127).round().clip(0, 127).astype(np.uint8)
    levels[:, num_frames:] += 128
    image = Image.fromarray(levels)
    image.putpalette(_palette())  # grey levels become places in the palette
    return _address(image, "png")


def _palette() -> list[int]:
    """Return 128 colours from night blue over magenta to pale yellow, then 128 greys."""
    stops = np.array([[12, 10, 40], [96, 24, 110], [200, 60, 84], [250, 150, 50], [252, 250, 190]], dtype=np.float64)
    at = np.linspace(0, len(stops) - 1, 128)
    ramp = np.stack([np.interp(at, np.arange(len(stops)), stops[:, c]) for c in range(3)], axis=1)
    grey = np.repeat(np.linspace(120, 200, 128)[:, None], 3, axis=1)
    return [int(value) for value in np.concatenate([ramp, grey]).round().ravel()]


def _address(image: Image.Image, format: str, **options: int) -> str:
    out = io.BytesIO()
    image.save(out, format, **options)
    return f"data:image/{format};base64,{base64.b64encode(out.getvalue()).decode()}"
