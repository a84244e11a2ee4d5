"""The vision tower, built only as deep as the hidden state that is read."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from model.batch import Patches
from model.config import VisionConfig
from model.encoder import Encoder
from model.errors import ConfigError
from model.files.hub import find_file, hugging_face_config, read_json
from model.files.quantised_base import check_settings
from model.files.untrusted import Json
from model.media_spec import PLACEHOLDERS, ImageSpec
from model.published.table import part_config, part_processor
from model.vision.multi_scale import merge_scales, scale_tiles
from model.vision.native_kinds import NATIVE_TOWERS
from model.vision.native_tower import native_spec
from model.vision.tower_kinds import (
    TOWERS,
    behind_norm,
    num_blocks,
    num_prefix,
    remove_unused_layers,
    square_side,
    transformers_config,
)

SETTING = "model.vision.path"
RESIZE = {
    "CLIPImageProcessor": "shortest_edge",
    "CLIPFeatureExtractor": "shortest_edge",
    "BitImageProcessor": "shortest_edge",
    "SiglipImageProcessor": "exact",
    "ViTImageProcessor": "exact",
    "GotOcr2ImageProcessor": "exact",
    "LlavaImageProcessor": "shortest_edge",
    "LlavaNextImageProcessor": "shortest_edge",
    "LlavaOnevisionImageProcessor": "exact",
    "Gemma3ImageProcessor": "exact",
    "Idefics3ImageProcessor": "exact",
    "SmolVLMImageProcessor": "exact",
}
"""Resize mode by image processor class, without `Fast` or `Pil`; `shortest_edge` resizes to the side of the processor's crop."""


def vision_config(config: VisionConfig, cache_dir: str = "") -> Json:
    """Read config.json of the tower in the form of transformers' class; folders of larger models nest it in their own."""
    whole = read_json(SETTING, config.path, "config.json", cache_dir)
    check_settings(SETTING, config.path, whole)
    value = part_config(SETTING, "vision", config.path, cache_dir)
    value = value.get("vision_config", value)
    if "model_type" not in value:
        raise ConfigError(f"{SETTING} = {config.path!r}: config.json names no model_type for the vision tower")
    if value["model_type"] in NATIVE_TOWERS:
        return value
    return transformers_config(f"{SETTING} = {config.path!r}", value, NATIVE_TOWERS)


def vision_spec(config: VisionConfig, cache_dir: str = "") -> ImageSpec:
    """Return the facts that `data` needs, from config.json and the image processor's JSON alone."""
    value = hugging_face_config(SETTING, vision_config(config, cache_dir))
    processor = image_processor_config(config.path, cache_dir)
    if value.model_type in NATIVE_TOWERS:
        return native_spec(config, value, processor, video_processor_config(config.path, cache_dir))
    check_square_options(config, value.model_type)
    kind = str(processor.get("image_processor_type", processor.get("feature_extractor_type", "CLIPImageProcessor")))
    resize = RESIZE.get(kind.removesuffix("Pil").removesuffix("Fast"))
    if resize is None:
        raise ConfigError(f"{SETTING} = {config.path!r}: image processor {kind!r} is not {' | '.join(RESIZE)}")
    rows = num_prefix(value)
    if config.select == "cls_patch" and rows == 0:
        raise ConfigError(f"model.vision.select = 'cls_patch' has no effect: {value.model_type} has no CLS row; use 'patch'")
    sizes = view_sizes(config, value)
    return ImageSpec(
        size=sizes[-1],
        # With scales the picture has the largest size, and a row of features covers this many of its pixels.
        patch=square_side(value.patch_size, SETTING, "patch_size") * (sizes[-1] // sizes[0]),
        num_prefix=rows,
        select=config.select,
        resize=resize,
        mean=tuple(processor["image_mean"]),
        std=tuple(processor["image_std"]),
        resample=processor.get("resample", 3),
        rescale=processor.get("rescale_factor", 1 / 255),
        placeholder=config.placeholder or PLACEHOLDERS["image"],
    )


def check_square_options(config: VisionConfig, kind: str) -> None:
    """Refuse settings of [model.vision] that only towers of variable size have."""
    for key in ("video_placeholder", "video_stamps", "line_ends"):
        if given := getattr(config, key):
            raise ConfigError(
                f"model.vision.{key} = {given!r} has no effect: {kind} does not read pictures at their own size; remove the line"
            )


def view_sizes(config: VisionConfig, value: PretrainedConfig) -> tuple[int, ...]:
    """Return the sides in pixels at which a picture is seen: tower input first, then `scales`. `value`: the tower's config."""
    own, patch = square_side(value.image_size, SETTING, "image_size"), square_side(value.patch_size, SETTING, "patch_size")
    base = config.image_size or own
    if base != own and (base < patch or base % patch):
        raise ConfigError(f"model.vision.image_size = {base} is no multiple of the tower's patch of {patch} pixels")
    sizes = (base, *config.scales)
    if sorted(set(sizes)) != list(sizes) or any(size % base for size in sizes):
        raise ConfigError(
            f"model.vision.scales = {list(config.scales)} are not multiples of the tower's {base} pixels, growing from one to the "
            f"next: as [{2 * base}, {3 * base}]"
        )
    if config.scales and config.select != "patch":
        raise ConfigError("model.vision.scales with select = 'cls_patch': several views have several CLS rows; use 'patch'")
    return sizes


def image_processor_config(path: str, cache_dir: str) -> Json:
    """Read the image processor's settings: preprocessor_config.json, or nested in processor_config.json as in newer folders."""
    inside = part_processor(SETTING, path, cache_dir)
    if inside is not None:
        found = inside
    elif find_file(SETTING, path, "preprocessor_config.json", cache_dir):
        found = read_json(SETTING, path, "preprocessor_config.json", cache_dir)
    else:
        found = read_json(SETTING, path, "processor_config.json", cache_dir).get("image_processor", {})
    if not {"image_mean", "image_std"} <= found.keys():
        raise ConfigError(f"{SETTING} = {path!r}: no preprocessor_config.json with image_mean and image_std")
    return found


def video_processor_config(path: str, cache_dir: str) -> Json:
    """Read the settings of the processor of videos, from a file of its own or nested in processor_config.json; {} without any."""
    if find_file(SETTING, path, "video_preprocessor_config.json", cache_dir):
        return read_json(SETTING, path, "video_preprocessor_config.json", cache_dir)
    if not find_file(SETTING, path, "processor_config.json", cache_dir):
        return {}
    found: Json = read_json(SETTING, path, "processor_config.json", cache_dir).get("video_processor", {})
    return found


class VisionTower(Encoder):
    """A vision tower: pixels (N, 3, S, S) -> features (N, L, C), the raw output of the last block that is built.

    With `scales`, S is the largest of them, C is the tower's width times the number of sizes, and L the number of rows of one view.
    """

    def __init__(self, value: Json, config: VisionConfig) -> None:
        super().__init__()
        found = hugging_face_config(SETTING, value)
        self.sizes = view_sizes(config, found)
        self.resizes = config.image_size != 0
        found.image_size = self.sizes[0] if isinstance(found.image_size, int) else (self.sizes[0], self.sizes[0])
        self.num_blocks = num_blocks(config.layer, found.num_hidden_layers), found.num_hidden_layers  # built, all
        found.num_hidden_layers = self.num_blocks[0]
        self.kind = TOWERS[found.model_type]
        if config.final_norm:
            self.kind = behind_norm(self.kind, found.model_type)
        if self.kind.final_norm and self.num_blocks[0] != self.num_blocks[1]:
            raise ConfigError(
                f"model.vision.layer = {config.layer}: {found.model_type} is read behind the norm of its last block: set it to -1"
            )
        self.num_prefix = num_prefix(found) if config.select == "patch" else 0
        self.hidden_size = found.hidden_size * len(self.sizes)
        grid = self.sizes[0] // square_side(found.patch_size, SETTING, "patch_size")
        self.blank_length = grid**2 + num_prefix(found) - self.num_prefix  # rows of one view
        if self.kind.built_as:
            found = hugging_face_config(SETTING, self.kind.built_as(found))
        built = AutoModel.from_config(found, dtype=torch.float32, attn_implementation="sdpa")
        self.tower = remove_unused_layers(built, self.kind)

    @property
    def positions(self) -> nn.Parameter:
        """Return the position embeddings, which `tune = "positions"` trains."""
        return self.tower.get_parameter(self.kind.positions)

    def is_unused(self, name: str) -> bool:
        """Tell whether no hidden state that is read needs a tensor of the tower's class, such as a norm after the last block."""
        return any(name == path or name.startswith(f"{path}.") for path in self.kind.unused)

    def valid_rows(self, lengths: Tensor | None) -> None:
        """Return None: every row of a picture is valid."""

    def forward(self, values: Tensor, lengths: Tensor | None = None, patches: Patches | None = None) -> Tensor:
        if len(self.sizes) == 1:
            return self._encode(values)
        # One call for the squares of all sizes: ranks run the same collectives, and small squares use the whole device.
        return merge_scales(self._encode(scale_tiles(values, self.sizes)), self.sizes)

    def _encode(self, values: Tensor) -> Tensor:
        # The selection stays outside `tower`: a sharded module must not return a view.
        return self.tower(pixel_values=values).last_hidden_state[:, self.num_prefix :]
