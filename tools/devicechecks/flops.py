"""Useful operations of a step: what the task needs, whatever a program computes beside it.

Real tokens alone count: no padding, nothing twice, the head and the last MLP on supervised rows only, causal attention half. A
product of a frozen matrix counts forward and the gradient of its input, a trained one the gradient of the matrix too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from model.batch import Batch, Media
from model.llm.causal_lm import blocks, head_weight
from model.llm.quantized_linear import Quantised
from model.lora import LoraLinear
from model.media_spec import image_spec
from model.multimodal import MultimodalLM
from model.vision.grid_projector import PooledNormLinear
from model.vision.native_tower import NativeTower
from model.vision.patch_tower import PatchLinear
from model.vision.tower import VisionTower

FORWARD, INPUT, WEIGHT = 2, 2, 2
"""Operations per number of a matrix and row: the product, the gradient of its input and its own."""


@dataclass(frozen=True)
class Flops:
    """Useful floating-point operations of one micro-batch, forward and backward."""

    decoder: float
    attention: float  # of the language model
    head: float
    tower: float  # its attention included
    projector: float

    @property
    def total(self) -> float:
        return self.decoder + self.attention + self.head + self.tower + self.projector


def useful_flops(model: MultimodalLM, batch: Batch) -> Flops:
    """Count the useful operations of a micro-batch of text and pictures; a trained projector or a trained decoder is assumed."""
    tokens, layers = batch.num_real_tokens, blocks(model.llm.get_decoder())
    decoder = sum(matrix_flops(layer) for layer in products(layers)) * tokens
    if model.selects_rows:
        unread = tokens - batch.num_supervised
        decoder -= sum(matrix_flops(layer) for layer in products(layers[-1].get_submodule("mlp"))) * unread
    config = model.llm.config
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Scores and their products with the values, 2 operations each, half of them causal; backward is twice forward.
    attention = 6.0 * len(layers) * config.num_attention_heads * head_width * sum(n * n for n in batch.lengths)
    weight = head_weight(model.llm)
    head = (FORWARD + INPUT + WEIGHT * weight.requires_grad) * weight.numel() * batch.num_supervised
    tower, projector = media_flops(model, batch)
    return Flops(float(decoder), attention, float(head), tower, projector)


def media_flops(model: MultimodalLM, batch: Batch) -> tuple[float, float]:
    """Return the operations of the tower and of its projector."""
    media = batch.media.get("image")
    if media is None:
        return 0.0, 0.0
    encoder, projector = model.encoder("vision"), model.get_submodule("vision_projector")
    if isinstance(encoder, NativeTower):
        patches, forward = len(media.values), native_forward(encoder, media)
    else:
        assert isinstance(encoder, VisionTower)
        patches, forward = len(media.values) * encoder.blank_length, len(media.values) * view_forward(encoder)
    learns = "vision" in model.trainable_parts
    if isinstance(projector, PooledNormLinear):  # its matrix is no layer, and a norm that learns stands before it
        size = projector.mm_input_projection_weight.numel()
        return forward * (3 if learns else 1), float(patches // projector.side**2 * (FORWARD + INPUT + WEIGHT) * size)
    layers = products(projector)
    each = [matrix_flops(layer) for layer in layers]
    if not learns and next(projector.parameters()) is layers[0].weight:  # nothing below this product learns
        each[0] -= INPUT * layers[0].weight.numel()
    return forward * (3 if learns else 1), float(patches // image_spec(model.specs).shrink ** 2 * sum(each))


def view_forward(encoder: VisionTower) -> float:
    """Return the operations of a forward of one view."""
    rows, layers = encoder.blank_length + encoder.num_prefix, blocks(encoder.tower)
    matrices = sum(layer.weight.numel() for layer in products(layers)) * rows
    patches = sum(m.weight.numel() for m in encoder.tower.modules() if isinstance(m, nn.Conv2d)) * encoder.blank_length
    return FORWARD * (matrices + patches) + 4.0 * len(layers) * encoder.hidden_size * rows**2


def native_forward(encoder: NativeTower, media: Media) -> float:
    """Return the operations of a forward of packed patches; each attends to those of its picture, or in some blocks its window."""
    assert media.patches is not None
    tower, layers = encoder.tower, blocks(encoder.tower)
    matrices = sum(m.weight.numel() for m in tower.modules() if isinstance(m, nn.Linear | PatchLinear))
    windowed = media.patches.window_lengths
    whole = len(layers) if windowed is None else len(getattr(tower, "whole_blocks", layers))
    pairs = whole * sum(n * n for n in media.patches.lengths) + (len(layers) - whole) * sum(n * n for n in windowed or ())
    return float(FORWARD * matrices * len(media.values)) + 4.0 * encoder.hidden_size / encoder.levels * pairs


def products(module: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of a module."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def matrix_flops(layer: nn.Linear) -> int:
    """Return the operations per row of a linear layer on the gradient's path, with those of its adapter."""
    size = layer.in_features * layer.out_features
    is_trained = not isinstance(layer, Quantised) and layer.weight.requires_grad
    found = (FORWARD + INPUT + WEIGHT * is_trained) * size
    if isinstance(layer, LoraLinear):
        found += (FORWARD + INPUT + WEIGHT) * (layer.lora_A.numel() + layer.lora_B.numel())
    return found
