"""SigLIP2 NaFlex: a SigLIP tower for pictures of any shape, whose table of positions is resized to each of them."""

from __future__ import annotations

import math
from typing import cast

from torch import Tensor, nn
from transformers import PretrainedConfig

from model.batch import Patches
from model.files.untrusted import Json
from model.vision.patch_tower import NativeFamily, PatchTower, segmented_tower
from model.vision.segment_attention import segments_of

MAX_PATCHES = 256
"""Most patches of a picture where the image processor's settings name no number, as in transformers' class."""
BILINEAR = 2
"""PIL's number of the filter of transformers' class."""


class NaflexTower(PatchTower):
    """The embeddings and blocks of transformers' class on packed patches (P, 3, 1, p, p) -> (1, P, C), without its last norm."""

    def __init__(self, whole: nn.Module, config: PretrainedConfig) -> None:
        super().__init__()
        self.embeddings = whole.get_submodule("embeddings")
        self.encoder = whole.get_submodule("encoder")
        self.width = config.hidden_size

    def forward(self, values: Tensor, patches: Patches) -> Tensor:
        pixels = values.permute(0, 2, 3, 4, 1).flatten(1)  # a patch in the class's order: rows, columns, channels
        table = self.embeddings.get_parameter("position_embedding.weight")
        embedded = self.embeddings.get_submodule("patch_embedding")(pixels[None])
        hidden = embedded + resized_table(table, patches).to(embedded.dtype)
        segments = segments_of(patches.lengths, patches.borders)
        for block in cast(nn.ModuleList, self.encoder.get_submodule("layers")):
            hidden = block(hidden, segments)
        return hidden


def resized_table(table: Tensor, patches: Patches) -> Tensor:
    """Return the position of each patch, (P, C) float32: the table (S * S, C), resized to the patch's picture.

    As a product of matrices it costs less than the embedding of the patches, whatever the number of pictures, and its gradient adds
    up in a fixed order. Raises `ValueError` for patches without shares.
    """
    if patches.row_shares is None or patches.column_shares is None:
        raise ValueError("patches come without their shares of the table of positions")
    shares = patches.row_shares[:, :, None] * patches.column_shares[:, None, :]
    return shares.flatten(1) @ table.float()


def build_naflex(config: PretrainedConfig) -> PatchTower:
    """Build the tower of transformers' class."""
    return NaflexTower(segmented_tower("siglip2.modeling_siglip2", "Siglip2VisionModel", config), config)


def naflex_facts(value: PretrainedConfig, processor: Json, videos: Json) -> Json:
    """Return the most patches of a picture and the side of the table of positions."""
    return {
        "resize": "naflex",
        "max_patches": processor.get("max_num_patches", MAX_PATCHES),
        "table": math.isqrt(value.num_patches),
        "antialias": True,
        "resample": processor.get("resample", BILINEAR),
    }


NAFLEX = NativeFamily(
    "embeddings.position_embedding.weight",
    0,
    {"post_layernorm": nn.Identity, "head": lambda: None},
    antialias=True,
    build=build_naflex,
    facts=naflex_facts,
    processors=("Siglip2ImageProcessor",),
)
