"""A vision tower that reads pictures at their own size, as packed patches: nothing is padded, and no picture sees another."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PretrainedConfig

from model.batch import Patches
from model.config import VisionConfig
from model.encoder import Encoder
from model.errors import ConfigError
from model.files.hub import hugging_face_config
from model.files.untrusted import Json
from model.media_spec import PLACEHOLDERS, NativeSpec
from model.vision.native_kinds import NATIVE_TOWERS, NativeFamily
from model.vision.tower_kinds import num_blocks, square_side

SETTING = "model.vision.path"


class NativeTower(Encoder):
    """A tower of variable size: patches (P, 3, F, p, p) -> features (1, P, C), of the last block that is built.

    With several levels, C is the tower's width times their number.
    """

    resizes = False
    compiles = False  # their attention goes through segments in Python, and each number of pictures would be a graph

    def __init__(self, value: Json, config: VisionConfig) -> None:
        super().__init__()
        found = hugging_face_config(SETTING, value)
        check_native_options(config, found.model_type)
        self.kind: NativeFamily = NATIVE_TOWERS[found.model_type]
        total = getattr(found, self.kind.depth)
        self.num_blocks = num_blocks(config.layer, total), total
        setattr(found, self.kind.depth, self.num_blocks[0])
        assert self.kind.build is not None
        tower = self.kind.build(found)
        self.tower = tower
        self.levels = tower.levels
        self.hidden_size = tower.width * tower.levels
        self.blank_length = 1

    @property
    def positions(self) -> nn.Parameter:
        """Return the position embeddings, which `tune = "positions"` trains. Raises `ConfigError` for a tower without."""
        if not self.kind.positions:
            raise ConfigError(
                "model.vision.tune = 'positions': this tower has no position embeddings; use 'frozen', 'lora' or 'full'"
            )
        return self.tower.get_parameter(self.kind.positions)

    def is_unused(self, name: str) -> bool:
        """Tell whether no hidden state that is read needs a tensor of the tower's class."""
        return any(name == path or name.startswith(f"{path}.") for path in self.kind.unused)

    def valid_rows(self, lengths: Tensor | None) -> None:
        """Return None: every patch is valid."""

    def forward(self, values: Tensor, lengths: Tensor | None = None, patches: Patches | None = None) -> Tensor:
        if patches is None:
            raise ValueError("pictures at their own size come with the places of their patches")
        features: Tensor = self.tower(values, patches)
        return features


def check_native_options(config: VisionConfig, kind: str) -> None:
    """Refuse settings of [model.vision] that only towers of one square have."""
    for key, value, default in (
        ("image_size", config.image_size, 0),
        ("scales", config.scales, ()),
        ("select", config.select, "patch"),
    ):
        if value != default:
            raise ConfigError(
                f"model.vision.{key} = {value!r} has no effect: {kind} reads pictures at their own size; remove the line"
            )


def native_spec(config: VisionConfig, value: PretrainedConfig, processor: Json, videos: Json) -> NativeSpec:
    """Return the facts that `data` needs of a tower of variable size, from its config.json `value` and its processors' settings.

    `videos`: settings of the processor of videos, {} where that of pictures reads them too.
    """
    check_native_options(config, value.model_type)
    size = processor.get("size") or {}
    patch = square_side(processor.get("patch_size", value.patch_size), SETTING, "patch_size")
    if patch != square_side(value.patch_size, SETTING, "patch_size"):
        raise ConfigError(f"{SETTING} = {config.path!r}: its image processor cuts patches of {patch} pixels, its tower has others")
    multiple = processor.get("merge_size", getattr(value, "spatial_merge_size", 1))
    table = getattr(value, "num_position_embeddings", 0)
    return NativeSpec(
        size=patch * multiple,
        patch=patch,
        num_prefix=0,
        select="patch",
        resize="qwen",
        mean=tuple(processor["image_mean"]),
        std=tuple(processor["image_std"]),
        resample=processor.get("resample", 3),
        rescale=processor.get("rescale_factor", 1 / 255),
        placeholder=config.placeholder or PLACEHOLDERS["image"],
        frames=getattr(value, "temporal_patch_size", 1),
        multiple=multiple,
        min_pixels=processor.get("min_pixels") or size.get("shortest_edge", 56 * 56),
        max_pixels=processor.get("max_pixels") or size.get("longest_edge", 28 * 28 * 1280),
        window=getattr(value, "window_size", 0),
        table=int(table**0.5),
        video_placeholder=config.video_placeholder,
        ticks=float(getattr(value, "tokens_per_second", 0)),
        video_pixels=_range(videos),
        video_shared="Qwen3" in videos.get("video_processor_type", ""),
        video_tokens=videos.get("max_video_tokens", 128_000) if videos.get("cap_pixels_per_frame") else 0,
    )


def _range(processor: Json) -> tuple[int, ...]:
    """Return the least and the most pixels that a processor's settings name; () without."""
    size = processor.get("size") or {}
    least = processor.get("min_pixels") or size.get("shortest_edge")
    most = processor.get("max_pixels") or size.get("longest_edge")
    return (least, most) if least and most else ()
