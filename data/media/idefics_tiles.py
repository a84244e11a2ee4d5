"""Split grids of Idefics3 and SmolVLM: a picture enlarged to whole tiles, row by row, then all of it in one more tile."""

from __future__ import annotations

from dataclasses import dataclass, replace

from PIL import Image

from data.config import DataConfig
from data.media.blob import MediaError
from data.media.image_decode import Picture, Size
from data.media.pixel_budget import USUAL
from model.media_spec import ImageSpec, MediaMeta

MAX_SIDE = 4096
"""Longest side in pixels that the processors resize a picture to, whatever their settings say."""
USUAL_INTRO, USUAL_TIME = 30, 13
"""Tokens of the texts before a video of SmolVLM, and before each of its frames."""


@dataclass(frozen=True)
class IdeficsPlan:
    """Sizes that a picture takes on its way to tiles."""

    rows: int  # of tiles; 0: one view, not split
    cols: int
    first: Size  # width and height after the longest side is resized
    size: Size  # width and height after rounding up to whole tiles
    tile: int  # side of a tile in pixels


def idefics_plan(size: Size, longest_edge: int, tile: int, *, split: bool = True) -> IdeficsPlan:
    """Return the sizes and the split grid of a picture of `size` (width, height).

    `longest_edge` and `tile` are size["longest_edge"] and max_image_size["longest_edge"] of the processor, `split` its
    do_image_splitting. Raises MediaError for a picture of which nothing would be left.
    """
    if min(size) < 1:
        raise MediaError(f"a picture of {size[0]} x {size[1]} pixels is empty")
    first = first_size(size, longest_edge)
    if not split:
        return IdeficsPlan(0, 0, first, (tile, tile), tile)
    width, height = _whole_tiles(first, tile)
    if min(width, height) < 1:
        raise MediaError(f"{size[0]} x {size[1]} pixels are too narrow: no tile of {tile} pixels is left of them; crop the picture")
    rows, cols = (height // tile, width // tile) if max(width, height) > tile else (0, 0)
    return IdeficsPlan(rows, cols, first, (width, height), tile)


def picture_plan(size: Size, tile: int, config: DataConfig) -> IdeficsPlan:
    """Return the plan of a picture whose longer side becomes data.side_tiles tiles of `tile` pixels. Raises MediaError."""
    return idefics_plan(size, config.side_tiles * tile, tile, split=config.cut_tiles)


def plan_idefics(size: Size, tile: int, config: DataConfig) -> MediaMeta:
    """Return the rows and the grid of a picture; one that is not cut is a single view. Raises MediaError."""
    plan = picture_plan(size, tile, config)
    return MediaMeta(plan.rows * plan.cols + 1, grid=(max(plan.cols, 1), max(plan.rows, 1)))


def usual_idefics(spec: ImageSpec, config: DataConfig) -> MediaMeta:
    """Return the facts of a picture of `USUAL` size, with two ids before each view and one behind each line of tiles."""
    meta = plan_idefics(USUAL, spec.size, config)
    down = meta.grid[1] if meta.num_rows > 1 else 0
    return replace(meta, inside=((0, (0,) * (2 * meta.num_rows + down + 1)),))


def usual_frame_texts(count: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Return as many ids as stand around `count` frames of a video of SmolVLM, as a rule."""
    return ((0, (0,) * (USUAL_INTRO + USUAL_TIME * count)),)


def idefics_views(picture: Picture, plan: IdeficsPlan, resample: int = Image.Resampling.LANCZOS) -> list[Image.Image]:
    """Return the squares (tile, tile) of a decoded RGB picture: its tiles row by row, then the whole; the whole alone if not split.

    The picture is resized two or three times one after the other, as the processors do it.
    """
    image = picture.image.resize(plan.first, resample, picture.box).resize(plan.size, resample)
    if not plan.rows:
        return [image]
    corners = [(column * plan.tile, row * plan.tile) for row in range(plan.rows) for column in range(plan.cols)]
    tiles = [image.crop((left, top, left + plan.tile, top + plan.tile)) for left, top in corners]
    return [*tiles, image.resize((plan.tile, plan.tile), resample)]


def first_size(size: Size, longest: int) -> Size:
    """Return the size whose longer side is `longest`; the shorter one is even, unless `MAX_SIDE` shrinks both once more."""
    width, height = _scaled(size, longest)
    width, height = (width, _even(height)) if size[0] >= size[1] else (_even(width), height)
    width, height = max(width, 1), max(height, 1)
    if max(width, height) <= MAX_SIDE:
        return width, height
    width, height = _scaled((width, height), MAX_SIDE)
    return max(width, 1), max(height, 1)


def _whole_tiles(size: Size, tile: int) -> Size:
    """Return the size rounded up to whole tiles, the longer side first, the shorter one in proportion to it."""
    width, height = _scaled(size, -(-max(size) // tile) * tile)
    return -(-width // tile) * tile, -(-height // tile) * tile


def _scaled(size: Size, longest: int) -> Size:
    """Return the size whose longer side is `longest` and whose shorter side is rounded down."""
    width, height = size
    aspect = width / height
    return (longest, int(longest / aspect)) if width >= height else (int(longest * aspect), longest)


def _even(side: int) -> int:
    return side + side % 2
