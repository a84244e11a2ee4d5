"""Scores of attention as matrices, where no kernel computes them: a sliding window's band, and capped scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def band(query: Tensor, sliding_window: int | None) -> Tensor:
    """Return the positions that each position sees within the sliding window, (T, T)."""
    ones = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril_()
    return ones if sliding_window is None else ones.triu_(1 - sliding_window)


def seen_behind(query: Tensor, prefix: int, sliding_window: int | None) -> Tensor:
    """Return the keys that each query sees, (T, prefix + T): those of a prefix, and those of its segment up to its own."""
    ones = torch.ones(query.shape[2], prefix + query.shape[2], dtype=torch.bool, device=query.device).tril_(prefix)
    return ones if sliding_window is None else ones.triu_(prefix + 1 - sliding_window)


class CappedScores(NamedTuple):
    """How capped scores become shares."""

    cap: float
    scaling: float | None  # None: 1 / sqrt(D)
    dropout: float


def capped(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, how: CappedScores) -> Tensor:
    """Compute attention whose scores are cap * tanh(score / cap), as in Gemma 2. No kernel of sdpa or varlen caps scores."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if how.scaling is None else how.scaling
    scores = how.cap * torch.tanh(query @ key.transpose(2, 3) * scale / how.cap)
    shares = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
    return (F.dropout(shares, how.dropout) @ value).transpose(1, 2).contiguous()
