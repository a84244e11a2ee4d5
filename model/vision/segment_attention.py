"""Attention of packed patches: each picture or window attends to itself only, in both directions.

It stands under a name with "flash" in it: transformers' towers then hand all segments to one call, and need not read their lengths
from the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from model.llm.attention import takes_varlen, varlen_segments

NAME = "trainer_flash_segments"


@dataclass(frozen=True)
class Segments:
    """Where the segments of packed patches end, for blocks that hand attention nothing but the mask, whose place it takes."""

    lengths: tuple[int, ...]  # patches of each segment, on the CPU
    borders: Tensor  # (segments + 1,) int32 first patch of each, and the end of the last


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Segments | None,
    *,
    segment_lengths: tuple[int, ...] | None = None,
    segment_borders: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention inside each segment of packed patches: query, key and value (1, H, P, D) -> (1, P, H, D), None.

    One kernel computes all segments where the device has it, else one call per run of segments of equal length. Raises `ValueError`
    if the lengths do not arrive or do not add up: patches would attend across pictures unnoticed.
    """
    if isinstance(attention_mask, Segments):
        segment_lengths, segment_borders, attention_mask = attention_mask.lengths, attention_mask.borders, None
    if segment_lengths is None or segment_borders is None or sum(segment_lengths) != query.shape[2] or attention_mask is not None:
        raise ValueError(f"{NAME}: segments {segment_lengths} do not describe a query of shape {tuple(query.shape)}")
    if takes_varlen(query, value, dropout=dropout):
        options: dict[str, object] = {"scale": scaling, "window_size": (-1, -1)}
        return varlen_segments(query, key, value, segment_borders, max(segment_lengths), options), None
    runs = [(length, len(list(run))) for length, run in groupby(segment_lengths)]
    sizes = [length * count for length, count in runs]
    parts = []
    # Split, not sliced: the gradient of a slice is as large as the whole, with zeros around.
    for (length, count), *run in zip(runs, *(tensor[0].split(sizes, dim=1) for tensor in (query, key, value))):
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in run)  # (segments, H, length, D)
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        parts.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None], None


def register_segments() -> None:
    """Register the function with transformers by name."""
    AttentionInterface.register(NAME, segment_attention)
