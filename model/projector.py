"""From encoder features to LLM embeddings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.batch import ImageSpec
from model.config import ConfigError, VisionProjectorConfig
from model.vision.grid_projector import SHRINK, ConvMlp, PixelShuffleMlp, PoolMlp
from model.vision.resampler import QUERIES, Resampler

SETTING = "model.vision_projector"
GRID_KINDS: dict[str, Callable[[int, int], nn.Module]] = {
    "pixel_shuffle_mlp": PixelShuffleMlp,
    "pool_mlp": PoolMlp,
    "conv_mlp": ConvMlp,
}
"""Those that make one token of a square of patches."""
RESAMPLER = "resampler"
POINTWISE = "'linear' | 'mlp1x_gelu' ... 'mlp9x_gelu' | 'identity'"
VISION_KINDS = f"{POINTWISE} | {' | '.join(map(repr, GRID_KINDS))} | {RESAMPLER!r}"


class Pointwise(nn.Sequential):
    """Layers on each row by itself: features (N, L, in) -> (N, L, out). State keys are LLaVA's: 0, 2, 4 ..."""

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        return super().forward(features)


class Linear(nn.Linear):
    """One matrix, without a number in front of its state keys, as LLaVA has it."""

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        return super().forward(features)


class Identity(nn.Module):
    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        return features


def is_pointwise(kind: str) -> bool:
    """Whether it is a kind that projects each row by itself."""
    return kind in ("linear", "identity") or re.fullmatch(r"mlp[1-9]x_gelu", kind) is not None


def build_projector(setting: str, kind: str, in_features: int, out_features: int) -> nn.Module:
    """A module (features (N, L, in), lengths (N,) valid rows of each or None) -> (N, L', out). `setting` is its table's name."""
    if kind == "linear":
        return Linear(in_features, out_features)
    if kind == "identity":
        if in_features != out_features:
            raise ConfigError(
                f"{setting}.kind = 'identity' needs equal widths, but the encoder gives {in_features} and the "
                f"language model takes {out_features}: use 'linear' or 'mlp2x_gelu'"
            )
        return Identity()
    if not is_pointwise(kind):
        raise ConfigError(f"{setting}.kind = {kind!r} is not {POINTWISE}")
    layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
    for _ in range(1, int(kind[3])):
        layers += [nn.GELU(), nn.Linear(out_features, out_features)]
    return Pointwise(*layers)


def build_vision_projector(config: VisionProjectorConfig, in_features: int, out_features: int) -> nn.Module:
    """The projector of a tower's patches, with `image_newline` (out,) if it has a line break, which starts as LLaVA-NeXT's does."""
    module = _vision_layers(config, in_features, out_features)
    if config.newline:
        module.image_newline = nn.Parameter(torch.empty(out_features))
        module.spreads = {**getattr(module, "spreads", {}), "image_newline": out_features**-0.5}  # type: ignore[dict-item, assignment]
    return module


def _vision_layers(config: VisionProjectorConfig, in_features: int, out_features: int) -> nn.Module:
    """As `build_projector` makes them, or of one of the kinds that give fewer tokens."""
    if config.kind in GRID_KINDS:
        return GRID_KINDS[config.kind](in_features, out_features)
    if config.kind == RESAMPLER:
        return Resampler(in_features, out_features, config.queries or QUERIES)
    if not is_pointwise(config.kind):
        raise ConfigError(f"{SETTING}.kind = {config.kind!r} is not {VISION_KINDS}")
    return build_projector(SETTING, config.kind, in_features, out_features)


def shrunk(spec: ImageSpec, projector: VisionProjectorConfig) -> ImageSpec:
    """The tower's spec with what the projector makes of its grid. ConfigError when it cannot be made of this one."""
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
