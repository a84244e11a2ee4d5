"""From encoder features to LLM embeddings."""

from __future__ import annotations

import dataclasses
import re

from torch import Tensor, nn

from model.batch import ImageSpec
from model.config import ConfigError, VisionProjectorConfig


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
    if (match := re.fullmatch(r"mlp([1-9])x_gelu", kind)) is None:
        raise ConfigError(f"{setting}.kind = {kind!r} is not 'linear' | 'mlp1x_gelu' ... 'mlp9x_gelu' | 'identity'")
    layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
    for _ in range(1, int(match[1])):
        layers += [nn.GELU(), nn.Linear(out_features, out_features)]
    return Pointwise(*layers)


def shrunk(spec: ImageSpec, projector: VisionProjectorConfig) -> ImageSpec:
    """The tower's spec with what the projector makes of its grid."""
    return dataclasses.replace(spec)
