"""Pictures: from a path in a record to the pixels its vision tower was trained on.

The pixels are those of the Hugging Face processors with the PIL back end for what `load_image` returns, bit for bit: CLIP (shortest
edge, centre crop), SigLIP (both edges at once), LLaVA (padded to a square of the mean colour), InternVL (tiles) and LLaVA-NeXT
(anyres).

With data.image_decode = "fast" they stay bytes, which the model normalises (`model.vision.normalise`), and a large JPEG is
decoded at a fraction of its size, with the same geometry; the error is stated in docs/benchmarks.md.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import anyres
from data.config import DataConfig
from data.media import image_decode as decode
from data.media import image_truncation
from data.media import tiling as tiles
from data.media.blob import Blob, MediaError
from data.media.image_decode import Picture, Size
from data.media.image_fit import needed_size, resized_size, views, whole
from data.records.record import MediaRef
from model.media_spec import ImageSpec, MediaMeta

MAX_GROWTH = 4
"""Padding or resizing may make a picture this many times `max_pixels`: a strip of 1 x 60 million pixels would become a square."""


def measure(blob: Blob, ref: MediaRef, spec: ImageSpec, config: DataConfig, num_media: int) -> MediaMeta:
    """Rows of a picture among `num_media` of its sample, by its header; one row needs no look at the file. Raises MediaError."""
    if config.image_fit == "anyres" and num_media == 1:
        return anyres.plan(size(blob, spec, config), spec.size, config)
    if config.image_fit != "tiles":
        return MediaMeta()
    max_tiles = tiles.budget(config.max_tiles, num_media)
    return tiles.plan(size(blob, spec, config), spec.size, config.min_tiles, max_tiles, config.thumbnail)


def load(blob: Blob, ref: MediaRef, spec: ImageSpec, config: DataConfig, meta: MediaMeta) -> Tensor:
    """Pixels (meta.num_rows, 3, S, S), S = spec.size: float32 normalised, or uint8 if decoded fast. Raises MediaError.

    config.image_fit: pad (to a square of the mean colour first, as LLaVA) | square (the tower's own processor: CLIP crops, SigLIP
    distorts) | tiles (distorted to whole tiles, row by row; then all of it in one, if there are several and config.thumbnail) |
    anyres (all of it distorted to one view, then tiles of its own aspect in black; one of several pictures as pad).
    """
    config = config if meta.num_rows > 1 else one_view(config)
    needed = (lambda size: needed_size(size, spec, config.image_fit, meta)) if config.image_decode == "fast" else None
    picture = decode.decode(blob, lambda size: judge(blob.name, size, spec, config), needed)
    return _rows(views(picture, spec, config.image_fit, meta), spec, config)


def one_view(config: DataConfig) -> DataConfig:
    """How a frame, or one of several pictures, is seen: anyres cuts only what is alone, as LLaVA-NeXT does, and pads the rest."""
    return replace(config, image_fit="pad") if config.image_fit == "anyres" else config


def frame_rows(picture: Image.Image, spec: ImageSpec, config: DataConfig) -> Tensor:
    """Pixels (1, 3, S, S), typed as `load` types them, of a decoded RGB picture as one view: a frame is never cut into tiles."""
    config = one_view(config)
    return _rows([whole(Picture.of(picture), spec, config.image_fit)], spec, config)


def size(blob: Blob, spec: ImageSpec, config: DataConfig) -> Size:
    """Width and height of the upright picture, by its header. Raises MediaError for sizes that `load` refuses."""
    return decode.header_size(blob, lambda size: judge(blob.name, size, spec, config))


def check_file(blob: Blob) -> None:
    """Raises MediaError unless the header is that of a picture and the file is whole, as its markers tell. Decodes nothing."""
    with decode.opened(blob) as (stream, picture):
        if missing := image_truncation.MISSING[str(picture.format)](stream, blob.num_bytes()):
            raise MediaError(f"{blob.name!r} is cut short or damaged: {missing}")


def judge(name: str, size: Size, spec: ImageSpec, config: DataConfig) -> None:
    """Raises MediaError for a picture or a frame that is too large, or too narrow to be fitted."""
    width, height = size
    limit = config.max_pixels
    if width * height > limit:
        raise MediaError(f"{name!r} is {width} x {height} = {width * height} pixels; data.max_pixels allows {limit}")
    resized_width, resized_height = resized_size(size, spec, config.image_fit)
    # Pillow brings a picture to its new width first, at its old height.
    grown = max(size) ** 2 if config.image_fit == "pad" else resized_width * max(height, resized_height)
    if grown > MAX_GROWTH * max(limit, spec.size**2):
        raise MediaError(f"{name!r} is {width} x {height}: so narrow that fitting it takes {grown} pixels")


def _rows(squares: list[Image.Image], spec: ImageSpec, config: DataConfig) -> Tensor:
    """(n, 3, S, S) of n RGB squares: bytes if decoded fast, else float32 as the processors compute it.

    They do: times spec.rescale in float64; minus mean, over std in float32. A byte has 256 values, so a channel is one table.
    """
    planes = [[np.asarray(plane) for plane in square.split()] for square in squares]
    if config.image_decode == "fast":
        return torch.from_numpy(np.array(planes))
    levels = (np.arange(256, dtype=np.float64) * spec.rescale).astype(np.float32)
    mean, std = np.array(spec.mean, dtype=np.float32), np.array(spec.std, dtype=np.float32)
    tables = (levels - mean[:, None]) / std[:, None]
    pixels = np.empty((len(squares), 3, spec.size, spec.size), dtype=np.float32)
    for row, channels in enumerate(planes):
        for channel, plane in enumerate(channels):
            np.take(tables[channel], plane, out=pixels[row, channel], mode="clip")  # "raise" would copy `out` first
    return torch.from_numpy(pixels)
