"""Projectors from encoder features to LLM embeddings that treat each row by itself."""

from __future__ import annotations

import re

from torch import Tensor, nn

from model.errors import ConfigError

POINTWISE = "'linear' | 'mlp1x_gelu' ... 'mlp9x_gelu' | 'identity'"


class Pointwise(nn.Sequential):
    """Layers applied to each row by itself: features (N, L, in) -> (N, L, out). State keys are LLaVA's: 0, 2, 4 ..."""

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        return super().forward(features)


class Linear(nn.Linear):
    """One matrix. As in LLaVA, its state keys have no number in front."""

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        return super().forward(features)


class Identity(nn.Module):
    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        return features


def is_pointwise(kind: str) -> bool:
    """Tell whether a kind of projector treats each row by itself."""
    return kind in ("linear", "identity") or re.fullmatch(r"mlp[1-9]x_gelu", kind) is not None


def build_projector(setting: str, kind: str, in_features: int, out_features: int) -> nn.Module:
    """Build a projector: features (N, L, in), lengths (N,) valid rows of each or None -> (N, L', out). `setting`: name of its
    table.

    Raises `ConfigError` for an unknown kind, and for 'identity' with unequal widths.
    """
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


LLAVA_PROJECTOR, LLAVA_NEWLINE, LLAVA_TRAINED = "mm_projector.", "image_newline", "non_lora_trainables.bin"


OWN_ROWS = ("extra", LLAVA_NEWLINE)
"""Parameters that a projector may have beside its layers: prompts, the line break."""


def spreads_of(module: nn.Module) -> dict[str, float]:
    """Return the standard deviations that bare parameters of `module` start with, by their names in it."""
    found: dict[str, float] = getattr(module, "spreads", None) or {}
    return found


def set_spread(module: nn.Module, name: str, deviation: float) -> None:
    """Say that the bare parameter `name` of `module` starts with this standard deviation."""
    setattr(module, "spreads", {**spreads_of(module), name: deviation})  # noqa: B010  nn.Module declares tensors and modules only
