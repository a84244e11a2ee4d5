"""Tiles that keep a picture's aspect: the grid that LLaVA-NeXT's `anyres` chooses, and the pixels of its views.

The base view is the whole picture, distorted to a square. Behind it come the tiles: the picture in the largest size that fits the
grid, centred on black. Only a picture that is alone in its sample is cut; one of several pictures is one view padded to a square.
"""

from __future__ import annotations

import math
from functools import lru_cache

from PIL import Image

from data.config import GRID_NAME, MAX_TILES, NEXT_GRID, DataConfig, GridSize
from data.media.image_decode import Picture, Size
from model.errors import ConfigError
from model.media_spec import ImageSpec, MediaMeta


def plan_anyres(size: Size, side: int, config: DataConfig) -> MediaMeta:
    """Plan rows and grid of a picture of `size` for a tower that sees `side` x `side` pixels: the base view, then the tiles."""
    grid = best_anyres_grid(size, side, grids(config.image_grid, side))
    return MediaMeta(1 + grid[0] * grid[1], grid=grid, size=size, max_tiles=config.anyres_max)


def typical_plan(side: int, config: DataConfig) -> MediaMeta:
    """Plan a picture that fills the middle one of the grids, by tiles.

    Raises `ConfigError` for grids that are none of this tower.
    """
    among = sorted(grids(config.image_grid, side), key=lambda grid: grid[0] * grid[1])
    across, down = among[len(among) // 2]
    return plan_anyres((across * side, down * side), side, config)


@lru_cache(maxsize=64)
def grids(sizes: tuple[GridSize, ...], side: int) -> tuple[Size, ...]:
    """Return (across, down) of each of data.image_grid, in its order, which decides between equally good grids.

    Raises `ConfigError`.
    """
    found: list[Size] = []
    for i, size in enumerate(sizes or NEXT_GRID):
        if isinstance(size, str):
            found += grids_named(size)
        elif size[0] % side or size[1] % side or size[0] * size[1] > MAX_TILES * side**2:
            raise ConfigError(
                f"data.image_grid.{i} = {list(size)} is not made of at most {MAX_TILES} tiles of {side} x {side} pixels, which the "
                "tower sees; grids may be named by their tiles, as '2x1'"
            )
        else:
            found.append((size[0] // side, size[1] // side))
    return tuple(dict.fromkeys(found))


def grids_named(text: str) -> list[Size]:
    """Return (across, down) of "2x1", or of all grids of "1x1...6x6" in the order of OneVision's folders. `text` is well formed."""
    match = GRID_NAME.fullmatch(text)
    assert match is not None
    left, top, right, bottom = (int(word) for word in match.groups("0"))
    return [(across, down) for down in range(top, (bottom or top) + 1) for across in range(left, (right or left) + 1)]


def best_anyres_grid(size: Size, side: int, grids: tuple[Size, ...]) -> Size:
    """Return the grid that keeps most of the picture's pixels; among equals, that with the least area left over, then the first."""
    width, height = size
    best, most, least = grids[0], 0, math.inf
    for across, down in grids:
        scale = min(across * side / width, down * side / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        left_over = across * down * side**2 - kept
        if kept > most or (kept == most and left_over < least):
            best, most, least = (across, down), kept, left_over
    return best


def fitted_size(size: Size, grid: Size, side: int) -> Size:
    """Return the largest size of a picture of `size` that fits the grid, at least one pixel either way."""
    (width, height), (wide, high) = size, (grid[0] * side, grid[1] * side)
    if wide / width < high / height:
        return wide, min(math.ceil(height * (wide / width)), high)
    return min(math.ceil(width * (high / height)), wide), high


def anyres_views(picture: Picture, spec: ImageSpec, meta: MediaMeta) -> list[Image.Image]:
    """Return the meta.num_rows squares (S, S) of a picture: the base view, then the tiles row by row."""
    (across, down), side = meta.grid, spec.size
    width, height = fitted_size(meta.size, meta.grid, side)
    canvas = Image.new("RGB", (across * side, down * side))
    resized = picture.image.resize((width, height), spec.resample, picture.box)
    canvas.paste(resized, ((canvas.width - width) // 2, (canvas.height - height) // 2))
    corners = [(column * side, row * side) for row in range(down) for column in range(across)]
    base = picture.image.resize((side, side), spec.resample, picture.box)
    return [base, *(canvas.crop((left, top, left + side, top + side)) for left, top in corners)]
