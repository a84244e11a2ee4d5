"""Where packed patches stand: their order, rows and columns, the windows they attend in, and their share of a table of positions.

Everything follows from the grids of patches alone and is computed on the CPU, so that no device is searched or waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import Media, Patches
from model.media_spec import MediaSpec, NativeSpec, row_shape

Grid = tuple[int, int, int]
"""Patches of one picture or video: pairs of frames, down and across."""


def patch_layout(grids: Sequence[Grid], spec: NativeSpec) -> Patches:
    """Return where the patches of all `grids`, one behind the other, stand."""
    frames = [(high, wide) for times, high, wide in grids for _ in range(times)]
    lengths = tuple(high * wide for high, wide in frames)
    found = Patches(
        torch.from_numpy(np.concatenate([patch_places(high, wide, spec.shrink) for high, wide in frames])),
        lengths,
        _borders(lengths),
    )
    if spec.table and (spec.antialias or spec.bicubic):
        parts = [axis_shares(high, wide, spec) for high, wide in frames]
        rows, columns = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts))
        return replace(found, row_shares=rows, column_shares=columns)
    if spec.table:
        mixed = [table_shares(high, wide, spec) for high, wide in frames]
        corners, shares = (torch.from_numpy(np.concatenate(part)) for part in zip(*mixed))
        found = replace(found, corners=corners, shares=shares)
    return _with_windows(found, frames, spec) if spec.window else found


@lru_cache(maxsize=256)
def patch_places(high: int, wide: int, shrink: int) -> np.ndarray:
    """Return row and column (high * wide, 2) int64 of each patch, in the order in which they are packed: the shrink x shrink
    patches of a token row by row, and tokens row by row.
    """
    rows, columns = np.divmod(np.arange(high * wide), wide)
    blocks = np.stack([rows, columns], axis=1).reshape(high // shrink, shrink, wide // shrink, shrink, 2)
    found = np.ascontiguousarray(blocks.swapaxes(1, 2)).reshape(-1, 2)
    found.flags.writeable = False
    return found


def _with_windows(found: Patches, frames: list[tuple[int, int]], spec: NativeSpec) -> Patches:
    """Add the squares of spec.window pixels that every frame is cut into, the smaller ones at edges first."""
    side = spec.window // spec.patch // spec.shrink
    windows, first = [], 0
    for high, wide in frames:
        cut = _windows(high // spec.shrink, wide // spec.shrink, side)
        windows += [window + first for window in cut]
        first += sum(len(window) for window in cut)
    lengths = [len(window) * spec.shrink**2 for window in windows]
    order = np.concatenate(windows)
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    return replace(
        found,
        window_order=torch.from_numpy(order),
        window_places=torch.from_numpy(places),
        window_lengths=tuple(lengths),
        window_borders=_borders(lengths),
    )


@lru_cache(maxsize=256)
def _windows(high: int, wide: int, side: int) -> tuple[np.ndarray, ...]:
    """Return the tokens of each window of a frame of high x wide tokens; those of equal size stand together, to be computed so."""
    index = np.arange(high * wide).reshape(high, wide)
    cut = [index[top : top + side, left : left + side].ravel() for top in range(0, high, side) for left in range(0, wide, side)]
    return tuple(sorted(cut, key=len))


def table_shares(high: int, wide: int, spec: NativeSpec) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows (P, 4) int64 of the table of positions that each patch mixes, and their weights (P, 4) float32: bilinear."""
    rows, columns = patch_places(high, wide, spec.shrink).T
    below, above, down = _neighbours(high, spec)
    left, right, across = _neighbours(wide, spec)
    corners = [(below, left), (below, right), (above, left), (above, right)]
    indices = np.stack([lower[rows] * spec.table + side[columns] for lower, side in corners], axis=1)
    share, along = down[rows], across[columns]
    weights = np.stack([(1 - share) * (1 - along), (1 - share) * along, share * (1 - along), share * along], axis=1)
    return indices, weights.astype(np.float32)


def axis_shares(high: int, wide: int, spec: NativeSpec) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares (P, S) float32 of the S rows, and of the S columns, of the table of positions in each patch's position."""
    rows, columns = patch_places(high, wide, spec.shrink).T
    mode = "bicubic" if spec.bicubic else "bilinear"
    return _line_shares(high, spec.table, mode)[rows], _line_shares(wide, spec.table, mode)[columns]


@lru_cache(maxsize=256)
def _line_shares(length: int, table: int, mode: str) -> np.ndarray:
    """Return the shares (length, table) float32 with which torch resizes a line of `table` numbers: bilinear with antialias, or
    bicubic without.
    """
    # As a square: torch 2.13 resizes to (length, 1) with antialias wrongly on the CPU.
    unit = torch.eye(table)[None, None]
    smooth = mode == "bilinear"
    return F.interpolate(unit, size=(length, table), mode=mode, align_corners=False, antialias=smooth)[0, 0].numpy()


def _neighbours(length: int, spec: NativeSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows of the table around each of `length` patches of a side, and the share of the second, in float32 as torch."""
    places = np.arange(length, dtype=np.float32)
    if spec.align_corners:
        at = places * np.float32(spec.table - 1) / np.float32(max(length - 1, 1))
    else:
        at = (places + np.float32(0.5)) * np.float32(spec.table) / np.float32(length) - np.float32(0.5)
    at = at.clip(0, spec.table - 1)
    first = np.floor(at).astype(np.int64)
    return first, np.minimum(first + 1, spec.table - 1), at - first.astype(np.float32)


def _borders(lengths: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))


def blank_media(spec: MediaSpec, device: torch.device) -> Media:
    """Return the blank picture or clip of a batch without media, no row of which becomes a token."""
    none = torch.zeros(0, dtype=torch.long, device=device)
    if not isinstance(spec, NativeSpec):
        return Media(torch.zeros(1, *row_shape(spec), device=device), none, none)
    side = max(spec.shrink, spec.multiple)
    values = torch.zeros(side**2, *row_shape(spec), device=device)
    return Media(values, none, none, patches=patch_layout([(1, side, side)], spec)).to(device)
