"""The audio encoder: log-mel rows to features, by a table of the families of encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from model.audio.projector import projector_strides, shortened
from model.audio.whale import KERNEL, WhaleTower, whale_config, whale_spec
from model.audio.whisper import SETTING, build_qwen2_audio, build_whisper, encoder_config, whisper_spec
from model.batch import Patches
from model.config import AudioConfig, AudioProjectorConfig
from model.encoder import Encoder
from model.errors import ConfigError
from model.files.hub import find_file, read_json
from model.files.quantised_base import check_settings
from model.files.untrusted import Json
from model.media_spec import PLACEHOLDERS, AudioSpec
from model.published.table import part_config

PREFIXES = ("model.encoder.", "encoder.", "", "audio_tower.", "model.audio_tower.")
"""Prefixes of the encoder's tensor names in files of: all of Whisper, Whisper without its head, the encoder alone, Qwen2-Audio."""


@dataclass(frozen=True)
class EncoderFamily:
    """The encoders of one model_type; `Json` is their config.json."""

    build: Callable[[Json], nn.Module]
    width: Callable[[Json], int]  # channels of a feature
    spec: Callable[[str, Json, tuple[int, ...], str], AudioSpec]  # of a folder, its config.json, the strides, a cache folder
    strides: tuple[int, ...]  # of the convolutions, and of a pooling behind the blocks
    kernels: tuple[int, ...] = ()  # see AudioSpec
    constants: tuple[str, ...] = ()  # parameters that are never trained
    drops_odd: bool = False  # see AudioSpec


POSITIONS = ("embed_positions.weight",)
"""Whisper's positions: they are sinusoids, which no Whisper model has trained."""
KINDS = {
    "whisper": EncoderFamily(build_whisper, lambda value: encoder_config(value).d_model, whisper_spec, (2,), constants=POSITIONS),
    "qwen2_audio_encoder": EncoderFamily(
        build_qwen2_audio, lambda value: encoder_config(value).d_model, whisper_spec, (2, 2), constants=POSITIONS, drops_odd=True
    ),
    "whale": EncoderFamily(WhaleTower, lambda value: whale_config(value).hidden_size, whale_spec, (2, 2), (KERNEL, KERNEL)),
}
"""Supported encoders by model_type of config.json."""


def audio_config(config: AudioConfig, cache_dir: str = "") -> Json:
    """Read config.json of the encoder, which Qwen2-Audio nests in the whole model's. Raises `ConfigError` for other encoders."""
    if find_file(SETTING, config.path, "config.json", cache_dir):
        check_settings(SETTING, config.path, read_json(SETTING, config.path, "config.json", cache_dir))
    value = part_config(SETTING, "audio", config.path, cache_dir)
    value = value.get("audio_config") or value
    if value.get("model_type") not in KINDS:
        raise ConfigError(f"{SETTING} = {config.path!r}: {value.get('model_type')!r} is not {' | '.join(KINDS)}")
    return value


def audio_spec(config: AudioConfig, projector: AudioProjectorConfig, cache_dir: str = "") -> AudioSpec:
    """Return the facts that `data` needs, from JSON files alone."""
    value = audio_config(config, cache_dir)
    kind, behind = KINDS[value["model_type"]], projector_strides(projector.kind)
    spec = kind.spec(config.path, value, (*kind.strides, *behind), cache_dir)
    return dataclasses.replace(
        spec,
        full_window=spec.full_window and config.window == "full",
        kernels=(*kind.kernels, *(1 for _ in behind)) if kind.kernels else (),
        num_prompts=projector.prompts,
        placeholder=config.placeholder or PLACEHOLDERS["audio"],
        drops_odd=kind.drops_odd,
    )


class AudioEncoder(Encoder):
    """An audio encoder: log-mel (N, M, F) -> features (N, L, C).

    full_window: F is the whole window, with silence at the end. An encoder without a window takes no notice of it.
    """

    def __init__(self, value: Json, full_window: bool) -> None:
        super().__init__()
        self.kind = KINDS[value["model_type"]]
        self.full_window = full_window
        self.hidden_size = self.kind.width(value)
        self.blank_length = 2  # rows
        self.tower = self.kind.build(value)

    def requires_grad_(self, requires_grad: bool = True) -> AudioEncoder:
        """Set requires_grad of all parameters but the constants of the family."""
        super().requires_grad_(requires_grad)
        for name in self.kind.constants:
            self.tower.get_parameter(name).requires_grad_(False)
        return self

    def valid_rows(self, lengths: Tensor | None) -> Tensor | None:
        """Return the number of features of each row that come from valid frames, (N,)."""
        strides, kernels = self.kind.strides, self.kind.kernels or (1,) * len(self.kind.strides)
        for i, (stride, kernel) in enumerate(zip(strides, kernels, strict=True)):
            if self.kind.drops_odd and i == 1 and lengths is not None:
                lengths = (lengths // stride).clamp(min=1)  # as transformers counts them: without a last row that has no partner
            else:
                lengths = shortened(lengths, stride, kernel)
        return lengths

    def forward(self, values: Tensor, lengths: Tensor | None = None, patches: Patches | None = None) -> Tensor:
        return self.tower(values, lengths, self.full_window)
