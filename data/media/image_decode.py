"""The one place where picture files are opened and decoded: listed formats, size check by the header, upright RGB.

Every picture equals `transformers.image_utils.load_image`'s result to the bit: turned upright as EXIF or XMP say, then RGB by
Pillow's conversion, which drops alpha. (The processors of transformers 5.23 put a transparent picture that was not converted on
white; those of 5.17 drop alpha too.) There are two exceptions. A grey picture of 16 bits keeps its high bytes, where Pillow's
conversion clips it to white. A broken EXIF block counts as none, where `load_image` raises.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from data.media.blob import Blob, MediaError
from data.media.image_truncation import png_chunks

Size = tuple[int, int]
"""Width and height."""
_ORIENTATION = 0x0112
_SWAPPED, _MIRRORED, _FLIPPED = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)
"""EXIF orientations that swap the axes, mirror left to right, and flip top to bottom, applied in this order."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
"""Chunks of a PNG that may hold an orientation."""
_FORMATS: dict[str, tuple[re.Pattern[bytes], Callable[[BinaryIO], Image.Image]]] = {
    "JPEG": (re.compile(rb"\xff\xd8"), JpegImagePlugin.jpeg_factory),
    "PNG": (re.compile(rb"\x89PNG"), PngImagePlugin.PngImageFile),
    "WEBP": (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    "GIF": (re.compile(rb"GIF8"), GifImagePlugin.GifImageFile),
    "BMP": (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
}
"""First bytes and header reader of each format that may be decoded; of an animation the first frame counts. The other formats of
Pillow's forty are attack surface.
"""
_NO_HEADER = (SyntaxError, IndexError, TypeError, struct.error)
"""Exceptions that Pillow's readers raise for an invalid header."""
Side = TypeVar("Side", int, float)


@dataclass(frozen=True)
class Picture:
    """A decoded picture, upright, in RGB; perhaps decoded at a fraction of its size."""

    image: Image.Image
    size: Size  # of the picture as it is stored, turned upright
    box: tuple[float, float, float, float]  # left, top, right, bottom of the picture in `image`, which may hold a part pixel more

    @classmethod
    def of(cls, image: Image.Image) -> Picture:
        """Return the Picture that covers all of an RGB image."""
        return cls(image, image.size, (0, 0, *image.size))


def header_size(blob: Blob, judge: Callable[[Size], None]) -> Size:
    """Return the size of the upright picture, by its header alone. Raises MediaError, also if `judge` refuses the size."""
    with open_picture(blob) as (stream, picture):
        judge(picture.size)
        return upright_size(picture, stream)


def upright_size(picture: Image.Image, stream: BinaryIO) -> Size:
    """Return the size of an open picture, turned upright, by its header."""
    return _upright(picture.size, _orientation(picture, stream))


def decode(blob: Blob, judge: Callable[[Size], None], needed: Callable[[Size], Size] | None = None) -> Picture:
    """Decode the picture, once `judge` has accepted the size in its header. Raises MediaError, for files that are cut short too.

    `needed` maps the size of the upright picture to the size it will be resized to. A JPEG that is at least twice as large is then
    decoded at a half, a quarter or an eighth (libjpeg scales the cosine transform), never below what is needed.
    """
    with open_picture(blob) as (stream, picture):
        judge(picture.size)
        if is_png := picture.format == "PNG":
            picture.load()  # as all of it is decoded anyway, metadata behind the pixels need not be looked for
        orientation = _orientation(picture, None if is_png else stream)
        size = _upright(picture.size, orientation)
        drafted = picture.draft(None, _upright(needed(size), orientation)) if needed else None
        extent = (drafted[1][2], drafted[1][3]) if drafted else picture.size
        picture.load()
        image = _rgb(picture)
        turned = image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
        return Picture(turned, size, _box(turned.size, _upright(extent, orientation), orientation))


@contextmanager
def open_picture(blob: Blob) -> Iterator[tuple[BinaryIO, Image.Image]]:
    """Open a picture's stream and header; any failure inside the context is raised as MediaError with the name of the file.

    The caller judges how many pixels are too many, before anything is decoded: `Image.open` would apply a limit of its own first,
    which is one for the whole process.
    """
    name = blob.name
    try:
        with blob.open() as stream, _header(stream, name) as picture:
            yield stream, picture
    except MediaError:
        raise
    except Image.DecompressionBombError as error:  # Pillow still applies its limit inside a WEBP, and to a GIF's later frames
        raise MediaError(f"{name!r} has more pixels than Pillow decodes of its format, whatever data.max_pixels allows") from error
    # Pillow's decoders raise whatever broken bytes lead them to: OSError, SyntaxError, struct.error, IndexError ...
    except Exception as error:
        raise MediaError(f"{name!r} cannot be decoded: {error or type(error).__name__}") from error


def _header(stream: BinaryIO, name: str) -> Image.Image:
    """Read the picture's header without its pixels; the format is found by the first bytes of the file, never by its name."""
    start = stream.read(12)
    stream.seek(0)
    if not start:
        raise MediaError(f"{name!r} is empty: it has 0 bytes")
    for kind, (pattern, read) in _FORMATS.items():
        if pattern.match(start):
            try:
                return read(stream)
            except _NO_HEADER as error:
                reason = f"it begins as {kind}, but its header is broken, cut short or of no pixels"
                raise MediaError(f"{name!r} cannot be decoded: {reason}") from error
    raise MediaError(f"{name!r} is none of {', '.join(_FORMATS)}: it begins with {start!r}")


def _orientation(picture: Image.Image, stream: BinaryIO | None) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if the file has none that can be read. `stream`: None for a PNG that is decoded.

    Pillow reads it from a PNG by decoding everything, in case metadata stand behind the pixels; here the PNG is decoded only if
    they do.
    """
    if stream is not None and picture.format == "PNG" and _has_late_metadata(stream):
        picture.load()
    if not any(isinstance(value, bytes | str) for value in picture.info.values()):
        return 1  # EXIF and XMP are one of them, whatever their key
    try:
        found = Image.Image.getexif(picture).get(_ORIENTATION, 1)
    except Exception:  # broken bytes may raise anything, as in decoders; the pixels are valid without an orientation
        return 1
    return int(found) if found in range(1, 9) else 1


def _has_late_metadata(stream: BinaryIO) -> bool:
    position = stream.tell()
    try:
        kinds = [kind for kind, _ in png_chunks(stream)]
    finally:
        stream.seek(position)  # Pillow continues to read here
    return b"IDAT" in kinds and any(kind in _METADATA for kind in kinds[kinds.index(b"IDAT") :])


def _upright(size: tuple[Side, Side], orientation: int) -> tuple[Side, Side]:
    return (size[1], size[0]) if orientation in _SWAPPED else size


def _box(image: Size, extent: tuple[float, float], orientation: int) -> tuple[float, float, float, float]:
    """Return the box, in the upright image, of a picture of `extent` pixels that began in the corner of the stored image."""
    left = image[0] - extent[0] if orientation in _MIRRORED else 0.0
    top = image[1] - extent[1] if orientation in _FLIPPED else 0.0
    return left, top, left + extent[0], top + extent[1]


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # of the listed formats only a grey PNG of 16 bits
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture.convert("RGB")
