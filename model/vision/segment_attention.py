"""Attention of packed patches: each picture or window attends to itself only, in both directions.

It stands under a name with "flash" in it: transformers' towers then hand all segments to one call, and need not read their lengths
from the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from model.llm.attention import takes_varlen, varlen_segments
from model.vision.segment_operator import attend_by_runs, attend_in_graph

NAME = "trainer_flash_segments"


@dataclass(frozen=True)
class Segments:
    """Where the segments of packed patches end. Compiled blocks read the table and the longest in place of the tuple."""

    lengths: tuple[int, ...]  # patches of each segment, on the CPU
    borders: Tensor  # (segments + 1,) int32 first patch of each, and the end of the last
    table: Tensor  # (segments,) int64 lengths, on the CPU
    longest: int  # most patches of a segment


def segments_of(lengths: tuple[int, ...], borders: Tensor) -> Segments:
    """Return the segments of `lengths` patches each."""
    return Segments(lengths, borders, torch.tensor(lengths), max(lengths))


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Segments | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Compute attention inside each segment of packed patches: query, key and value (1, H, P, D) -> (1, P, H, D), None.

    Blocks that hand attention nothing but the mask have the segments in its place. One kernel computes all segments where the
    device has it, else one call per run of segments of equal length. Raises `ValueError` if the segments do not arrive or do not
    add up: patches would attend across pictures unnoticed.
    """
    if isinstance(attention_mask, Segments):
        segments, attention_mask = attention_mask, None
    if segments is None or attention_mask is not None:
        raise ValueError(f"{NAME}: no segments describe a query of shape {tuple(query.shape)}, or a mask stands beside them")
    in_graph = torch.compiler.is_compiling()  # a graph in which the lengths stood as numbers would be of one batch alone
    if not in_graph and sum(segments.lengths) != query.shape[2]:
        raise ValueError(f"{NAME}: segments {segments.lengths} do not describe a query of shape {tuple(query.shape)}")
    if takes_varlen(query, value, dropout=dropout):
        options: dict[str, object] = {"scale": scaling, "window_size": (-1, -1)}
        return varlen_segments(query, key, value, segments.borders, segments.longest, options), None
    if not in_graph:
        return attend_by_runs(query, key, value, segments.lengths, scaling, dropout), None
    if dropout:
        raise ValueError(f"{NAME}: dropout of attention is not compiled: parallel.compile = false")
    return attend_in_graph(query, key, value, segments.table, scaling), None


def register_segments() -> None:
    """Register the function with transformers by name."""
    AttentionInterface.register(NAME, segment_attention)
