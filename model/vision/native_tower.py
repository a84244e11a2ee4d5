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
        return features.view(1, -1, self.hidden_size)


def check_native_options(config: VisionConfig, kind: str) -> None:
    """Refuse settings of [model.vision] that only towers of one square have."""
    for key, value, default in (
        ("image_size", config.image_size, 0),
        ("scales", config.scales, ()),
        ("final_norm", config.final_norm, False),
        ("select", config.select, "patch"),
    ):
        if value != default:
            raise ConfigError(
                f"model.vision.{key} = {value!r} has no effect: {kind} reads pictures at their own size; remove the line"
            )
    if len(config.line_ends) not in (0, 2):
        raise ConfigError(f"model.vision.line_ends = {list(config.line_ends)} is not a pair: behind a line, behind the last one")
    if config.line_ends and config.video_stamps:
        raise ConfigError("model.vision.line_ends and video_stamps are of two families, which write one or the other: remove one")
    if len(config.video_stamps) not in (0, 2):
        raise ConfigError(
            f"model.vision.video_stamps = {list(config.video_stamps)} is not a pair: before and behind each pair of frames"
        )


def native_spec(config: VisionConfig, value: PretrainedConfig, processor: Json, videos: Json) -> NativeSpec:
    """Return the facts that `data` needs of a tower of variable size, from its config.json `value` and its processors' settings.

    `videos`: settings of the processor of videos, {} where that of pictures reads them too.
    """
    kind = NATIVE_TOWERS[value.model_type]
    check_native_options(config, value.model_type)
    check_processor(config.path, processor, kind)
    patch = square_side(processor.get("patch_size", value.patch_size), SETTING, "patch_size")
    if patch != square_side(value.patch_size, SETTING, "patch_size"):
        raise ConfigError(f"{SETTING} = {config.path!r}: its image processor cuts patches of {patch} pixels, its tower has others")
    multiple = processor.get("merge_size", getattr(value, "spatial_merge_size", 1))
    common: Json = {
        "size": patch * multiple,
        "patch": patch,
        "num_prefix": 0,
        "select": "patch",
        "mean": tuple(processor["image_mean"]),
        "std": tuple(processor["image_std"]),
        "resample": processor.get("resample", 3),
        "rescale": processor.get("rescale_factor", 1 / 255),
        "placeholder": config.placeholder or PLACEHOLDERS["image"],
        "multiple": multiple,
        "video_placeholder": config.video_placeholder,
        "video_stamps": config.video_stamps,
        "line_ends": config.line_ends,
    }
    return NativeSpec(**{**common, **kind.facts(value, processor, videos)})


def check_processor(path: str, processor: Json, kind: NativeFamily) -> None:
    """Refuse an image processor whose sizes or pixels are not those that the tower is given here."""
    name = str(processor.get("image_processor_type", "")).removesuffix("Pil").removesuffix("Fast")
    if name and kind.processors and name not in kind.processors:
        raise ConfigError(f"{SETTING} = {path!r}: image processor {name!r} is not {' | '.join(kind.processors)}")
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if processor.get(key) is False:
            raise ConfigError(
                f"{SETTING} = {path!r}: {key} = false among its image processor's settings; here pictures are resized, rescaled "
                "and normalised"
            )
