"""Text generation: decoding with the key-value cache, greedy or sampled, for a whole batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from model.llm.decoder_options import masked_attention
from model.llm.interface import CausalLM
from model.llm.picture_attention import PictureMasks, prompt_masks


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
    on_token: Callable[[int], None] | None = None  # told each id of the only row as it is chosen; what it raises ends the row


@dataclass(frozen=True)
class Prompts:
    """Prompts that are padded on the LEFT."""

    embeds: Tensor  # (B, T, D)
    mask: Tensor  # (B, T) 1 for real tokens
    position_ids: Tensor | None = None  # (3, B, T) positions of three axes; None: real tokens are counted
    pictures: PictureMasks | None = None  # whose tokens see each other in both directions


def generate(llm: CausalLM, prompts: Prompts, options: GenerationOptions) -> list[list[int]]:
    """Generate new ids for each row, cut before its first stop id. The first one follows the largest position of its prompt.

    Raises `ValueError` for max_new_tokens < 1, and for on_token with several rows.
    """
    if options.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {options.max_new_tokens} is not positive")
    if options.on_token and len(prompts.mask) != 1:
        raise ValueError(f"on_token is told the ids of one row, and there are {len(prompts.mask)}")
    told = None if options.on_token is None else TokenListener(options.on_token, options.stop_ids)
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
    positions = {} if prompts.position_ids is None else {"position_ids": prompts.position_ids}
    with (
        torch.no_grad(),
        masked_attention(llm),
        two_way(llm, prompts),
        no_settings(llm),
        torch.random.fork_rng(enabled=options.seed is not None),
    ):
        if options.seed is not None:
            torch.manual_seed(options.seed)
        ids = llm.generate(
            inputs_embeds=prompts.embeds,
            attention_mask=prompts.mask,
            generation_config=config,
            synced_gpus=options.together,
            streamer=told,
            **positions,
        )
    return [until_stop(row, options.stop_ids) for row in ids.tolist()]


@contextmanager
def two_way(llm: CausalLM, prompts: Prompts) -> Iterator[None]:
    """Let the pictures of the prompts see themselves in both directions inside the context; what is generated is causal."""
    if prompts.pictures is None:
        yield
        return
    masks = prompt_masks(prompts.pictures, prompts.mask, llm.config, prompts.embeds)

    def with_masks(_: nn.Module, args: object, options: dict[str, object]) -> tuple[object, dict[str, object]]:
        reads_prompts = options.get("inputs_embeds") is not None
        return args, {**options, "attention_mask": masks} if reads_prompts else options

    hook = llm.get_decoder().register_forward_pre_hook(with_masks, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class TokenListener:
    """Passes on the ids of one row up to its stop id. A host sync per token."""

    def __init__(self, on_token: Callable[[int], None], stop_ids: tuple[int, ...]) -> None:
        self.on_token, self.stop_ids = on_token, stop_ids

    def put(self, value: Tensor) -> None:
        """Pass on new ids; the first call has the ids of the prompt, of which there are none beside its embeddings."""
        for token in value.reshape(-1).tolist():
            if token not in self.stop_ids:
                self.on_token(token)

    def end(self) -> None:
        """Do nothing: whoever asked for the ids sees the end."""


@contextmanager
def no_settings(llm: CausalLM) -> Iterator[None]:
    """Remove the model's generation settings inside the context: they would fill in arguments that are not given."""
    before, llm.generation_config = llm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        llm.generation_config = before


def until_stop(ids: Sequence[int], stop_ids: Collection[int]) -> list[int]:
    """Return the ids before the first stop id."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return [*ids[:end]]
