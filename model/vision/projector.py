"""Projectors from vision features to LLM embeddings: pointwise, over 2 x 2 patches, or a resampler; optionally a line break."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from model.config import VisionProjectorConfig
from model.errors import ConfigError
from model.media_spec import ImageSpec
from model.projector import POINTWISE, build_projector, is_pointwise, set_spread
from model.vision.grid_projector import SHRINK, ConvMlp, PixelShuffleMlp, PixelShuffleV1Mlp, PoolMlp, ShuffledMlp
from model.vision.resampler import QUERIES, Resampler

SETTING = "model.vision_projector"


GRID_KINDS: dict[str, Callable[[int, int], nn.Module]] = {
    "pixel_shuffle_mlp": PixelShuffleMlp,
    "pixel_shuffle_v1_mlp": PixelShuffleV1Mlp,
    "pool_mlp": PoolMlp,
    "conv_mlp": ConvMlp,
    "vita_mlp": ShuffledMlp,
}
"""Kinds that make one token of a square of patches."""


RESAMPLER = "resampler"


VISION_KINDS = f"{POINTWISE} | {' | '.join(map(repr, GRID_KINDS))} | {RESAMPLER!r}"


def build_vision_projector(config: VisionProjectorConfig, in_features: int, out_features: int) -> nn.Module:
    """Build the projector of a tower's patches. With a line break it has `image_newline` (out,), initialised as in LLaVA-NeXT."""
    module = _vision_layers(config, in_features, out_features)
    if config.newline:
        module.image_newline = nn.Parameter(torch.empty(out_features))
        set_spread(module, "image_newline", out_features**-0.5)
    return module


def _vision_layers(config: VisionProjectorConfig, in_features: int, out_features: int) -> nn.Module:
    """Build pointwise layers, or one of the kinds that give fewer tokens. Raises `ConfigError` for an unknown kind."""
    if config.kind in GRID_KINDS:
        return GRID_KINDS[config.kind](in_features, out_features)
    if config.kind == RESAMPLER:
        return Resampler(in_features, out_features, config.queries or QUERIES)
    if not is_pointwise(config.kind):
        raise ConfigError(f"{SETTING}.kind = {config.kind!r} is not {VISION_KINDS}")
    return build_projector(SETTING, config.kind, in_features, out_features)


def projected_spec(spec: ImageSpec, projector: VisionProjectorConfig) -> ImageSpec:
    """Return the tower's spec with the projector's effect on its tokens. Raises `ConfigError` when the kind does not fit it."""
    spec = dataclasses.replace(spec, newline=projector.newline)
    if projector.kind == RESAMPLER:
        return dataclasses.replace(spec, queries=projector.queries or QUERIES)
    if projector.kind not in GRID_KINDS:
        return spec
    grid = spec.size // spec.patch
    if spec.select != "patch":
        raise ConfigError(f"{SETTING}.kind = {projector.kind!r} takes patches alone: set model.vision.select = 'patch'")
    if grid % SHRINK:
        raise ConfigError(
            f"{SETTING}.kind = {projector.kind!r} makes one token of {SHRINK} x {SHRINK} patches, but a view has "
            f"{grid} x {grid}: choose a model.vision.image_size that is a multiple of {SHRINK * spec.patch}, or another kind"
        )
    return dataclasses.replace(spec, shrink=SHRINK)
