"""S2, scaling on scales (Shi et al. 2024, as LLaVA's `s2` does): a picture seen at several sizes by a tower of one size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def scale_tiles(values: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Resize pixels (N, 3, S, S) to every size, and cut them into squares of the first size, b -> (M, 3, b, b).

    The order is by size, then picture, then row. Bicubic in float32; each size is resized directly from the input.
    """
    found, base = [], sizes[0]
    for size in sizes:
        # A picture that has this size already would be bitwise the same after resizing.
        picture = values if size == values.shape[-1] else F.interpolate(values.float(), size=(size, size), mode="bicubic")
        across = size // base
        cut = picture.to(values.dtype).unflatten(2, (across, base)).unflatten(4, (across, base))
        found.append(cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2))
    return torch.cat(found)


def merge_scales(features: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Merge the features (M, g * g, C) of the squares of `tiles` -> (N, g * g, C * sizes): join the squares of each size, average
    them to one grid, and concatenate the sizes along channels.
    """
    counts = [(size // sizes[0]) ** 2 for size in sizes]
    num_pictures, grid = features.shape[0] // sum(counts), math.isqrt(features.shape[1])
    found = []
    for part, count in zip(features.split([num_pictures * count for count in counts]), counts, strict=True):
        across = math.isqrt(count)
        cells = part.reshape(num_pictures, across, across, grid, grid, -1).permute(0, 1, 3, 2, 4, 5)
        # Cell (y, x) of the output is the mean of across x across cells of the joined grid: one reshape groups them.
        cells = cells.reshape(num_pictures, grid, across, grid, across, -1)
        found.append(cells.float().mean(dim=(2, 4)).to(features.dtype).flatten(1, 2))
    return torch.cat(found, dim=-1)
