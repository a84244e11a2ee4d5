"""From encoder features to LLM embeddings."""

import re

from torch import Tensor, nn

from model.config import ConfigError


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def build_projector(kind: str, in_features: int, out_features: int) -> nn.Module:
    """A module on rows (K, in) -> (K, out). State keys are LLaVA's: `linear` has none in front, `mlpNx_gelu` 0, 2, 4 ..."""
    if kind == "linear":
        return nn.Linear(in_features, out_features)
    if kind == "identity":
        if in_features != out_features:
            raise ConfigError(
                f"model.vision_projector.kind = 'identity' needs equal widths, but the tower gives {in_features} and the "
                f"language model takes {out_features}: use 'linear' or 'mlp2x_gelu'"
            )
        return Identity()
    if (match := re.fullmatch(r"mlp([1-9])x_gelu", kind)) is None:
        raise ConfigError(f"model.vision_projector.kind = {kind!r} is not 'linear' | 'mlp1x_gelu' ... 'mlp9x_gelu' | 'identity'")
    layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
    for _ in range(1, int(match[1])):
        layers += [nn.GELU(), nn.Linear(out_features, out_features)]
    return nn.Sequential(*layers)
