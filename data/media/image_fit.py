"""Fit a decoded picture to the squares of bytes that a vision tower sees: padded, cropped, distorted or cut into tiles."""

from __future__ import annotations

from math import ceil

from PIL import Image

from data.config import DataConfig
from data.media.idefics_tiles import first_size, idefics_views, picture_plan
from data.media.image_decode import Picture, Size
from data.media.tiling import size_in_grid
from model.media_spec import ImageSpec, MediaMeta


def fitted_views(picture: Picture, spec: ImageSpec, config: DataConfig, meta: MediaMeta) -> list[Image.Image]:
    """Return the meta.num_rows squares (S, S) of a picture, fitted as data.image_fit says."""
    fit = config.image_fit
    if fit == "anyres":
        return _anyres_views(picture, spec, meta)
    if fit == "idefics":
        return idefics_views(picture, picture_plan(picture.size, spec.size, config), spec.resample)
    if fit != "tiles":
        return [whole(picture, spec, fit)]
    (across, down), side = meta.grid, spec.size
    tiles = _cut(picture.image.resize((across * side, down * side), spec.resample, picture.box), meta.grid, side)
    return tiles if meta.num_rows == len(tiles) else [*tiles, whole(picture, spec, "tiles")]


def _anyres_views(picture: Picture, spec: ImageSpec, meta: MediaMeta) -> list[Image.Image]:
    """Return the base view of a picture, then its tiles row by row."""
    (across, down), side = meta.grid, spec.size
    width, height = size_in_grid(meta.size, meta.grid, side)
    canvas = Image.new("RGB", (across * side, down * side))
    resized = picture.image.resize((width, height), spec.resample, picture.box)
    canvas.paste(resized, ((canvas.width - width) // 2, (canvas.height - height) // 2))
    base = picture.image.resize((side, side), spec.resample, picture.box)
    return [base, *_cut(canvas, meta.grid, side)]


def _cut(image: Image.Image, grid: Size, side: int) -> list[Image.Image]:
    """Cut an image into the squares (side, side) of a grid, row by row."""
    corners = [(column * side, row * side) for row in range(grid[1]) for column in range(grid[0])]
    return [image.crop((left, top, left + side, top + side)) for left, top in corners]


def whole(picture: Picture, spec: ImageSpec, fit: str) -> Image.Image:
    """Fit the whole picture into one square (S, S)."""
    if fit == "pad":
        return _padded(picture, spec)
    resized = picture.image.resize(resized_size(picture.size, spec, fit), spec.resample, picture.box)
    left, top = (resized.width - spec.size) // 2, (resized.height - spec.size) // 2
    return resized.crop((left, top, left + spec.size, top + spec.size))


def resized_size(size: Size, spec: ImageSpec, fit: str) -> Size:
    """Return (width, height) before the crop; the longer edge is rounded down, as in CLIP's processor."""
    if spec.resize == "exact" or fit in ("tiles", "anyres"):
        return spec.size, spec.size
    width, height = size
    long = int(spec.size * max(size) / min(size))
    return (spec.size, long) if width <= height else (long, spec.size)


def needed_size(size: Size, spec: ImageSpec, config: DataConfig, meta: MediaMeta) -> Size:
    """Return the size that a picture of `size` is resized to, without bars: decoding more pixels than these is useless."""
    fit = config.image_fit
    if fit == "idefics":
        return first_size(size, config.side_tiles * spec.size)
    if fit == "pad":
        return ceil(size[0] * spec.size / max(size)), ceil(size[1] * spec.size / max(size))
    if fit == "tiles":
        return meta.grid[0] * spec.size, meta.grid[1] * spec.size
    if fit == "anyres":
        width, height = size_in_grid(size, meta.grid, spec.size)
        return max(width, spec.size), max(height, spec.size)
    return resized_size(size, spec, fit)


def _padded(picture: Picture, spec: ImageSpec) -> Image.Image:
    """Pad the picture to a square of the mean colour (LLaVA's expand2square) and resize it to (S, S).

    Pillow resizes rows, then columns. So bars above and below are added after the rows are resized: bit for bit the same result, at
    less cost.
    """
    image, (left, top, right, bottom) = picture.image, picture.box
    if picture.size[0] == picture.size[1]:
        return image.resize((spec.size, spec.size), spec.resample, picture.box)
    (width, height), side, wide = picture.size, max(picture.size), picture.size[0] >= picture.size[1]
    if wide:
        image = image.resize((spec.size, image.height), spec.resample, (left, 0, right, image.height))
    start, stop = (top, bottom) if wide else (left, right)
    short, length = min(width, height), image.height if wide else image.width
    scale = (stop - start) / short
    bar = (side - short) // 2 * scale
    # Only whole pixels can be pasted, so the square begins and ends at a fraction if the picture was decoded at a fraction.
    offset = ceil(bar - start)
    first = offset + start - bar
    last = first + side * scale
    colour = tuple(int(value * 255) for value in spec.mean)
    canvas = Image.new("RGB", (spec.size, ceil(last)) if wide else (ceil(last), image.height), colour)
    canvas.paste(image, (0, offset) if wide else (offset, 0))
    end = offset + length - 1
    _fade(canvas, offset, (1 - start) / min(offset + 1 - first, 1), wide, colour)
    _fade(canvas, end, (stop - length + 1) / min(last - end, 1), wide, colour)
    box = (0, first, spec.size, last) if wide else (first, top, last, bottom)
    return canvas.resize((spec.size, spec.size), spec.resample, box)


def _fade(canvas: Image.Image, position: int, share: float, wide: bool, colour: tuple[int, ...]) -> None:
    """Blend the row or column at `position`, of which only `share` shows the picture, with the colour of the bar beside it."""
    if share == 1:
        return
    strip = (0, position, canvas.width, position + 1) if wide else (position, 0, position + 1, canvas.height)
    part = canvas.crop(strip)
    canvas.paste(Image.blend(Image.new("RGB", part.size, colour), part, share), strip)
