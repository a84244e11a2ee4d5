"""Attention of answers to a prompt that stands in a packed row once, on devices without a kernel for packed rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from model.llm.scores import CappedScores, capped, seen_behind

Alone = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Attention of a segment that sees itself alone, by its number."""


class AnswerScores(NamedTuple):
    """How tokens of answers attend."""

    sliding_window: int | None = None
    softcap: float | None = None
    scaling: float | None = None  # None: 1 / sqrt(D)
    dropout: float = 0.0


def behind_prompts(
    module: nn.Module,
    inputs: tuple[Tensor, Tensor, Tensor],
    lengths: tuple[int, ...],
    prefixes: tuple[tuple[int, int], ...],
    alone: Alone,
    how: AnswerScores,
) -> Tensor:
    """Compute attention within segments of `lengths`, each of which sees the earlier part of the row in `prefixes` as well.

    inputs: query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D). One call per segment.
    """
    found, start = [], 0
    for number, (length, (first, seen)) in enumerate(zip(lengths, prefixes, strict=True)):
        query, key, value = (tensor[:, :, start : start + length] for tensor in inputs)
        if seen:
            key, value = (torch.cat([t[:, :, first : first + seen], own], 2) for t, own in zip(inputs[1:], (key, value)))
            found.append(_with_mask(module, (query, key, value), seen, how))
        else:
            found.append(alone(number, query, key, value))
        start += length
    return torch.cat(found, 1)


def _with_mask(module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], seen: int, how: AnswerScores) -> Tensor:
    """Compute attention of query (1, H, T, D) to key and value (1, Hkv, seen + T, D), causal behind the first `seen` keys."""
    mask = seen_behind(inputs[0], seen, how.sliding_window)
    if how.softcap is not None:
        return capped(*inputs, mask, CappedScores(how.softcap, how.scaling, how.dropout))
    found: Tensor = sdpa_attention_forward(module, *inputs, mask[None, None], dropout=how.dropout, scaling=how.scaling)[0]
    return found
