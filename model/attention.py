"""Causal attention without a mask: right-padded rows need none, and building one costs a host sync per forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "trainer_causal"


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, H, T, D), key and value (B, Hkv, T, D) -> (B, T, H, D), None.

    Padding on the right is never seen by a real token, so causality alone is enough. A sliding window shorter than T
    is the one case where it is not: then the band is written out.
    """
    length = query.shape[2]
    if attention_mask is not None or key.shape[2] != length:
        raise ValueError(f"{NAME} takes whole right-padded sequences: no mask, no cache")
    if sliding_window is not None and length > sliding_window:
        ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
        attention_mask = ones.tril_().triu_(1 - sliding_window)[None, None]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def register() -> None:
    """Make the function known to transformers by name. No mask function is registered, so no mask is ever built for it."""
    AttentionInterface.register(NAME, causal_attention)


def implementation(setting: str) -> str:
    """Name transformers knows `model.attention` by."""
    return NAME if setting == "sdpa" else setting


@contextmanager
def masked_attention(llm: nn.Module) -> Iterator[None]:
    """Inside, the language model uses an attention that honours masks and a cache, as left-padded generation needs."""
    config: Any = llm.config
    before = config._attn_implementation
    config._attn_implementation = "sdpa" if before == NAME else before
    try:
        yield
    finally:
        config._attn_implementation = before
