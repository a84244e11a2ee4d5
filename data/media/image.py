"""Pictures: from a path in a record to the pixels its vision tower was trained on.

The pixels equal, bit for bit, those that the Hugging Face processors with the PIL back end make of `load_image`'s result: CLIP
(shortest edge, centre crop), SigLIP (both edges at once), LLaVA (padded to a square of the mean colour), InternVL (tiles) and
LLaVA-NeXT (anyres).

With data.image_decode = "fast" the pixels stay bytes, which the model normalises (`model.vision.normalise`), and a large JPEG is
decoded at a fraction of its size, with the same geometry; the error is stated in docs/benchmarks.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.config import DataConfig
from data.media import image_decode as decode
from data.media import image_truncation
from data.media import tiling as tiles
from data.media.blob import Blob, MediaError, sampled_bytes
from data.media.idefics_tiles import first_size, plan_idefics
from data.media.image_decode import Picture, Size
from data.media.image_fit import fitted_views, needed_size, resized_size
from data.records.record import MediaRef
from model.media_spec import ImageSpec, MediaMeta

MAX_GROWTH = 4
"""Padding or resizing may make a picture this many times `max_pixels`: a strip of 1 x 60 million pixels would become a square."""


def measure(blob: Blob, ref: MediaRef, spec: ImageSpec, config: DataConfig, num_media: int) -> MediaMeta:
    """Return the rows of a picture among `num_media` of its sample, by its header; the file is not opened if one row is certain.

    Raises MediaError.
    """
    return picture_meta(lambda: size(blob, spec, config), spec, config, num_media)


def picture_meta(size: Callable[[], Size], spec: ImageSpec, config: DataConfig, num_media: int) -> MediaMeta:
    """Return the rows of a picture; its size is asked for only where it decides them."""
    if config.image_fit == "anyres" and num_media == 1:
        return tiles.plan_anyres(size(), spec.size, config)
    if config.image_fit == "idefics" and config.cut_tiles:
        return plan_idefics(size(), spec.size, config)
    if config.image_fit != "tiles":
        return MediaMeta()
    max_tiles = tiles.budget(config.max_tiles, num_media)
    return tiles.plan_tiles(size(), spec.size, config.min_tiles, max_tiles, config.thumbnail)


def load(blob: Blob, ref: MediaRef, spec: ImageSpec, config: DataConfig, meta: MediaMeta) -> Tensor:
    """Decode a picture to pixels (meta.num_rows, 3, S, S), S = spec.size: float32 normalised, or uint8 if decoded fast.

    config.image_fit: pad (to a square of the mean colour first, as LLaVA) | square (the tower's own processor: CLIP crops, SigLIP
    distorts) | tiles (distorted to whole tiles, row by row; then the whole picture in one, if there are several and
    config.thumbnail) | anyres (the whole picture distorted to one view, then tiles that keep its aspect, on black; one of several
    pictures as pad) | idefics (tiles, then the whole picture; see `data.media.idefics_tiles`). Raises MediaError.
    """
    config = config if meta.num_rows > 1 else one_view(config)
    needed = (lambda size: needed_size(size, spec, config, meta)) if config.image_decode == "fast" else None
    picture = decode.decode(blob, lambda size: judge(blob.name, size, spec, config), needed)
    return _rows(fitted_views(picture, spec, config, meta), spec, config)


def one_view(config: DataConfig) -> DataConfig:
    """Return the configuration for a frame or for one of several pictures.

    As in LLaVA-NeXT, anyres cuts only a picture that is alone and pads all others.
    """
    if config.image_fit == "idefics":
        return replace(config, cut_tiles=False)
    return replace(config, image_fit="pad") if config.image_fit == "anyres" else config


def frame_rows(picture: Picture, spec: ImageSpec, config: DataConfig) -> Tensor:
    """Convert a decoded picture to pixels (1, 3, S, S), typed as `load` types them.

    The picture becomes one view: a frame is never cut into tiles.
    """
    config = one_view(config)
    return _rows(fitted_views(picture, spec, config, MediaMeta()), spec, config)


def size(blob: Blob, spec: ImageSpec, config: DataConfig) -> Size:
    """Return width and height of the upright picture, by its header. Raises MediaError for sizes that `load` refuses."""
    return decode.header_size(blob, lambda size: judge(blob.name, size, spec, config))


def check_file(blob: Blob) -> None:
    """Raise MediaError unless the header is that of a picture and the file is whole, by its markers. Decodes nothing.

    A BMP that is cut short passes: only decoding finds it.
    """
    with decode.open_picture(blob) as (stream, picture):
        _check_end(blob.name, stream, picture, blob.num_bytes())


def _check_end(name: str, stream: BinaryIO, picture: Image.Image, num_bytes: int) -> None:
    find_missing = image_truncation.MISSING.get(str(picture.format))
    if find_missing and (missing := find_missing(stream, num_bytes)):
        raise MediaError(f"{name!r} is cut short or damaged: {missing}")


class PictureFile:
    """All that one look into a picture's file tells, as `size` and `check_file` tell it; nothing is decoded."""

    def __init__(self, blob: Blob, spec: ImageSpec, config: DataConfig, sampled: int) -> None:
        """Look into the file. Raises MediaError for sizes that `load` refuses and for what is no picture."""
        self.fault = ""  # why it is not whole
        with decode.open_picture(blob) as (stream, picture):
            judge(blob.name, picture.size, spec, config)
            self.size = decode.upright_size(picture, stream)
            self.num_bytes = stream.seek(0, os.SEEK_END)
            self.sampled = sampled_bytes(stream, self.num_bytes, sampled)
            try:
                _check_end(blob.name, stream, picture, self.num_bytes)
            except MediaError as error:
                self.fault = str(error)


def judge(name: str, size: Size, spec: ImageSpec, config: DataConfig) -> None:
    """Raise MediaError for a picture or a frame that is too large, or too narrow to be fitted."""
    width, height = size
    limit = config.max_pixels
    if width * height > limit:
        raise MediaError(f"{name!r} is {width} x {height} = {width * height} pixels; data.max_pixels allows {limit}")
    idefics = config.image_fit == "idefics"
    fitted = first_size(size, config.side_tiles * spec.size) if idefics else resized_size(size, spec, config.image_fit)
    resized_width, resized_height = fitted
    # Pillow resizes a picture to its new width first, at its old height.
    grown = max(size) ** 2 if config.image_fit == "pad" else resized_width * max(height, resized_height)
    if grown > MAX_GROWTH * max(limit, spec.size**2):
        raise MediaError(f"{name!r} is {width} x {height}: so narrow that fitting it takes {grown} pixels")


def _rows(squares: list[Image.Image], spec: ImageSpec, config: DataConfig) -> Tensor:
    """Convert n RGB squares to (n, 3, S, S): bytes if decoded fast, else float32 as the processors compute it.

    The processors multiply by spec.rescale in float64, then subtract the mean and divide by the std in float32. A byte has 256
    values, so one table per channel is enough.
    """
    bytes_of = [np.asarray(square) for square in squares]  # (S, S, 3) each
    if config.image_decode == "fast":
        return torch.from_numpy(np.ascontiguousarray(np.stack(bytes_of).transpose(0, 3, 1, 2)))
    tables = level_tables(spec)
    pixels = np.empty((len(squares), 3, spec.size, spec.size), dtype=np.float32)
    for row, square in enumerate(bytes_of):
        for channel, table in enumerate(tables):
            np.take(table, square[:, :, channel], out=pixels[row, channel], mode="clip")  # "raise" would copy `out` first
    return torch.from_numpy(pixels)


@lru_cache(maxsize=8)
def level_tables(spec: ImageSpec) -> np.ndarray:
    """Return the pixel that each byte becomes in each channel, (3, 256) float32."""
    levels = (np.arange(256, dtype=np.float64) * spec.rescale).astype(np.float32)
    mean, std = np.array(spec.mean, dtype=np.float32), np.array(spec.std, dtype=np.float32)
    return (levels - mean[:, None]) / std[:, None]
