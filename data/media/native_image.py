"""Pictures at their own size: from a path in a record to packed patches, resized as the family's processor resizes them."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.config import DataConfig
from data.media import image
from data.media import image_decode as decode
from data.media.blob import Blob
from data.media.image_decode import Picture, Size
from data.media.native_patches import tables_of
from data.media.native_size import NativeRule, fitted_size
from data.records.record import MediaRef
from model.media_spec import MediaMeta, NativeSpec


@lru_cache(maxsize=8)
def rule_of(spec: NativeSpec, config: DataConfig) -> NativeRule:
    """Return the rule by which pictures are resized: the model's own, within the pixels that the run file allows."""
    return NativeRule(
        spec.resize,
        spec.patch,
        spec.mean,
        spec.std,
        merge=spec.multiple,
        frames=spec.frames,
        min_pixels=spec.min_pixels,
        max_pixels=spec.max_pixels,
        longest=spec.longest,
        max_patches=spec.max_patches,
        resample=spec.resample,
        rescale=spec.rescale,
    )


def measure(blob: Blob, ref: MediaRef, spec: NativeSpec, config: DataConfig, num_media: int) -> MediaMeta:
    """Return the patches of a picture, by its header. Raises MediaError."""
    width, height = fitted_size(image.size(blob, spec, config), rule_of(spec, config))
    return MediaMeta(patches=(1, height // spec.patch, width // spec.patch))


def with_line_ends(meta: MediaMeta, spec: NativeSpec, ids: tuple[int, ...]) -> MediaMeta:
    """Return the facts of a picture with token ids inside it: ids[0] behind each line of features, ids[1] behind the last one."""
    times, high, wide = meta.patches
    lines, width = times * high // spec.shrink, wide // spec.shrink
    breaks = (*[ids[:1]] * (lines - 1), ids[1:])
    return replace(meta, inside=tuple(((line + 1) * width, found) for line, found in enumerate(breaks)))


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
    for channel, table in enumerate(tables_of(spec)):
        np.take(table, cut[:, channel], out=values[:, channel], mode="clip")
    return torch.from_numpy(values)
