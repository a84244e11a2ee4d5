"""Pictures: from a path in a record to the pixels its vision tower was trained on.

The pixels are those of the Hugging Face processors with the PIL back end, bit for bit: CLIP (shortest edge, centre crop),
SigLIP (both edges at once) and LLaVA (padded to a square of the mean colour, expand2square). As in LLaVA's training every mode
becomes RGB by Pillow's conversion, which drops alpha (transformers 5.17 does so too, 5.23 lays transparent pictures on white), and
nothing is rotated: EXIF orientation is ignored.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.config import DataError
from model.batch import MediaSpec

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""Formats that may be decoded; of an animation the first frame. The others of Pillow's forty are attack surface."""
MAX_GROWTH = 4
"""Padding or resizing may make a picture this many times `max_pixels`: a strip of 1 x 60 million pixels would become a square."""


class MediaError(DataError):
    """A medium cannot be used. The message is the reason alone; whoever knows the record adds where it stands."""


def load_image(path: str, root: str, spec: MediaSpec, fit: str, *, max_pixels: int, follow_links: bool) -> Tensor:
    """Pixels (3, S, S) float32 of the picture at `path` inside `root`, S = spec.size; raises MediaError.

    fit: pad (to a square of the mean colour first, as LLaVA) | square (the tower's own processor: CLIP crops, SigLIP distorts).
    """
    return read_image(resolve(path, root, follow_links=follow_links), spec, fit, max_pixels=max_pixels)


def resolve(path: str, root: str, *, follow_links: bool) -> str:
    """The file that `path` of a record names inside `root` ("" = the current directory); MediaError when it would leave it."""
    if os.path.isabs(path):
        raise MediaError(f"{path!r} is absolute; write it relative to the source's media_root {root!r}")
    base = os.path.abspath(root)
    named = os.path.normpath(os.path.join(base, path))
    if not _inside(named, base):
        raise MediaError(f"{path!r} leaves media_root {root!r}")
    if follow_links:
        return named
    try:
        real, real_base = os.path.realpath(named), os.path.realpath(base)
    except (OSError, ValueError) as error:
        raise MediaError(f"{path!r} is no usable path: {error}") from error
    if not _inside(real, real_base):
        raise MediaError(f"{path!r} is a link that leaves media_root {root!r}; set data.follow_links = true to allow it")
    return real


def read_image(file: str | Path, spec: MediaSpec, fit: str, *, max_pixels: int) -> Tensor:
    """Pixels (3, S, S) float32 of a file that a person named; no root confines it. Raises MediaError."""
    return normalise(_fit(_decode(os.fspath(file), spec, fit, max_pixels), spec, fit), spec)


def _decode(file: str, spec: MediaSpec, fit: str, max_pixels: int) -> Image.Image:
    """The picture in RGB, whatever mode it was stored in; its size is judged by the header, before anything is decoded."""
    if not os.path.isfile(file):  # opening a pipe or a device would wait for ever
        raise MediaError(f"{file!r} {'is not a regular file' if os.path.exists(file) else 'does not exist'}")
    try:
        with Image.open(file, formats=FORMATS) as picture:
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


def normalise(picture: Image.Image, spec: MediaSpec) -> Tensor:
    """Pixels (3, H, W) float32 of an RGB picture: times spec.rescale in float64, then minus mean, over std in float32.

    The order and the types are the processor's; fusing them is 2e-7 off. A byte has 256 values, so each channel is one table.
    """
    levels = (np.arange(256, dtype=np.float64) * spec.rescale).astype(np.float32)
    mean, std = np.array(spec.mean, dtype=np.float32), np.array(spec.std, dtype=np.float32)
    tables = (levels - mean[:, None]) / std[:, None]
    pixels = np.asarray(picture)
    return torch.from_numpy(np.stack([tables[channel][pixels[..., channel]] for channel in range(3)]))


def _fit(picture: Image.Image, spec: MediaSpec, fit: str) -> Image.Image:
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


def _resized(size: tuple[int, int], spec: MediaSpec) -> tuple[int, int]:
    """(width, height) before the crop; the longer edge is cut down to a whole number, as the processor does."""
    if spec.resize == "exact":
        return spec.size, spec.size
    width, height = size
    long = int(spec.size * max(size) / min(size))
    return (spec.size, long) if width <= height else (long, spec.size)


def _check_size(file: str, size: tuple[int, int], spec: MediaSpec, fit: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise MediaError(f"{file!r} is {width} x {height} = {width * height} pixels; data.max_pixels allows {max_pixels}")
    resized_width, resized_height = _resized(size, spec)
    grown = max(size) ** 2 if fit == "pad" else resized_width * resized_height
    if grown > MAX_GROWTH * max(max_pixels, spec.size**2):
        raise MediaError(f"{file!r} is {width} x {height}: so narrow that fitting it takes {grown} pixels")


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
