"""Pictures: from a path in a record to the pixels its vision tower was trained on.

The pixels are those of the Hugging Face processors with the PIL back end, bit for bit: CLIP (shortest edge, centre crop),
SigLIP (both edges at once) and LLaVA (padded to a square of the mean colour, expand2square). As in LLaVA's training every mode
becomes RGB by Pillow's conversion, which drops alpha (transformers 5.17 does so too, 5.23 lays transparent pictures on white), and
nothing is rotated: EXIF orientation is ignored.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.blob import Blob, MediaError
from data.config import DataConfig
from data.record import MediaRef
from model.batch import ImageSpec, MediaMeta

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats that may be decoded; of an animation the first frame. The others of Pillow's forty are attack surface."""
MAX_GROWTH = 4
"""Padding or resizing may make a picture this many times `max_pixels`: a strip of 1 x 60 million pixels would become a square."""


def measure(blob: Blob, ref: MediaRef, spec: ImageSpec, config: DataConfig, num_media: int) -> MediaMeta:
    """One view per picture: nothing has to be opened to know that."""
    return MediaMeta()


def load(blob: Blob, ref: MediaRef, spec: ImageSpec, config: DataConfig, meta: MediaMeta) -> Tensor:
    """Pixels (meta.num_rows, 3, S, S) float32, S = spec.size. Raises MediaError.

    config.image_fit: pad (to a square of the mean colour first, as LLaVA) | square (the tower's own processor: CLIP crops, SigLIP
    distorts).
    """
    return normalise(_fit(_decode(blob, spec, config.image_fit, config.max_pixels), spec, config.image_fit), spec)[None]


def _decode(blob: Blob, spec: ImageSpec, fit: str, max_pixels: int) -> Image.Image:
    """The picture in RGB, whatever mode it was stored in; its size is judged by the header, before anything is decoded."""
    file = blob.name
    try:
        with blob.open() as stream, Image.open(stream, formats=FORMATS) as picture:
            _check_size(file, picture.size, spec, fit, max_pixels)
            picture.load()
            return picture.convert("RGB")
    except MediaError:
        raise
    except Image.UnidentifiedImageError as error:
        raise MediaError(f"{file!r} is none of {', '.join(FORMATS)}") from error
    # Pillow's decoders raise whatever broken bytes lead them to: OSError, SyntaxError, struct.error, IndexError ...
    except Exception as error:
        raise MediaError(f"{file!r} cannot be decoded: {error or type(error).__name__}") from error


def normalise(picture: Image.Image, spec: ImageSpec) -> Tensor:
    """Pixels (3, H, W) float32 of an RGB picture: times spec.rescale in float64, then minus mean, over std in float32.

    The order and the types are the processor's; fusing them is 2e-7 off. A byte has 256 values, so each channel is one table.
    """
    levels = (np.arange(256, dtype=np.float64) * spec.rescale).astype(np.float32)
    mean, std = np.array(spec.mean, dtype=np.float32), np.array(spec.std, dtype=np.float32)
    tables = (levels - mean[:, None]) / std[:, None]
    pixels = np.asarray(picture)
    return torch.from_numpy(np.stack([tables[channel][pixels[..., channel]] for channel in range(3)]))


def _fit(picture: Image.Image, spec: ImageSpec, fit: str) -> Image.Image:
    """The picture as an S x S square of bytes."""
    if fit == "pad":
        picture = _pad_to_square(picture, spec.mean)
    elif fit != "square":
        raise ValueError(f"image_fit = {fit!r} is neither pad nor square")
    resized = picture.resize(_resized(picture.size, spec), resample=spec.resample)
    left, top = (resized.width - spec.size) // 2, (resized.height - spec.size) // 2
    return resized.crop((left, top, left + spec.size, top + spec.size))


def _pad_to_square(picture: Image.Image, mean: tuple[float, ...]) -> Image.Image:
    side = max(picture.size)
    canvas = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas


def _resized(size: tuple[int, int], spec: ImageSpec) -> tuple[int, int]:
    """(width, height) before the crop; the longer edge is cut down to a whole number, as the processor does."""
    if spec.resize == "exact":
        return spec.size, spec.size
    width, height = size
    long = int(spec.size * max(size) / min(size))
    return (spec.size, long) if width <= height else (long, spec.size)


def _check_size(file: str, size: tuple[int, int], spec: ImageSpec, fit: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise MediaError(f"{file!r} is {width} x {height} = {width * height} pixels; data.max_pixels allows {max_pixels}")
    resized_width, resized_height = _resized(size, spec)
    grown = max(size) ** 2 if fit == "pad" else resized_width * resized_height
    if grown > MAX_GROWTH * max(max_pixels, spec.size**2):
        raise MediaError(f"{file!r} is {width} x {height}: so narrow that fitting it takes {grown} pixels")
