"""Projectors that join the shrink x shrink patches of a token, which stand one behind the other in packed patches.

State keys are those of transformers' classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.vision.grid_projector import PixelShuffleMlp, PoolMlp

MERGE = 2
"""Side, in patches, of the square that becomes one token."""
MISTRAL_EPSILON = 1e-5
"""Of the norm of Mistral 3's projector, which is that of its language models."""


class PatchMerger(nn.Module):
    """Qwen2-VL's merger: features (1, P, C) -> (1, P / 4, out): a norm of each patch, then two layers on four patches."""

    def __init__(self, in_features: int, out_features: int, norm: Callable[..., nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        wide = in_features * MERGE**2
        self.ln_q = norm(in_features, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, out_features))

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        found: Tensor = self.mlp(joined(self.ln_q(features)))
        return found


class RmsPatchMerger(PatchMerger):
    """Qwen2.5-VL's merger, whose norm is an RMS norm."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, nn.RMSNorm)


class MistralMerger(nn.Module):
    """Mistral 3's projector: features (1, P, C) -> (1, P / 4, out): a norm, a matrix that joins four patches, then two layers.

    The matrix reads the four patches' first channels, then their second ones, and so on.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(in_features, eps=MISTRAL_EPSILON)
        self.merging_layer = nn.Linear(in_features * MERGE**2, in_features, bias=False)
        self.linear_1 = nn.Linear(in_features, out_features, bias=False)
        self.linear_2 = nn.Linear(out_features, out_features, bias=False)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        fours = self.norm(features).unflatten(1, (-1, MERGE**2)).transpose(2, 3).flatten(2)
        found: Tensor = self.linear_2(nn.functional.gelu(self.linear_1(self.merging_layer(fours))))
        return found


class GlmMerger(nn.Module):
    """GLM-4.1V's projector: features (1, P, C) -> (1, P / 4, out): a kernel that joins four patches, then gated layers.

    `inner`: width of the gated layers.
    """

    def __init__(self, in_features: int, out_features: int, inner: int) -> None:
        super().__init__()
        self.downsample = JoiningKernel(in_features, out_features, MERGE)
        self.merger = GlmLayers(out_features, inner)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        # The kernel reads the four patches' first channels, then their second ones, and so on.
        fours = features.unflatten(1, (-1, MERGE**2)).transpose(2, 3).flatten(2)
        found: Tensor = self.merger(self.downsample(fours))
        return found


class JoiningKernel(nn.Conv2d):
    """A kernel that covers each square of patches once, as the matrix product that it is: (..., C * 4) -> (..., out)."""

    def forward(self, squares: Tensor) -> Tensor:
        return nn.functional.linear(squares, self.weight.flatten(1), self.bias)


class GlmLayers(nn.Module):
    """The layers behind GLM-4.1V's kernel, by the names of transformers' class: (..., D) -> (..., D)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)
        self.post_projection_norm = nn.LayerNorm(width)
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        rows = nn.functional.gelu(self.post_projection_norm(self.proj(rows)))
        found: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(rows)) * self.up_proj(rows))
        return found


class PackedShuffleMlp(PixelShuffleMlp):
    """InternVL's `mlp1` on packed patches: features (1, P, C) -> (1, P / 4, out)."""

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        return nn.Sequential.forward(self, joined(features))


class PackedPoolMlp(PoolMlp):
    """The mean of a token's four patches, then `mlp2x_gelu`, on packed patches: features (1, P, C) -> (1, P / 4, out)."""

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        return nn.Sequential.forward(self, features.unflatten(1, (-1, MERGE**2)).mean(dim=2))


class MergerLayers(nn.Module):
    """One merger of Qwen3-VL: features (1, P, C) -> (1, P / 4, out). Its norm stands before or behind the joining."""

    def __init__(self, in_features: int, out_features: int, norm_behind: bool) -> None:
        super().__init__()
        wide = in_features * MERGE**2
        self.norm_behind = norm_behind
        self.norm = nn.LayerNorm(wide if norm_behind else in_features, eps=1e-6)
        self.linear_fc1, self.linear_fc2 = nn.Linear(wide, wide), nn.Linear(wide, out_features)

    def forward(self, features: Tensor) -> Tensor:
        rows = self.norm(joined(features)) if self.norm_behind else joined(self.norm(features))
        found: Tensor = self.linear_fc2(nn.functional.gelu(self.linear_fc1(rows)))
        return found


class DeepMerger(MergerLayers):
    """Qwen3-VL's mergers: features (1, P, C * levels) -> (1, P / 4, out * levels).

    The first level is what the language model embeds; each further one is added behind one of its first layers.
    """

    def __init__(self, in_features: int, out_features: int, levels: int) -> None:
        width = in_features // levels
        super().__init__(width, out_features, norm_behind=False)
        self.levels = levels
        self.deepstack = nn.ModuleList(MergerLayers(width, out_features, norm_behind=True) for _ in range(levels - 1))

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        first, *others = features.chunk(self.levels, dim=-1)
        return torch.cat([super().forward(first), *(merger(level) for merger, level in zip(self.deepstack, others))], dim=-1)


def joined(features: Tensor) -> Tensor:
    """Join the patches of each token: (1, P, C) -> (1, P / 4, 4 * C)."""
    return features.unflatten(1, (-1, MERGE**2)).flatten(2)


MERGERS: dict[str, Callable[[int, int], nn.Module]] = {
    "qwen2_vl_merger": PatchMerger,
    "qwen2_5_vl_merger": RmsPatchMerger,
    "mistral3_merger": MistralMerger,
}
"""Mergers of one level, by kind of projector."""
PACKED_KINDS: dict[str, Callable[[int, int], nn.Module]] = {"pixel_shuffle_mlp": PackedShuffleMlp, "pool_mlp": PackedPoolMlp}
"""Kinds of towers of one square that read packed patches too."""
DEEP_MERGER, GLM_MERGER = "qwen3_vl_merger", "glm4v_merger"
