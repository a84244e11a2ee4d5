"""Cost of a sample in work, to give packed ranks equal work, and in memory, to find the heaviest micro-batch.

Both count the tokens of a sample and the encoders behind its media.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import nn

from data.dataset import MultimodalDataset
from data.index.token_estimate import media_tokens
from model.config import ModelConfig
from model.llm.causal_lm import blocks
from model.llm.experts import fused_parameters
from model.media_spec import READ_BY, AudioSpec, MediaMeta, MediaSpec, NativeSpec, row_tokens, view_tokens
from model.multimodal import ENCODERS, MultimodalLM
from model.vision.native_tower import NativeTower
from model.vision.tower import VisionTower
from trainer.distributed.blocks import block_owner
from trainer.memory.native_cost import attention_work, planned_patches


def sample_costs(model: MultimodalLM, config: ModelConfig, dataset: MultimodalDataset) -> np.ndarray:
    """Return (N,) float32 work of each sample, in tokens of the language model: its length plus the work of its media in encoders.

    Media are counted as in the index, before anything is decoded: balancing needs no more precision. Terms that grow with the
    square of a length are left out: they are small beside the rest at the lengths of one sample, but for large pictures in their
    tower.
    """

    def share(part: str) -> float:
        return _position_work(model, config, part) / _position_work(model, config, "llm")

    costs = dataset.lengths.astype(np.float32) + _media_costs(model, dataset, share)
    if (native := _native(model, dataset)) is None:
        return costs
    patches = planned_patches(native[1], dataset)
    work: np.ndarray = costs + patches * attention_work(*native, dataset, patches) * share("vision")
    return work.astype(np.float32)


def media_memory(model: MultimodalLM, dataset: MultimodalDataset, recomputes: bool) -> np.ndarray:
    """Return (N,) float32 memory of each sample's media in their encoders, in tokens of the language model.

    `recomputes`: blocks are recomputed in backward. The tokens of the sample come on top.
    """

    def share(part: str) -> float:
        return position_memory(model, part, recomputes) / position_memory(model, "llm", recomputes)

    return _media_costs(model, dataset, share)


def _media_costs(model: MultimodalLM, dataset: MultimodalDataset, share: Callable[[str], float]) -> np.ndarray:
    """Return (N,) float32 cost of each sample's media. `share(part)`: cost of one position of an encoder, in tokens of the LLM."""
    costs = np.zeros(len(dataset), dtype=np.float32)
    if native := _native(model, dataset):
        costs += planned_patches(native[1], dataset) * share("vision")
    for kind, tokens in media_tokens(dataset.specs, dataset.config).items():
        modality = READ_BY[kind]
        if tokens and (modality != "image" or native is None):
            part = ENCODERS[modality][0]
            counts = np.concatenate([index.num_media(kind) for index in dataset.indexes])
            positions = encoder_positions(model.get_submodule(part), dataset.specs[modality], tokens)
            costs += counts.astype(np.float32) * (positions * share(part))
    return costs


def _native(model: MultimodalLM, dataset: MultimodalDataset) -> tuple[NativeTower, NativeSpec] | None:
    """Return the tower that reads pictures at their own size with its spec; None for a model without."""
    spec = dataset.specs.get("image")
    if not isinstance(spec, NativeSpec):
        return None
    encoder = model.get_submodule(ENCODERS["image"][0])
    assert isinstance(encoder, NativeTower)
    return encoder, spec


def encoder_positions(encoder: nn.Module, spec: MediaSpec, tokens: int) -> float:
    """Return the positions at which the blocks of `encoder` compute for one medium that has `tokens` tokens in the sequence.

    These are the patches of every scale with their prefix, however few tokens are made of them, or all positions of an audio
    window, also where it is filled with silence. Raises TypeError when an encoder of pictures is no VisionTower.
    """
    if isinstance(spec, AudioSpec):
        in_window = sum(row_tokens(spec, MediaMeta(num_frames=spec.window_frames)))
        windows = (tokens - spec.num_prompts) / in_window
        early = math.prod(spec.strides[: spec.num_early])
        return (np.ceil(windows) if spec.full_window else windows) * (spec.window_frames // early)
    if not isinstance(encoder, VisionTower):
        raise TypeError(f"pictures are read by a VisionTower, not by {type(encoder).__name__}")
    squares = sum((size // encoder.sizes[0]) ** 2 for size in encoder.sizes)
    return tokens / view_tokens(spec) * squares * (encoder.blank_length + encoder.num_prefix)


def _position_work(model: MultimodalLM, config: ModelConfig, part: str) -> float:
    """Return the operations per position: two per weight in forward, two for the input's gradient, two for the weights' own."""
    tune = config.parts()[part].tune
    return used_weights(blocks(block_owner(model, part)), _experts_of(model, part)) * (
        2.0 + 2.0 * _carries_gradient(model, part) + 2.0 * (tune == "full")
    )


def used_weights(module: nn.Module, experts_per_token: int) -> float:
    """Return the weights that one position uses: of the fused experts of a mixture, only those it is routed to."""
    fused = set(fused_parameters(module))
    return sum(
        p.numel() * (min(experts_per_token / p.shape[0], 1.0) if name in fused else 1.0) for name, p in module.named_parameters()
    )


def _experts_of(model: MultimodalLM, part: str) -> int:
    """Return the experts that each position of `part` is routed to; without a mixture the number is unused."""
    return int(getattr(model.llm.config, "num_experts_per_tok", 1) or 1) if part == "llm" else 1


def position_memory(model: MultimodalLM, part: str, recomputes: bool) -> float:
    """Return the numbers alive at once for one position: outputs of all blocks on the gradient's path, of one block elsewhere."""
    widths = [
        float(sum(linear.out_features for linear in block.modules() if isinstance(linear, nn.Linear)))
        for block in blocks(block_owner(model, part))
    ]
    if not _carries_gradient(model, part):
        return max(widths)
    hidden = model.llm.get_input_embeddings().embedding_dim if part == "llm" else model.encoder(part).hidden_size
    return max(widths) + len(widths) * hidden if recomputes else sum(widths)


def _carries_gradient(model: MultimodalLM, part: str) -> bool:
    """Return whether the gradient flows through the blocks of `part`."""
    return part == "llm" or part in model.trainable_parts
