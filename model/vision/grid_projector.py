"""Projectors that make one token of a square of patches: of 2 x 2 a quarter of the tokens, of 3 x 3 or 4 x 4 yet fewer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.projector import set_spread

SHRINK = 2
"""Usual side, in patches, of the square that becomes one token."""
VITA_SCALE = 0.5
GEMMA_EPSILON = 1e-6
"""Of the norm of Gemma 3's projector, which is that of its tower."""


def squares(features: Tensor, side: int = SHRINK) -> Tensor:
    """Group the patches (N, g * g, C) of square views, row by row -> (N, g / side, g / side, side, side, C).

    Dims 3 and 4 are the rows and columns inside each square.
    """
    grid = math.isqrt(features.shape[1])
    cut = features.unflatten(1, (grid // side, side, grid // side, side))
    return cut.transpose(2, 3)


class PixelShuffleMlp(nn.Sequential):
    """InternVL's `mlp1` after its pixel shuffle (version 2): features (N, g * g, C) -> (N, g * g / 4, out).

    The channels of a square's four patches are concatenated row by row; then LayerNorm, Linear, GELU, Linear. State keys are
    InternVL's.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        wide = in_features * SHRINK**2
        layers = (nn.LayerNorm(wide), nn.Linear(wide, out_features), nn.GELU(), nn.Linear(out_features, out_features))
        super().__init__(*layers)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        return super().forward(squares(features).flatten(3).flatten(1, 2))


class ShuffledLinear(nn.Module):
    """Idefics3's and SmolVLM's connector: features (N, g * g, C) -> (N, g * g / side ** 2, out), one matrix without bias.

    The channels of a square's patches are concatenated row by row. The state key is theirs.
    """

    def __init__(self, in_features: int, out_features: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.proj = nn.Linear(in_features * side**2, out_features, bias=False)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        found: Tensor = self.proj(squares(features, self.side).flatten(3).flatten(1, 2))
        return found


class CentredNorm(nn.Module):
    """Gemma's RMS norm (..., C) -> (..., C), which multiplies by 1 + weight, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        set_spread(self, "weight", 0.0)

    def forward(self, rows: Tensor) -> Tensor:
        wide = rows.float()
        found = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + GEMMA_EPSILON)
        return (found * (1.0 + self.weight.float())).type_as(rows)


class PooledNormLinear(nn.Module):
    """Gemma 3's projector: features (N, g * g, C) -> (N, g * g / side ** 2, out): a square's mean, a norm, a matrix without bias.

    The state keys are its own; the matrix lies on its side, (C, out).
    """

    def __init__(self, in_features: int, out_features: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.mm_soft_emb_norm = CentredNorm(in_features)
        self.mm_input_projection_weight = nn.Parameter(torch.empty(in_features, out_features))
        set_spread(self, "mm_input_projection_weight", in_features**-0.5)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        grid = math.isqrt(features.shape[1])
        means = F.avg_pool2d(features.transpose(1, 2).unflatten(2, (grid, grid)).contiguous(), self.side)
        return self.mm_soft_emb_norm(means.flatten(2).transpose(1, 2)) @ self.mm_input_projection_weight


class ShuffledMlp(nn.Sequential):
    """VITA's InternViT features and `mlp2x_gelu` without LayerNorm: features (N, g * g, C) -> (N, g * g / 4, out).

    VITA multiplies the features by the 0.5 that was meant as the scale of its pixel shuffle; its models are trained so.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        wide = in_features * SHRINK**2
        super().__init__(nn.Linear(wide, out_features), nn.GELU(), nn.Linear(out_features, out_features))

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        return super().forward(squares(features * VITA_SCALE).flatten(3).flatten(1, 2))


class PixelShuffleV1Mlp(PixelShuffleMlp):
    """InternVL's `mlp1` after version 1 of its pixel shuffle, which gives the squares column by column (InternVL-Chat 1.2)."""

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        return nn.Sequential.forward(self, squares(features).transpose(1, 2).flatten(3).flatten(1, 2))


class PoolMlp(nn.Sequential):
    """The mean of a square's four patches, then `mlp2x_gelu`: features (N, g * g, C) -> (N, g * g / 4, out)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features))

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        return super().forward(squares(features).mean(dim=(3, 4)).flatten(1, 2))


class ConvMlp(nn.Sequential):
    """LLaVA-NeXT's `pooler`: a 2 x 2 convolution of stride 2, GELU, Linear: features (N, g * g, C) -> (N, g * g / 4, out).

    A kernel that covers each patch once equals a matrix on the four concatenated patches: VITA's `minigpt` followed by a layer.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(nn.Conv2d(in_features, out_features, SHRINK, SHRINK), nn.GELU(), nn.Linear(out_features, out_features))

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        grid = math.isqrt(features.shape[1])
        convolution, *rest = self
        found = convolution(features.transpose(1, 2).unflatten(2, (grid, grid))).flatten(2).transpose(1, 2)
        for layer in rest:
            found = layer(found)
        return found
