"""Text generation: decoding with the key-value cache, greedy or sampled, for a whole batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig

from model.llm.attention import masked_attention
from model.llm.interface import CausalLM


def generate(
    llm: CausalLM,
    embeds: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    *,
    stop_ids: tuple[int, ...],
    pad_id: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> list[list[int]]:
    """Generate new ids for each row, cut before its first stop id. embeds (B, T, D) and mask (B, T) are prompts padded on the LEFT.

    temperature 0 is greedy; otherwise ids are sampled from softmax(logits / temperature) cut to the `top_p` nucleus, by the global
    generator, or by one seeded with `seed` that leaves the global one unchanged. Raises `ValueError` for max_new_tokens < 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens} is not positive")
    sampling: dict[str, bool | float] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
        **sampling,
    )
    with torch.no_grad(), masked_attention(llm), no_settings(llm), torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        ids = llm.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config)
    return [_until_stop(row, stop_ids) for row in ids.tolist()]


@contextmanager
def no_settings(llm: CausalLM) -> Iterator[None]:
    """Remove the model's generation settings inside the context: they would fill in arguments that are not given."""
    before, llm.generation_config = llm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        llm.generation_config = before


def _until_stop(ids: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]
