"""Towers that read pictures at their own size: how each embeds packed patches, and runs transformers' blocks on them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from model.batch import Patches
from model.errors import ConfigError
from model.files.untrusted import Json
from model.vision.naflex_tower import NAFLEX, resized_table
from model.vision.patch_tower import NativeFamily, PatchLinear, PatchTower, segmented_tower
from model.vision.pixtral_tower import PIXTRAL
from model.vision.segment_attention import segments_of


class QwenTower(PatchTower):
    """Qwen2-VL's tower and its successors without their mergers, which are projectors here."""

    def __init__(self, whole: nn.Module, config: PretrainedConfig) -> None:
        super().__init__()
        self.patch_embed = whole.get_submodule("patch_embed")
        self.patch_embed.proj = PatchLinear(cast(nn.Conv3d, self.patch_embed.get_submodule("proj")))
        if hasattr(whole, "pos_embed"):
            self.pos_embed = whole.get_submodule("pos_embed")
        self.blocks = cast(nn.ModuleList, whole.get_submodule("blocks"))
        self.width = self.patch_embed.get_parameter("proj.weight").shape[0]
        self.frames = config.temporal_patch_size
        self.whole_blocks = frozenset(getattr(config, "fullatt_block_indexes", range(len(self.blocks))))
        self.kept_blocks = kept_blocks(tuple(getattr(config, "deepstack_visual_indexes", ())), len(self.blocks))
        self.levels = 1 + len(self.kept_blocks)
        self.head = self.width // config.num_heads
        self.theta = float((config.rope_parameters or {}).get("rope_theta", 10_000.0))

    def forward(self, values: Tensor, patches: Patches) -> Tensor:
        # A still picture is sent once and stands in every frame of its patches.
        hidden = self.patch_embed(values.expand(-1, -1, self.frames, -1, -1))
        if patches.corners is not None and patches.shares is not None:
            mixed = self.pos_embed(patches.corners) * patches.shares[:, :, None].to(hidden.dtype)
            hidden = hidden + mixed.sum(1)
        angles = axial_angles(patches.positions, self.head, self.theta)
        if patches.window_order is not None and patches.window_places is not None:
            group = values.shape[0] // patches.window_order.shape[0]
            angles = regrouped(angles, patches.window_order, group)
            hidden = self._run(regrouped(hidden, patches.window_order, group), angles, patches)
            return regrouped(hidden, patches.window_places, group)
        return self._run(hidden, angles, patches)

    def _run(self, hidden: Tensor, angles: Tensor, patches: Patches) -> Tensor:
        """Run the blocks on hidden states (P, C), and return the last with those of `kept_blocks` beside it."""
        rotation = (angles.cos(), angles.sin())
        kept = []
        pictures = windows = segments_of(patches.lengths, patches.borders)
        if patches.window_lengths is not None and patches.window_borders is not None:
            windows = segments_of(patches.window_lengths, patches.window_borders)
        for i, block in enumerate(self.blocks):
            inside = pictures if i in self.whole_blocks else windows
            places = {"cu_seqlens": inside.borders, "max_seqlen": inside.longest, "position_embeddings": rotation}
            hidden = block(hidden, segments=inside, **places)
            if i in self.kept_blocks:
                kept.append(hidden)
        return torch.cat([hidden, *kept], dim=-1) if kept else hidden


class GlmTower(QwenTower):
    """GLM-4.1V's tower without its merger and the kernel before it, which are a projector here: a norm behind its last block."""

    def __init__(self, whole: nn.Module, config: PretrainedConfig) -> None:
        super().__init__(whole, config)
        self.post_conv_layernorm = whole.get_submodule("post_conv_layernorm")
        self.embeddings = whole.get_submodule("embeddings")
        self.post_layernorm = whole.get_submodule("post_layernorm")

    def forward(self, values: Tensor, patches: Patches) -> Tensor:
        hidden = self.post_conv_layernorm(self.patch_embed(values.expand(-1, -1, self.frames, -1, -1)))
        table = self.embeddings.get_parameter("position_embedding.weight")
        hidden = hidden + resized_table(table, patches).to(hidden.dtype)
        hidden = self._run(hidden, axial_angles(patches.positions, self.head, self.theta), patches)
        found: Tensor = self.post_layernorm(hidden)
        return found


def kept_blocks(indexes: tuple[int, ...], num_blocks: int) -> tuple[int, ...]:
    """Return the blocks whose features go to early layers of the language model. Raises `ConfigError` for those that cannot."""
    if any(second <= first for first, second in pairwise((-1, *indexes))):
        raise ConfigError(
            f"model.vision: deepstack_visual_indexes = {list(indexes)} in config.json are not ascending block numbers"
        )
    if indexes and indexes[-1] >= num_blocks:
        raise ConfigError(
            f"model.vision.layer leaves {num_blocks} blocks of the tower, and block {indexes[-1]} (deepstack_visual_indexes in "
            "config.json) gives features to an early layer of the language model: set model.vision.layer = -1"
        )
    return indexes


def regrouped(rows: Tensor, order: Tensor, group: int) -> Tensor:
    """Return rows (P, C) with their groups of `group` rows in the order (G,), in memory of their own."""
    places = order[:, None] * group + torch.arange(group, device=order.device)
    return rows.index_select(0, places.flatten())


def axial_angles(positions: Tensor, head: int, theta: float) -> Tensor:
    """Return the angles (P, head) float32 that turn a head's pairs by the row and the column (P, 2) of each patch."""
    half = head // 2
    frequencies = theta ** -(torch.arange(0, half, 2, dtype=torch.float32, device=positions.device) / half)
    turns = (positions[:, :, None].float() * frequencies).flatten(1)
    return torch.cat([turns, turns], dim=-1)


def qwen_tower(module: str, name: str) -> Callable[[PretrainedConfig], PatchTower]:
    """Return how to build a tower of Qwen from transformers' class `name`."""
    return lambda config: QwenTower(segmented_tower(module, name, config), config)


def qwen_facts(value: PretrainedConfig, processor: Json, videos: Json) -> Json:
    """Return the range of pixels, windows, and how videos are read."""
    size = processor.get("size") or {}
    return {
        "resize": "qwen",
        "frames": getattr(value, "temporal_patch_size", 1),
        "min_pixels": processor.get("min_pixels") or size.get("shortest_edge", 56 * 56),
        "max_pixels": processor.get("max_pixels") or size.get("longest_edge", 28 * 28 * 1280),
        "window": getattr(value, "window_size", 0),
        "table": int(getattr(value, "num_position_embeddings", 0) ** 0.5),
        "ticks": float(getattr(value, "tokens_per_second", 0)),
        "video_pixels": _pixel_range(videos),
        "video_shared": "Qwen3" in videos.get("video_processor_type", ""),
        "video_tokens": videos.get("max_video_tokens", 128_000) if videos.get("cap_pixels_per_frame") else 0,
    }


def build_glm(config: PretrainedConfig) -> PatchTower:
    """Build the tower of transformers' class."""
    return GlmTower(segmented_tower("glm4v.modeling_glm4v", "Glm4vVisionModel", config), config)


def glm_facts(value: PretrainedConfig, processor: Json, videos: Json) -> Json:
    """Return the range of pixels, the side of the table of positions, and whose processor it is.

    The processor counts a picture in every frame of its patches. Raises `ConfigError` for a range that these do not share evenly.
    """
    size, frames = processor.get("size") or {}, value.temporal_patch_size
    least, most = size.get("shortest_edge", 112 * 112), size.get("longest_edge", 28 * 28 * 15_000)
    if least % frames or most % frames:
        raise ConfigError(
            f"model.vision.path: size = {size} among its image processor's settings is of {frames} frames together; only multiples "
            f"of {frames} are read"
        )
    name = str(processor.get("image_processor_type", ""))
    return {
        "resize": "qwen",
        "grows": True,
        "frames": frames,
        "min_pixels": least // frames,
        "max_pixels": most // frames,
        "table": value.image_size // value.patch_size,
        "bicubic": True,
        "video_pixels": _pixel_range(videos) or GLM_CLIPS,
        "reader": "Glm46V" if name.startswith("Glm46V") else "Glm4v",
    }


GLM_CLIPS = (112 * 112, 28 * 28 * 2 * 30_000)
"""Least and most pixels of a video where its processor's settings name none, as in transformers' class."""


def _pixel_range(processor: Json) -> tuple[int, ...]:
    """Return the least and the most pixels that a processor's settings name; () without."""
    size = processor.get("size") or {}
    least = processor.get("min_pixels") or size.get("shortest_edge")
    most = processor.get("max_pixels") or size.get("longest_edge")
    return (least, most) if least and most else ()


def _qwen(module: str, name: str, positions: str = "") -> NativeFamily:
    return NativeFamily(positions, 0, {}, build=qwen_tower(module, name), facts=qwen_facts, depth="depth")


NATIVE_TOWERS: dict[str, NativeFamily] = {
    "qwen2_vl_vision": _qwen("qwen2_vl.modeling_qwen2_vl", "Qwen2VisionTransformerPretrainedModel"),
    "qwen2_5_vl_vision": _qwen("qwen2_5_vl.modeling_qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel"),
    "qwen3_vl_vision": _qwen("qwen3_vl.modeling_qwen3_vl", "Qwen3VLVisionModel", "pos_embed.weight"),
    "qwen3_vl_moe_vision": _qwen("qwen3_vl_moe.modeling_qwen3_vl_moe", "Qwen3VLMoeVisionModel", "pos_embed.weight"),
    "glm4v_vision": NativeFamily(
        "embeddings.position_embedding.weight",
        0,
        {},
        build=build_glm,
        facts=glm_facts,
        depth="depth",
        processors=("Glm4vImageProcessor", "Glm46VImageProcessor"),
    ),
    "siglip2_vision_model": NAFLEX,
    "pixtral": PIXTRAL,
}
"""Supported towers of variable size by model_type."""
