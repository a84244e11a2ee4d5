"""The parts of a multimodal model that preference tuning needs of it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from model.batch import Batch
from model.llm.interface import CausalLM


class ScoredModel(Protocol):
    """A model whose answers can be scored; `model.multimodal.MultimodalLM` is one."""

    llm: CausalLM
    dtype: torch.dtype
    trainable_parts: frozenset[str]

    def embed(self, batch: Batch) -> Tensor:
        """Embed input_ids (B, T) with media -> (B, T, D)."""

    def decode_embeds(self, embeds: Tensor, batch: Batch) -> Tensor:
        """Compute the decoder's output (B, T, D)."""
