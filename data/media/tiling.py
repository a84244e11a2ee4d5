"""The grid of square tiles into which a picture is cut: the dynamic tiling of InternVL and VITA, as a function of sizes alone."""

from __future__ import annotations

from functools import lru_cache

from model.media_spec import MediaMeta


def plan_tiles(size: tuple[int, int], side: int, min_tiles: int, max_tiles: int, thumbnail: bool) -> MediaMeta:
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


def best_tile_grid(size: tuple[int, int], side: int, min_tiles: int, max_tiles: int) -> tuple[int, int]:
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
def candidates(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """List all grids of `min_tiles` to `max_tiles` tiles, by area, then by tiles across."""
    grids = ((across, down) for across in range(1, max_tiles + 1) for down in range(1, max_tiles // across + 1))
    return tuple(sorted((g for g in grids if g[0] * g[1] >= min_tiles), key=lambda g: (g[0] * g[1], g)))
