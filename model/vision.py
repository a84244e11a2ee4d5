"""The vision tower, built only as deep as the hidden state that is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from model.batch import ImageSpec
from model.config import ConfigError, VisionConfig
from model.hub import find_file, read_json
from model.llm import hugging_face_config

SETTING = "model.vision.path"
NUM_PREFIX = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Rows in front of the patches, by model_type of the towers that are supported."""
RESIZE = {"CLIPImageProcessor": "shortest_edge", "CLIPFeatureExtractor": "shortest_edge", "SiglipImageProcessor": "exact"}
"""How each image processor resizes, by class name without `Fast` or `Pil`."""


def vision_config(config: VisionConfig, cache_dir: str = "") -> dict[str, Any]:
    """config.json of the tower itself; a CLIP or SigLIP folder holds it inside the config of both towers."""
    value = read_json(SETTING, config.path, "config.json", cache_dir)
    value = value.get("vision_config", value)
    if "model_type" not in value:
        raise ConfigError(f"{SETTING} = {config.path!r}: config.json names no model_type for the vision tower")
    if value["model_type"] not in NUM_PREFIX:
        raise ConfigError(f"{SETTING} = {config.path!r}: {value['model_type']!r} is not {' | '.join(NUM_PREFIX)}")
    return value


def vision_spec(config: VisionConfig, cache_dir: str = "") -> ImageSpec:
    """What data needs to know, from config.json and the image processor's JSON alone."""
    value = hugging_face_config(SETTING, vision_config(config, cache_dir))
    processor = image_processor_config(config.path, cache_dir)
    kind = str(processor.get("image_processor_type", processor.get("feature_extractor_type", "CLIPImageProcessor")))
    resize = RESIZE.get(kind.removesuffix("Pil").removesuffix("Fast"))
    if resize is None:
        raise ConfigError(f"{SETTING} = {config.path!r}: image processor {kind!r} is not {' | '.join(RESIZE)}")
    num_prefix = NUM_PREFIX[value.model_type]
    if config.select == "cls_patch" and num_prefix == 0:
        raise ConfigError(f"model.vision.select = 'cls_patch' has no effect: {value.model_type} has no CLS row; use 'patch'")
    return ImageSpec(
        size=value.image_size,
        patch=value.patch_size,
        num_prefix=num_prefix,
        select=config.select,
        resize=resize,
        mean=tuple(processor["image_mean"]),
        std=tuple(processor["image_std"]),
        resample=processor.get("resample", 3),
        rescale=processor.get("rescale_factor", 1 / 255),
    )


def image_processor_config(path: str, cache_dir: str) -> dict[str, Any]:
    """The flat preprocessor_config.json, or what newer folders nest in processor_config.json."""
    if find_file(SETTING, path, "preprocessor_config.json", cache_dir):
        found = read_json(SETTING, path, "preprocessor_config.json", cache_dir)
    else:
        found = read_json(SETTING, path, "processor_config.json", cache_dir).get("image_processor", {})
    if not {"image_mean", "image_std"} <= found.keys():
        raise ConfigError(f"{SETTING} = {path!r}: no preprocessor_config.json with image_mean and image_std")
    return found


def num_blocks(layer: int, total: int) -> int:
    """Blocks needed for hidden_states[layer], which has `total` + 1 entries."""
    wanted = layer if layer >= 0 else total + 1 + layer
    if not 0 <= wanted <= total:
        raise ConfigError(f"model.vision.layer = {layer} is not in [{-total - 1}, {total}]: the tower has {total} blocks")
    return wanted


class VisionTower(nn.Module):
    """Pixels (N, 3, S, S) -> features (N, L, C): the raw output of the last block that is built."""

    def __init__(self, value: dict[str, Any], layer: int, select: str) -> None:
        super().__init__()
        config: Any = hugging_face_config(SETTING, value)
        config.num_hidden_layers = num_blocks(layer, config.num_hidden_layers)
        self.num_prefix = NUM_PREFIX[config.model_type] if select == "patch" else 0
        self.hidden_size: int = config.hidden_size
        grid = config.image_size // config.patch_size
        self.blank_length = grid**2 + NUM_PREFIX[config.model_type] - self.num_prefix  # rows of one view
        self.tower = cut(AutoModel.from_config(config, dtype=torch.float32, attn_implementation="sdpa"))

    def valid_rows(self, lengths: Tensor | None) -> None:
        """Every row of a picture is valid."""

    def forward(self, values: Tensor, lengths: Tensor | None = None) -> Tensor:
        # The selection stays outside `tower`: a sharded module must not return a view.
        return self.tower(pixel_values=values).last_hidden_state[:, self.num_prefix :]


class CopiedRow(nn.Module):
    """What is left of pooling the CLS row: a copy, because FSDP2 wants no view among a module's outputs."""

    def forward(self, row: Tensor) -> Tensor:
        return row.clone()


def cut(tower: nn.Module) -> nn.Module:
    """Remove what stands behind the last block, so that no parameter is left which the loss cannot reach."""
    if isinstance(getattr(tower, "post_layernorm", None), nn.Module):
        # CLIP normalises only the row that it pools, SigLIP all of them.
        tower.post_layernorm = CopiedRow() if NUM_PREFIX[tower.config.model_type] else nn.Identity()  # type: ignore[union-attr, index]
    if isinstance(getattr(tower, "head", None), nn.Module):
        tower.head, tower.use_head = None, False  # type: ignore[assignment]
    return tower
