"""Token order of a picture in tiles of its own aspect: LLaVA-NeXT's unpadding and OneVision's shrinking, from sizes alone.

u is the side of a tile in tokens. The tiles make one map of (down * u, across * u) tokens. Tokens of the black bars are removed;
each remaining line ends in the projector's line break. A map that is too large is shrunk: every token of it is then a weighted sum
of four others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

MOST_GROWTH = 1.1
"""OneVision does not shrink a map whose side exceeds the limit by less than this factor."""


@dataclass(frozen=True)
class TileMap:
    """Tokens that the tiles of one picture give, without bars; `lines` and `columns` count tokens, without line breaks."""

    side: int  # u
    across: int  # tiles
    top: int  # height of the bar above the picture, in lines
    left: int
    lines: int
    columns: int
    shrunk: tuple[int, int]  # lines and columns after shrinking; (lines, columns) where nothing is shrunk

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens, with a line break after each line."""
        return self.shrunk[0] * (self.shrunk[1] + 1)

    @property
    def is_shrunk(self) -> bool:
        return self.shrunk != (self.lines, self.columns)

    def rows(self, line: np.ndarray, column: np.ndarray, width: int) -> np.ndarray:
        """Return the projected row of each token of the unpadded map.

        Row l of tile n, which is encoder row 1 + n, is projected row (1 + n) * width + l.
        """
        (down, y), (right, x) = np.divmod(line + self.top, self.side), np.divmod(column + self.left, self.side)
        return (1 + down * self.across + right) * width + y * self.side + x


def tile_map(size: tuple[int, int], grid: tuple[int, int], side: int, max_tiles: int) -> TileMap:
    """Compute the map. `size`: of the picture in pixels (width, height); `grid`: tiles across and down; `max_tiles`: limit of the
    tokens in tiles, 0 for none.

    Rounds as transformers' `unpad_image` does, and so every model with LLaVA-NeXT's weights.
    """
    (width, height), columns, lines = size, grid[0] * side, grid[1] * side
    top = left = 0
    if width / height > columns / lines:
        top = (lines - int(round(height * (columns / width), 7))) // 2
    else:
        left = (columns - int(round(width * (lines / height), 7))) // 2
    lines, columns = lines - 2 * top, columns - 2 * left
    ratio = math.sqrt(lines * columns / (max_tiles * side**2)) if max_tiles else 0.0
    shrunk = (max(1, int(lines // ratio)), max(1, int(columns // ratio))) if ratio > MOST_GROWTH else (lines, columns)
    return TileMap(side, grid[0], top, left, lines, columns, shrunk)


def map_rows(tiles: TileMap, width: int) -> np.ndarray:
    """Return the projected rows of the map with its line breaks, -1: (num_tokens,) or, for a shrunk map, (num_tokens, 4)."""
    if not tiles.is_shrunk:
        found = tiles.rows(np.arange(tiles.lines)[:, None], np.arange(tiles.columns), width)
        return np.pad(found, ((0, 0), (0, 1)), constant_values=-1).reshape(-1)
    above, below, _ = _between(tiles.lines, tiles.shrunk[0])
    before, behind, _ = _between(tiles.columns, tiles.shrunk[1])
    corners = [(above, before), (above, behind), (below, before), (below, behind)]
    found = np.stack([tiles.rows(line[:, None], column, width) for line, column in corners], axis=-1)
    return np.pad(found, ((0, 0), (0, 1), (0, 0)), constant_values=-1).reshape(-1, 4)


def map_weights(tiles: TileMap) -> np.ndarray:
    """Return the weights of the rows of a shrunk map, (num_tokens, 4) float32: those of torch's bilinear interpolation."""
    _, _, down = _between(tiles.lines, tiles.shrunk[0])
    _, _, right = _between(tiles.columns, tiles.shrunk[1])
    down, right = down[:, None], right[None]
    found = np.stack([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], axis=-1)
    breaks = np.broadcast_to(np.array([1.0, 0, 0, 0]), (len(found), 1, 4))
    return np.concatenate([found, breaks], axis=1).reshape(-1, 4).astype(np.float32)


def _between(length: int, shorter: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each of `shorter` positions, its two neighbours among `length`, and its distance from the first, in [0, 1)."""
    at = np.maximum((np.arange(shorter) + 0.5) * (length / shorter) - 0.5, 0)
    first = at.astype(np.int64)
    return first, np.minimum(first + 1, length - 1), at - first
