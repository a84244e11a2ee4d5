"""Causal attention without a mask, for padded and for packed rows; building a mask would cost a host sync per forward.

Rows padded on the right need none: no real token sees what comes after it. In a packed row every segment attends to itself alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from model.batch import Batch
from model.config import OUR_ATTENTION

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

VARLEN_OPTIONS = inspect.signature(varlen_attn).parameters.keys() if varlen_attn is not None else frozenset()
NAME = "trainer_causal"
PACKED = "trainer_packed"
VARLEN_DTYPES = (torch.bfloat16, torch.float16)
VARLEN_HEAD, VARLEN_CAPABILITY = 256, (8, 0)  # the largest head and the oldest GPU of the flash kernel behind it


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (B, H, T, D), key and value (B, Hkv, T, D) -> (B, T, H, D), None.

    Padding on the right is never seen by a real token, so causality alone is enough. A sliding window shorter than T
    is the one case where it is not: then the band is written out. So are the scores (B, H, T, T) if they are capped.
    """
    length = query.shape[2]
    if attention_mask is not None or key.shape[2] != length:
        raise ValueError(f"{NAME} takes whole right-padded sequences: no mask, no cache")
    if softcap is not None:
        return _capped(query, key, value, _band(query, sliding_window), softcap, **kwargs), None
    if sliding_window is not None and length > sliding_window:
        attention_mask = _band(query, sliding_window)[None, None]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _band(query: Tensor, sliding_window: int | None) -> Tensor:
    """(T, T): what each position sees."""
    ones = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril_()
    return ones if sliding_window is None else ones.triu_(1 - sliding_window)


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    softcap: float,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> Tensor:
    """Attention whose scores are cap * tanh(score / cap), as Gemma 2 has it: no kernel of sdpa or varlen does that."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    shares = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32).to(query.dtype)
    return (F.dropout(shares, dropout) @ value).transpose(1, 2).contiguous()


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segment_lengths: tuple[int, ...] | None = None,
    segment_borders: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query (1, H, T, D), key and value (1, Hkv, T, D), T = sum(segment_lengths) -> (1, T, H, D), None.

    Each segment is causal attention of its own: nothing crosses a border, in either direction. One kernel for all of them
    where the device has it (`torch.nn.attention.varlen`), else one call per segment. Neither waits for the device.
    Raises `ValueError` if the lengths do not arrive or do not add up, which a model that swallows them would otherwise hide.
    """
    length = query.shape[2]
    if segment_lengths is None or segment_borders is None or (1, sum(segment_lengths)) != (query.shape[0], length):
        raise ValueError(f"{PACKED}: segment lengths {segment_lengths} do not describe a query of shape {tuple(query.shape)}")
    if attention_mask is not None or key.shape[2] != length or kwargs.get("position_bias") is not None:
        raise ValueError(f"{PACKED} takes whole packed rows: no mask, no cache, no position bias")
    if takes_varlen(query, value, **kwargs):
        return _varlen(query, key, value, segment_lengths, segment_borders, **kwargs), None
    parts = zip(*(tensor.split(segment_lengths, 2) for tensor in (query, key, value)))
    return torch.cat([causal_attention(module, q, k, v, None, **kwargs)[0] for q, k, v in parts], 1), None


def takes_varlen(
    query: Tensor,
    value: Tensor,
    *,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **_: Any,
) -> bool:
    """Whether the one kernel for all segments computes what is asked for, here."""
    if softcap is not None or not query.is_cuda or not {"window_size", "scale"} <= VARLEN_OPTIONS:
        return False
    width = query.shape[-1]
    fits = query.dtype in VARLEN_DTYPES and width == value.shape[-1] <= VARLEN_HEAD and width % 8 == 0
    return fits and not dropout and is_causal is not False and torch.cuda.get_device_capability(query.device) >= VARLEN_CAPABILITY


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: tuple[int, ...],
    borders: Tensor,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1 if sliding_window is None else sliding_window - 1, 0)}
    if "enable_gqa" in VARLEN_OPTIONS:
        options["enable_gqa"] = groups > 1
    else:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))  # (T, H, D)
    longest = max(segment_lengths)
    out: Any = varlen_attn(q, k, v, borders, borders, longest, longest, **options)
    return out[None]


def register() -> None:
    """Make both functions known to transformers by name. No mask function is registered, so no mask is ever built for them."""
    AttentionInterface.register(NAME, causal_attention)
    AttentionInterface.register(PACKED, packed_attention)


def implementation(setting: str) -> str:
    """Name transformers knows `model.llm.attention` by. Ours chooses between its two functions batch by batch."""
    return NAME if setting in OUR_ATTENTION else setting


def decoder_options(llm: nn.Module, batch: Batch) -> dict[str, Any]:
    """What the decoder must be told of `batch`, so that tokens see nothing but their own sample.

    Sets which of our functions the model calls, until the next batch: recomputation in backward must find the same one.
    Raises `ValueError` for a packed batch under another attention, which would look across the borders.
    """
    config: Any = llm.config
    is_ours = config._attn_implementation in (NAME, PACKED)
    if batch.segment_lengths is None:
        if is_ours:
            config._attn_implementation = NAME
        return {"attention_mask": None if is_ours else batch.attention_mask}
    if not is_ours:
        raise ValueError(f"a packed batch under attention {config._attn_implementation!r} would attend across its samples")
    config._attn_implementation = PACKED
    return {"attention_mask": None, "segment_lengths": batch.segment_lengths, "segment_borders": batch.segment_borders}


@contextmanager
def masked_attention(llm: nn.Module) -> Iterator[None]:
    """Inside, the language model uses an attention that honours masks and a cache, as left-padded generation needs."""
    config: Any = llm.config
    before = config._attn_implementation
    masked = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"  # transformers' sdpa drops a soft cap
    config._attn_implementation = masked if before in (NAME, PACKED) else before
    try:
        yield
    finally:
        config._attn_implementation = before
