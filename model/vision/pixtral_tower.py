"""Pixtral, the tower of Mistral's models: positions are angles of row and column, so that pictures have any shape."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from model.batch import Patches
from model.errors import ConfigError
from model.files.untrusted import Json
from model.vision.patch_tower import NativeFamily, PatchLinear, PatchTower, segmented_tower
from model.vision.segment_attention import segments_of

LONGEST = 1024
"""Longest side in pixels where the image processor's settings name none, as in transformers' class."""


class PixtralTower(PatchTower):
    """The convolution, the norm and the blocks of transformers' class on packed patches: (P, 3, 1, p, p) -> (1, P, C)."""

    def __init__(self, whole: nn.Module, config: PretrainedConfig) -> None:
        super().__init__()
        self.patch_conv = PatchLinear(cast(nn.Conv2d, whole.get_submodule("patch_conv")))
        self.ln_pre = whole.get_submodule("ln_pre")
        self.transformer = whole.get_submodule("transformer")
        self.width = config.hidden_size
        self.head = config.hidden_size // config.num_attention_heads
        self.theta = float(config.rope_parameters["rope_theta"])

    def forward(self, values: Tensor, patches: Patches) -> Tensor:
        hidden = self.ln_pre(self.patch_conv(values)[None])
        angles = alternating_angles(patches.positions, self.head, self.theta)
        rotation = (angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype))
        segments = segments_of(patches.lengths, patches.borders)
        for block in cast(nn.ModuleList, self.transformer.get_submodule("layers")):
            hidden = block(hidden, None, position_embeddings=rotation, segments=segments)
        return hidden


def alternating_angles(positions: Tensor, head: int, theta: float) -> Tensor:
    """Return the angles (P, head) float32 that turn a head's pairs by the row and the column (P, 2) of each patch.

    Of the frequencies of a plain rotary embedding, rows take the first, third ..., and columns the others.
    """
    frequencies = theta ** -(torch.arange(0, head, 2, dtype=torch.float32, device=positions.device) / head)
    turns = (positions[:, :, None].float() * frequencies.unflatten(0, (-1, 2)).T).flatten(1)
    return torch.cat([turns, turns], dim=-1)


def build_pixtral(config: PretrainedConfig) -> PatchTower:
    """Build the tower of transformers' class."""
    return PixtralTower(segmented_tower("pixtral.modeling_pixtral", "PixtralVisionModel", config), config)


def pixtral_facts(value: PretrainedConfig, processor: Json, videos: Json) -> Json:
    """Return the longest side of a picture. Raises `ConfigError` for a processor with two different ones."""
    size = processor.get("size") or {"longest_edge": LONGEST}
    sides = [size["longest_edge"]] if size.get("longest_edge") else [size.get("height"), size.get("width")]
    if sides[0] != sides[-1] or not isinstance(sides[0], int):
        raise ConfigError(f"model.vision.path: size = {size!r} of the image processor names no longest side: write longest_edge")
    return {"resize": "pixtral", "longest": sides[0]}


PIXTRAL = NativeFamily("", 0, {}, build=build_pixtral, facts=pixtral_facts, processors=("PixtralImageProcessor",))
