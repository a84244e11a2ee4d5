"""Position embeddings for another picture size: resized once, when they are read."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model.files.tensor_files import LazyTensor
from model.vision.tower_kinds import TowerFamily


def resize_positions(rows: LazyTensor, shape: tuple[int, ...], kind: TowerFamily) -> LazyTensor:
    """Resize the position embeddings (P, C) or (1, P, C) of a square grid to `shape`; rows of prefix tokens (CLS) stay unchanged.

    Bicubic in float32 without aligned corners, as transformers' `interpolate_pos_encoding` does in every forward. The whole table
    is computed before rows are taken, so that the rows of every rank come from the same table. A table of another width, or one
    that is not of a square grid, is returned unchanged.
    """
    grid, old = (math.isqrt(s[-2] - kind.num_prefix) for s in (shape, rows.shape))
    if rows.shape == shape or rows.shape[-1] != shape[-1] or old**2 + kind.num_prefix != rows.shape[-2]:
        return rows

    def read(start: int, stop: int) -> Tensor:
        table = rows.all().float().reshape(-1, shape[-1])
        patches = on_grid(table[kind.num_prefix :], old, grid, kind.antialias)
        return torch.cat([table[: kind.num_prefix], patches]).reshape(shape)[start:stop]

    return LazyTensor(shape, read)


def on_grid(table: Tensor, old: int, new: int, antialias: bool) -> Tensor:
    """Resize a square grid of embeddings, (old * old, C) -> (new * new, C)."""
    picture = table.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    picture = F.interpolate(picture, size=(new, new), mode="bicubic", align_corners=False, antialias=antialias)
    return picture.permute(0, 2, 3, 1).reshape(new * new, -1)
