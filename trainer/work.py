"""What a sample costs, so that packed ranks can be given equal work: its tokens, and the encoders behind its media."""

from __future__ import annotations

import numpy as np

from data.dataset import MultimodalDataset
from data.estimate import media_tokens
from model.batch import READ_BY
from model.config import ModelConfig
from model.llm import blocks
from model.multimodal import ENCODERS, MultimodalLM
from trainer.parallel import block_owner


def sample_costs(model: MultimodalLM, config: ModelConfig, dataset: MultimodalDataset) -> np.ndarray:
    """(N,) float32 work of each sample, in tokens of the language model: its length, plus what its media cost in their encoders.

    Media count as the index does, before anything is decoded: balance needs no more. What grows with the square of a length is
    left out, as it is small beside the rest at the lengths of one sample.
    """
    costs = dataset.lengths.astype(np.float32)
    for kind, tokens in media_tokens(dataset.specs, dataset.config).items():
        if tokens:
            counts = np.concatenate([index.num_media(kind) for index in dataset.indexes])
            costs += counts.astype(np.float32) * (tokens * encoder_share(model, config, ENCODERS[READ_BY[kind]][0]))
    return costs


def encoder_share(model: MultimodalLM, config: ModelConfig, part: str) -> float:
    """Work of an encoder for one token it makes, over that of the language model for one token."""
    return _token_work(model, config, part) / _token_work(model, config, "llm")


def _token_work(model: MultimodalLM, config: ModelConfig, part: str) -> float:
    """Operations per token: two per weight of a block in forward, two for the gradient of its input, two for the weights' own."""
    tune = config.parts()[part].tune
    carries_gradient = part == "llm" or part in model.trainable_parts
    num_weights = sum(p.numel() for p in blocks(block_owner(model, part)).parameters())
    return num_weights * (2.0 + 2.0 * carries_gradient + 2.0 * (tune == "full"))
