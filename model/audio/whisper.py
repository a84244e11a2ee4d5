"""Whisper's encoder, and Qwen2-Audio's, which is one: log-mel rows to features as in transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import WhisperConfig

from model.errors import ConfigError
from model.files.hub import find_file, hugging_face_config, read_json
from model.files.untrusted import Json
from model.media_spec import AudioSpec

if TYPE_CHECKING:
    from model.audio.whisper_tower import Tower

SETTING = "model.audio.path"
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


def encoder_config(value: Json) -> WhisperConfig:
    """Return the encoder's part of config.json `value` as a Whisper config."""
    config = hugging_face_config(SETTING, value)
    return WhisperConfig(**{key: getattr(config, key) for key in STRUCTURE})


def whisper_spec(path: str, value: Json, strides: tuple[int, ...], cache_dir: str) -> AudioSpec:
    """Return the encoder's spec, by config.json `value` and the folder's feature extractor; what that leaves out is Whisper's."""
    structure = encoder_config(value)
    found = feature_config(path, cache_dir)
    spec = AudioSpec(
        num_mels=structure.num_mel_bins,
        window_frames=2 * structure.max_source_positions,
        full_window=True,
        strides=strides,
        sampling_rate=found.get("sampling_rate", 16_000),
        n_fft=found.get("n_fft", 400),
        hop=found.get("hop_length", 160),
    )
    window = spec.window_frames * spec.hop
    check_feature_setting(path, "feature_size", found.get("feature_size", spec.num_mels), spec.num_mels)
    check_feature_setting(path, "chunk_length", found.get("chunk_length", 0) * spec.sampling_rate or window, window)
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


def build_whisper(value: Json) -> Tower:
    """Build Whisper's encoder of config.json `value`."""
    from model.audio.whisper_tower import Tower  # here: transformers' Whisper is imported for models that hear, and no others

    tower: Tower = Tower._from_config(encoder_config(value), dtype=torch.float32, attn_implementation="sdpa")
    return tower


def build_qwen2_audio(value: Json) -> Tower:
    """Build Qwen2-Audio's encoder of config.json `value`."""
    tower = build_whisper(value)
    tower.is_pooled = tower.is_masked = True
    return tower
