"""Attention of answers to a prompt that stands in a packed row once, on devices without a kernel for packed rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from model.llm.scores import CappedScores, capped, seen_behind

Alone = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, None]]
"""Attention of a segment that sees itself alone."""


def behind_prompts(
    module: nn.Module,
    inputs: tuple[Tensor, Tensor, Tensor],
    lengths: tuple[int, ...],
    prefixes: tuple[tuple[int, int], ...],
    alone: Alone,
    **kwargs: Any,
) -> Tensor:
    """Compute attention within segments of `lengths`, each of which sees the earlier part of the row in `prefixes` as well.

    inputs: query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D). One call per segment.
    """
    found, start = [], 0
    for length, (first, seen) in zip(lengths, prefixes, strict=True):
        query, key, value = (tensor[:, :, start : start + length] for tensor in inputs)
        if seen:
            key, value = (torch.cat([t[:, :, first : first + seen], own], 2) for t, own in zip(inputs[1:], (key, value)))
            found.append(_with_mask(module, (query, key, value), seen, **kwargs))
        else:
            found.append(alone(query, key, value)[0])
        start += length
    return torch.cat(found, 1)


def _with_mask(
    module: nn.Module,
    inputs: tuple[Tensor, Tensor, Tensor],
    seen: int,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """Compute attention of query (1, H, T, D) to key and value (1, Hkv, seen + T, D), causal behind the first `seen` keys."""
    mask = seen_behind(inputs[0], seen, sliding_window)
    if softcap is not None:
        return capped(*inputs, mask, CappedScores(softcap, kwargs.get("scaling"), kwargs.get("dropout", 0.0)))
    found: Tensor = sdpa_attention_forward(module, *inputs, mask[None, None], **kwargs)[0]
    return found
