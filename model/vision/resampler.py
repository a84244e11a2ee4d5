"""The perceiver resampler (Alayrac et al. 2022, Flamingo): learned queries attend to a view with any number of rows."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUERIES = 64
"""Default number of tokens of a view."""
DEPTH = 3
HEADS = 8
HEAD_WIDTH = 64


class CrossAttention(nn.Module):
    """Attention of queries (N, Q, C) to the features (N, L, C) and to themselves -> (N, Q, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = HEADS * HEAD_WIDTH
        self.feature_norm = nn.LayerNorm(width)
        self.query_norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        queries = self.query_norm(queries)
        read = torch.cat([self.feature_norm(features), queries], dim=1)
        q, k, v = (
            rows.unflatten(-1, (HEADS, HEAD_WIDTH)).transpose(1, 2)
            for rows in (self.q_proj(queries), self.k_proj(read), self.v_proj(read))
        )
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = CrossAttention(width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        queries = queries + self.attention(queries, features)
        return queries + self.mlp(queries)


class Resampler(nn.Module):
    """Features (N, L, in) -> (N, num_queries, out): blocks in the width of the features, a norm, and a projection."""

    spreads: ClassVar[dict[str, float]] = {"queries": 1.0}  # see `model.projector.spreads_of`

    def __init__(self, in_features: int, out_features: int, num_queries: int = QUERIES) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(num_queries, in_features))
        self.layers = nn.ModuleList(Block(in_features) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(in_features)
        self.proj = nn.Linear(in_features, out_features)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        queries = self.queries.to(features.dtype).expand(features.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, features)
        return self.proj(self.norm(queries))
