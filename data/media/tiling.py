"""How a picture is cut into tiles, as functions of sizes alone: the dynamic tiling of InternVL and VITA, and LLaVA-NeXT's anyres.

Dynamic tiling distorts the picture to a whole number of tiles. Anyres keeps its aspect: behind a base view, the whole picture as a
distorted square, come the tiles of the picture in the largest size that fits the grid, centred on black. Only a picture that is
alone in its sample is cut by anyres; one of several pictures is one view padded to a square.
"""

from __future__ import annotations

import math
from functools import lru_cache

from data.config import NEXT_GRID, DataConfig, GridSize
from data.fit_problems import GRID_NAME, MAX_TILES
from data.media.image_decode import Size
from model.errors import ConfigError
from model.media_spec import MediaMeta


def plan_tiles(size: Size, side: int, min_tiles: int, max_tiles: int, thumbnail: bool) -> MediaMeta:
    """Return the rows and the grid of a picture of `size` (width, height) for a tower that sees `side` x `side` pixels.

    As in InternVL's `max_dynamic_patch`, `max_tiles` does not count the thumbnail, which only a picture of more than one tile has:
    a picture takes at most max_tiles + 1 rows.
    """
    across, down = best_tile_grid(size, side, min_tiles, max_tiles)
    tiles = across * down
    return MediaMeta(num_rows=tiles + (thumbnail and tiles > 1), grid=(across, down))


def budget(max_tiles: int, num_pictures: int) -> int:
    """Return the tiles that each of several pictures of one sample may take, at least one (InternVL's rule)."""
    return max(1, max_tiles // num_pictures)


def best_tile_grid(size: Size, side: int, min_tiles: int, max_tiles: int) -> Size:
    """Return the grid (across, down) whose aspect is nearest that of `size`.

    Of equally near grids the first wins; a later one, which has more tiles, replaces it if the picture has more than half as many
    pixels as those tiles. InternVL leaves the order of candidates of one area to a set; here it is fixed.
    """
    width, height = size
    aspect, best, nearest = width / height, (1, 1), float("inf")
    for across, down in candidates(min(min_tiles, max_tiles), max_tiles):
        distance = abs(aspect - across / down)
        if distance < nearest or (distance == nearest and width * height > 0.5 * side * side * across * down):
            best, nearest = (across, down), distance
    return best


@lru_cache(maxsize=64)
def candidates(min_tiles: int, max_tiles: int) -> tuple[Size, ...]:
    """List all grids of `min_tiles` to `max_tiles` tiles, by area, then by tiles across."""
    grids = ((across, down) for across in range(1, max_tiles + 1) for down in range(1, max_tiles // across + 1))
    return tuple(sorted((g for g in grids if g[0] * g[1] >= min_tiles), key=lambda g: (g[0] * g[1], g)))


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


def size_in_grid(size: Size, grid: Size, side: int) -> Size:
    """Return the largest size of a picture of `size` that fits the grid, at least one pixel either way."""
    (width, height), (wide, high) = size, (grid[0] * side, grid[1] * side)
    if wide / width < high / height:
        return wide, min(math.ceil(height * (wide / width)), high)
    return min(math.ceil(width * (high / height)), wide), high
