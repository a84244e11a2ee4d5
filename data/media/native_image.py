"""Pictures at their own size: from a path in a record to packed patches, resized as the family's processor resizes them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.config import DataConfig
from data.media import image
from data.media import image_decode as decode
from data.media.blob import Blob
from data.media.image_decode import Picture, Size
from data.media.pixel_budget import picture_size
from data.records.record import MediaRef
from model.media_spec import MediaMeta, NativeSpec


def measure(blob: Blob, ref: MediaRef, spec: NativeSpec, config: DataConfig, num_media: int) -> MediaMeta:
    """Return the patches of a picture, by its header. Raises MediaError."""
    return picture_meta(image.size(blob, spec, config), spec, config, num_media)


def picture_meta(size: Size, spec: NativeSpec, config: DataConfig, num_media: int) -> MediaMeta:
    """Return the patches of a picture of `size` among the `num_media` pictures of its record. Raises MediaError."""
    width, height = picture_size(size, spec, config, num_media)
    return MediaMeta(patches=(1, height // spec.patch, width // spec.patch))


def load(blob: Blob, ref: MediaRef, spec: NativeSpec, config: DataConfig, meta: MediaMeta) -> Tensor:
    """Decode a picture to patches (P, 3, F, p, p): float32 normalised, or uint8 with F = 1 if decoded fast. Raises MediaError."""
    _, high, wide = meta.patches
    size = (wide * spec.patch, high * spec.patch)
    needed = (lambda _: size) if config.image_decode == "fast" else None
    picture = decode.decode(blob, lambda size: image.judge(blob.name, size, spec, config), needed)
    return patches_of([resized(picture, size, spec)], spec, config)


def resized(picture: Picture, size: Size, spec: NativeSpec) -> Image.Image:
    """Resize a picture to whole patches, with the filter of the model's processor."""
    return picture.image.resize(size, spec.resample, picture.box)


def patches_of(frames: list[Image.Image], spec: NativeSpec, config: DataConfig) -> Tensor:
    """Cut RGB frames of one size into patches (P, 3, F, p, p), in the order of `model.patch_layout.patch_places`.

    The last frame is repeated until its patches are full; a still picture has F = 1 and is repeated where it is embedded.
    """
    depth = 1 if len(frames) == 1 else spec.frames
    times = -(-len(frames) // depth)
    full = [*frames, *[frames[-1]] * (times * depth - len(frames))]
    pixels = np.stack([np.asarray(frame) for frame in full])  # (times * depth, H, W, 3)
    high, wide, group, side = frames[0].height // spec.patch, frames[0].width // spec.patch, spec.shrink, spec.patch
    parts = pixels.reshape(times, depth, high // group, group, side, wide // group, group, side, 3)
    cut = parts.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3, depth, side, side)
    if config.image_decode == "fast":
        return torch.from_numpy(np.ascontiguousarray(cut))
    values = np.empty(cut.shape, dtype=np.float32)
    for channel, table in enumerate(image.level_tables(spec)):
        np.take(table, cut[:, channel], out=values[:, channel], mode="clip")
    return torch.from_numpy(values)
