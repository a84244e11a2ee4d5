"""Text generation: decoding with the key-value cache, greedy or sampled, for a whole batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig

from model.llm.attention import masked_attention
from model.llm.interface import CausalLM


@dataclass(frozen=True)
class GenerationOptions:
    """How ids are chosen, and when a row ends.

    temperature 0 is greedy; otherwise ids are sampled from softmax(logits / temperature) cut to the `top_p` nucleus, by the global
    generator, or by one seeded with `seed` that leaves the global one unchanged.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    together: bool = False  # go on until all ranks have ended: they share the weights, and each pass gathers them


def generate(llm: CausalLM, embeds: Tensor, mask: Tensor, options: GenerationOptions) -> list[list[int]]:
    """Generate new ids for each row, cut before its first stop id. embeds (B, T, D) and mask (B, T) are prompts padded on the LEFT.

    Raises `ValueError` for max_new_tokens < 1.
    """
    if options.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {options.max_new_tokens} is not positive")
    sampling: dict[str, bool | float] = {"do_sample": options.temperature > 0}
    if options.temperature > 0:
        sampling |= {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        eos_token_id=list(options.stop_ids) or None,
        pad_token_id=options.pad_id,
        use_cache=True,
        **sampling,
    )
    with torch.no_grad(), masked_attention(llm), no_settings(llm), torch.random.fork_rng(enabled=options.seed is not None):
        if options.seed is not None:
            torch.manual_seed(options.seed)
        ids = llm.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config, synced_gpus=options.together)
    return [_until_stop(row, options.stop_ids) for row in ids.tolist()]


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
