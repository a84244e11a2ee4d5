"""Arguments of the decoder by which a batch gets its attention: one of our two functions, or one that takes masks and a cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from model.batch import Batch
from model.llm.attention import NAME, PACKED
from model.llm.interface import CausalLM
from model.llm.picture_attention import pictures_of, prompt_masks


def decoder_options(llm: CausalLM, batch: Batch, embeds: Tensor) -> dict[str, object]:
    """Return the decoder arguments for `batch`, embedded as `embeds`, that restrict every token to its own sample.

    Sets which of our functions the model calls, until the next batch: recomputation in backward must find the same one. Raises
    `ValueError` for a packed batch under another attention, which would attend across the borders.
    """
    config = llm.config
    is_ours = config._attn_implementation in (NAME, PACKED)
    pictures = pictures_of(llm, batch)
    seen = {} if pictures is None else {"pictures": pictures}
    if batch.segment_lengths is None:
        if is_ours:
            config._attn_implementation = NAME
            return {"attention_mask": None, **seen}
        mask = batch.attention_mask
        return {"attention_mask": mask if pictures is None else prompt_masks(pictures, mask, config, embeds)}
    if not is_ours:
        raise ValueError(f"a packed batch under attention {config._attn_implementation!r} would attend across its samples")
    config._attn_implementation = PACKED
    return {
        "attention_mask": None,
        "segment_lengths": batch.segment_lengths,
        "segment_borders": batch.segment_borders,
        "segment_table": torch.tensor(batch.segment_lengths),  # compiled blocks read these two in place of the tuple
        "longest_segment": max(batch.segment_lengths, default=0),
        **({} if batch.shared is None else {"shared_prompts": batch.shared}),
        **seen,
    }


@contextmanager
def masked_attention(llm: CausalLM) -> Iterator[None]:
    """Use, inside the context, an attention that applies masks and a cache, as left-padded generation needs."""
    config = llm.config
    before = config._attn_implementation
    masked = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"  # transformers' sdpa drops a soft cap
    config._attn_implementation = masked if before in (NAME, PACKED) else before
    try:
        yield
    finally:
        config._attn_implementation = before
