"""Projectors from vision features to LLM embeddings: pointwise, over 2 x 2 patches, or a resampler; optionally a line break."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from model.config import VisionProjectorConfig
from model.errors import ConfigError
from model.media_spec import ImageSpec, NativeSpec
from model.projector import POINTWISE, build_projector, is_pointwise, set_spread
from model.vision.grid_projector import (
    SHRINK,
    ConvMlp,
    PixelShuffleMlp,
    PixelShuffleV1Mlp,
    PooledNormLinear,
    PoolMlp,
    ShuffledLinear,
    ShuffledMlp,
)
from model.vision.merger import DEEP_MERGER, GLM_MERGER, MERGE, MERGERS, PACKED_KINDS, DeepMerger, GlmMerger
from model.vision.resampler import QUERIES, Resampler

SETTING = "model.vision_projector"


SHUFFLES = {f"pixel_shuffle{side}_linear": side for side in (2, 3, 4)}
"""Kinds that join squares of this side, in patches, by one matrix."""
POOLS = {f"pool{side}_norm_linear": side for side in (2, 3, 4)}
"""Kinds that take the mean of squares of this side, in patches."""
GRID_KINDS: dict[str, Callable[[int, int], nn.Module]] = {
    "pixel_shuffle_mlp": PixelShuffleMlp,
    "pixel_shuffle_v1_mlp": PixelShuffleV1Mlp,
    "pool_mlp": PoolMlp,
    "conv_mlp": ConvMlp,
    "vita_mlp": ShuffledMlp,
    **{kind: partial(ShuffledLinear, side=side) for kind, side in SHUFFLES.items()},
    **{kind: partial(PooledNormLinear, side=side) for kind, side in POOLS.items()},
}
"""Kinds that make one token of a square of patches."""


RESAMPLER = "resampler"


NATIVE_KINDS = (*MERGERS, DEEP_MERGER, GLM_MERGER)
"""Kinds that make one token of a square of packed patches."""
VISION_KINDS = f"{POINTWISE} | {' | '.join(map(repr, (*GRID_KINDS, *NATIVE_KINDS)))} | {RESAMPLER!r}"


def build_vision_projector(
    config: VisionProjectorConfig, in_features: int, out_features: int, levels: int = 1, *, packed: bool = False, inner: int = 0
) -> nn.Module:
    """Build the projector of a tower's patches. With a line break it has `image_newline` (out,), initialised as in LLaVA-NeXT.

    `levels`: hidden states that stand side by side in the features; `packed`: patches are those of pictures of any shape;
    `inner`: `intermediate_size` of the tower's config.json, as wide as GLM-4.1V's merger is inside. Raises `ConfigError` for a kind
    that reads only one of several hidden states, or lacks its width.
    """
    if (levels > 1) != (config.kind == DEEP_MERGER):
        raise ConfigError(
            f"{SETTING}.kind = {config.kind!r} with a tower that gives {levels} hidden states per patch: {DEEP_MERGER!r} reads "
            "several, every other kind one"
        )
    if levels > 1:
        return DeepMerger(in_features, out_features, levels)
    if config.kind == GLM_MERGER:
        if not inner:
            raise ConfigError(
                f"{SETTING}.kind = {GLM_MERGER!r} is as wide inside as intermediate_size of the tower, which has none"
            )
        return GlmMerger(in_features, out_features, inner)
    if packed and (build := PACKED_KINDS.get(config.kind)) is not None:
        return build(in_features, out_features)
    module = _vision_layers(config, in_features, out_features)
    if config.newline:
        module.image_newline = nn.Parameter(torch.empty(out_features))
        set_spread(module, "image_newline", out_features**-0.5)
    return module


def _vision_layers(config: VisionProjectorConfig, in_features: int, out_features: int) -> nn.Module:
    """Build pointwise layers, or one of the kinds that give fewer tokens. Raises `ConfigError` for an unknown kind."""
    if (build := {**GRID_KINDS, **MERGERS}.get(config.kind)) is not None:
        return build(in_features, out_features)
    if config.kind == RESAMPLER:
        return Resampler(in_features, out_features, config.queries or QUERIES)
    if not is_pointwise(config.kind):
        raise ConfigError(f"{SETTING}.kind = {config.kind!r} is not {VISION_KINDS}")
    return build_projector(SETTING, config.kind, in_features, out_features)


def projected_spec(spec: ImageSpec, projector: VisionProjectorConfig) -> ImageSpec:
    """Return the tower's spec with the projector's effect on its tokens. Raises `ConfigError` when the kind does not fit it."""
    if isinstance(spec, NativeSpec):
        return _native_spec(spec, projector)
    if projector.kind in NATIVE_KINDS:
        raise ConfigError(f"{SETTING}.kind = {projector.kind!r} joins packed patches; this tower sees one square: {VISION_KINDS}")
    spec = dataclasses.replace(spec, newline=projector.newline)
    if projector.kind == RESAMPLER:
        return dataclasses.replace(spec, queries=projector.queries or QUERIES)
    if projector.kind not in GRID_KINDS:
        return spec
    grid, side = spec.size // spec.patch, {**SHUFFLES, **POOLS}.get(projector.kind, SHRINK)
    if spec.select != "patch":
        raise ConfigError(f"{SETTING}.kind = {projector.kind!r} takes patches alone: set model.vision.select = 'patch'")
    if grid % side:
        raise ConfigError(
            f"{SETTING}.kind = {projector.kind!r} makes one token of {side} x {side} patches, but a view has "
            f"{grid} x {grid}: choose a model.vision.image_size that is a multiple of {side * spec.patch}, or another kind"
        )
    return dataclasses.replace(spec, shrink=side)


def _native_spec(spec: NativeSpec, projector: VisionProjectorConfig) -> NativeSpec:
    """Return the spec of a tower of variable size with the projector's effect. Raises `ConfigError` for kinds that do not fit."""
    joining = (*NATIVE_KINDS, *PACKED_KINDS)
    if projector.newline or (projector.kind not in joining and not is_pointwise(projector.kind)):
        given = f"kind = {projector.kind!r}, newline = {str(projector.newline).lower()}"
        raise ConfigError(
            f"{SETTING}: {given} does not fit a tower that reads pictures at their own size: use {POINTWISE} or "
            f"{' | '.join(map(repr, joining))}, without newline"
        )
    if projector.kind not in joining:
        return spec
    multiple = math.lcm(spec.multiple, MERGE)
    return dataclasses.replace(spec, shrink=MERGE, multiple=multiple, size=spec.patch * multiple)
