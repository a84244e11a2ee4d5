"""Features that are added to the hidden states behind a decoder's first blocks (DeepStack, Meng et al. 2024; Qwen3-VL).

They come in with the embeddings, side by side: whatever is done with embeddings is done with them too, and a decoder that did not
take them apart would raise an error of shapes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from model.errors import ConfigError
from model.llm.causal_lm import blocks


def widened(embeds: Tensor, levels: int) -> Tensor:
    """Return embeddings (B, T, D) with zeros for the features of further levels beside them, (B, T, D * levels)."""
    return F.pad(embeds, (0, embeds.shape[-1] * (levels - 1))) if levels > 1 else embeds


class EarlyFeatures:
    """Takes embeddings (B, T, D * levels) apart where a decoder is called: the first D are embedded, and the next ones are added
    behind its block 0, block 1, ...

    Hooks do so around the blocks, outside of what is compiled or computed again in backward. They hold features during one call of
    the decoder alone, and let a call with plain embeddings (B, T, D) pass: a step of generation behind its prompt.
    """

    def __init__(self, decoder: nn.Module, width: int, levels: int) -> None:
        """Register the hooks. Raises `ConfigError` when the decoder has fewer blocks than there are levels to add."""
        found = blocks(decoder)
        if levels - 1 > len(found):
            raise ConfigError(
                f"model.vision gives features for {levels - 1} layers of the language model (deepstack_visual_indexes in "
                f"config.json), and it has {len(found)}: choose another model.llm.path"
            )
        self.width = width
        self.waiting: list[Tensor] = []
        decoder.register_forward_pre_hook(self._take_apart, with_kwargs=True)
        decoder.register_forward_hook(self._forget, always_call=True)
        for level, block in enumerate(found[: levels - 1]):
            block.register_forward_hook(partial(self._add, level))

    def _take_apart(self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        embeds = options.get("inputs_embeds")
        if not isinstance(embeds, Tensor) or embeds.shape[-1] == self.width:
            return args, options
        first, *self.waiting = embeds.split(self.width, dim=-1)
        # A copy: what backward keeps of it would else keep all levels.
        return args, {**options, "inputs_embeds": first.contiguous()}

    def _add(self, level: int, block: nn.Module, args: object, hidden: Tensor) -> Tensor:
        return hidden + self.waiting[level].to(hidden.dtype) if self.waiting else hidden

    def _forget(self, *_: object) -> None:
        self.waiting = []
