"""The language model as this project sees it: transformers' getters have no types of their own, here they have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig


@dataclass(frozen=True)
class LogitChange:
    """The function x -> scale * x, then cap * tanh(x / cap) if there is a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, products: Tensor) -> Tensor:
        logits = products if self.scale == 1.0 else products * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def gradient(self, logits: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient with respect to the products, from `grad` with respect to the logits. `grad` may be overwritten."""
        if self.cap is not None:
            grad = grad.mul_(1 - (logits / self.cap).square())
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


UNCHANGED = LogitChange()


class IdListener(Protocol):
    """Follower of a row that is generated, as transformers' streamers are."""

    def put(self, value: Tensor) -> None:
        """Take new ids."""

    def end(self) -> None:
        """Take note of the end."""


class CausalLM(nn.Module):
    """Interface of transformers' causal language models. Only a type: no object is made of it, `build_llm` casts to it.

    A wrapper would change the names of parameters; the models themselves stay, under their own classes.
    """

    config: PretrainedConfig
    generation_config: GenerationConfig
    base_model_prefix: str
    """Attribute that holds the decoder, which stands before the names of its tensors."""
    logit_change: LogitChange
    """What the model does with its head's products; set by `build_llm`."""
    image_attention: str
    """'causal', set by `build_llm`, or 'two_way', by `allow_two_way`: tokens of one picture see each other in both directions."""

    def get_decoder(self) -> nn.Module:
        """Return the decoder: embeddings (B, T, D) to hidden states, without the head."""
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the embedding (V, D)."""
        raise NotImplementedError

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head (V, D), of which `head_weight` has proven that it is a linear layer without bias."""
        raise NotImplementedError

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and the weights into `folder`."""
        raise NotImplementedError

    def generate(
        self,
        *,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        generation_config: GenerationConfig,
        synced_gpus: bool,
        streamer: IdListener | None,
        position_ids: Tensor = ...,
    ) -> Tensor:
        """Return the generated ids (B, new tokens), and tell `streamer` each as it is chosen. `position_ids` are those of the
        prompt, on whose last ones later positions follow.
        """
        raise NotImplementedError
