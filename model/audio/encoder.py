"""The audio encoder: log-mel rows to features, as Whisper's encoder in transformers computes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from model.audio.projector import convolved, masked, mean_of_pairs, projector_strides, shortened, valid_mask
from model.config import AudioConfig, AudioProjectorConfig
from model.encoder import Encoder
from model.errors import ConfigError
from model.files.hub import find_file, hugging_face_config, read_json
from model.files.quantised_base import check_settings
from model.files.untrusted import Json
from model.media_spec import AudioSpec

SETTING = "model.audio.path"
PREFIXES = ("model.encoder.", "encoder.", "", "audio_tower.", "model.audio_tower.")
"""Prefixes of the encoder's tensor names in files of: all of Whisper, Whisper without its head, the encoder alone, Qwen2-Audio."""
STRUCTURE = (
    "num_mel_bins",
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "activation_function",
    "max_source_positions",
    "dropout",
    "attention_dropout",
    "activation_dropout",
)
"""Keys of config.json that define an encoder. Layer drop is left out: ranks would drop different layers and run different
collectives.
"""


@dataclass(frozen=True)
class EncoderFamily:
    """Differences of the encoders of one model_type from Whisper's."""

    pooled: bool = False  # the mean of every two rows is taken before the last norm
    masked: bool = False  # even in the full window no row attends to rows beyond its clip


KINDS = {"whisper": EncoderFamily(), "qwen2_audio_encoder": EncoderFamily(pooled=True, masked=True)}
"""Supported encoders by model_type of config.json."""


def audio_config(config: AudioConfig, cache_dir: str = "") -> Json:
    """Read config.json of the encoder, which Qwen2-Audio nests in the whole model's. Raises `ConfigError` for other encoders."""
    whole = read_json(SETTING, config.path, "config.json", cache_dir)
    check_settings(SETTING, config.path, whole)
    value = whole.get("audio_config") or whole
    if value.get("model_type") not in KINDS:
        raise ConfigError(f"{SETTING} = {config.path!r}: {value.get('model_type')!r} is not {' | '.join(KINDS)}")
    return value


def audio_spec(config: AudioConfig, projector: AudioProjectorConfig, cache_dir: str = "") -> AudioSpec:
    """Return the facts that `data` needs, from JSON files alone. Feature settings missing in a folder have Whisper's values."""
    value = audio_config(config, cache_dir)
    structure = encoder_config(value)
    found = feature_config(config.path, cache_dir)
    spec = AudioSpec(
        num_mels=structure.num_mel_bins,
        window_frames=2 * structure.max_source_positions,
        full_window=config.window == "full",
        strides=(*encoder_strides(value), *projector_strides(projector.kind)),
        sampling_rate=found.get("sampling_rate", 16_000),
        n_fft=found.get("n_fft", 400),
        hop=found.get("hop_length", 160),
        num_prompts=projector.prompts,
    )
    window = spec.window_frames * spec.hop
    check_feature_setting(config.path, "feature_size", found.get("feature_size", spec.num_mels), spec.num_mels)
    check_feature_setting(config.path, "chunk_length", found.get("chunk_length", 0) * spec.sampling_rate or window, window)
    return spec


def check_feature_setting(path: str, key: str, found: int, needed: int) -> None:
    if found != needed:
        raise ConfigError(
            f"{SETTING} = {path!r}: {key} of the feature extractor makes {found}, the encoder of config.json needs {needed}"
        )


def feature_config(path: str, cache_dir: str) -> Json:
    """Read the feature extractor's settings: flat, or nested in processor_config.json as in newer folders; {} without any."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if find_file(SETTING, path, name, cache_dir):
            value = read_json(SETTING, path, name, cache_dir)
            found: Json = value.get("feature_extractor", value)
            return found
    return {}


def encoder_config(value: Json) -> WhisperConfig:
    """Return the encoder's part of config.json `value` as a Whisper config."""
    config = hugging_face_config(SETTING, value)
    return WhisperConfig(**{key: getattr(config, key) for key in STRUCTURE})


def encoder_strides(value: Json) -> tuple[int, ...]:
    """Return the strides of the second convolution, and of the pooling if the encoder has one."""
    return (2, 2) if KINDS[value["model_type"]].pooled else (2,)


class Tower(WhisperEncoder):
    """Whisper's layers with a forward of our own: transformers' forward accepts whole windows only and ignores its mask."""

    kind = EncoderFamily()

    def forward(self, values: Tensor, lengths: Tensor | None, full_window: bool) -> Tensor:  # type: ignore[override]
        """Encode log-mel (N, M, F) with (N,) valid frames -> (N, L, C).

        Rows of valid frames do not depend on other rows, except on silence in the full window, with which Whisper was trained.
        """
        kept = None if full_window else lengths
        rows = F.gelu(convolved(self.conv1, masked(values.transpose(1, 2), kept).transpose(1, 2)))
        rows = F.gelu(convolved(self.conv2, masked(rows.transpose(1, 2), kept).transpose(1, 2))).transpose(1, 2)
        lengths = shortened(lengths, 2)
        rows = rows + self.embed_positions(torch.arange(rows.shape[1], device=rows.device))
        rows = F.dropout(rows, self.dropout, self.training)
        attended = None
        if lengths is not None and (self.kind.masked or not full_window):
            attended = valid_mask(lengths, rows.shape[1])[:, None, None]
        for layer in self.layers:
            rows = layer(rows, attended)
        return self.layer_norm(mean_of_pairs(rows, lengths) if self.kind.pooled else rows)


class AudioEncoder(Encoder):
    """A Whisper encoder: log-mel (N, M, F) -> features (N, L, C). full_window: F is the whole window, with silence at the end."""

    def __init__(self, value: Json, full_window: bool) -> None:
        super().__init__()
        config = encoder_config(value)
        self.full_window = full_window
        self.strides = encoder_strides(value)
        self.hidden_size = config.d_model
        self.blank_length = 2  # rows
        self.tower: Tower = Tower._from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        self.tower.kind = KINDS[value["model_type"]]

    def requires_grad_(self, requires_grad: bool = True) -> AudioEncoder:
        """Set requires_grad of all parameters but the positions: they are sinusoids, which no Whisper model has trained."""
        super().requires_grad_(requires_grad)
        self.tower.embed_positions.requires_grad_(False)
        return self

    def valid_rows(self, lengths: Tensor | None) -> Tensor | None:
        """Return the number of features of each row that come from valid frames, (N,)."""
        for stride in self.strides:
            lengths = shortened(lengths, stride)
        return lengths

    def forward(self, values: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.tower(values, lengths, self.full_window)
