"""The audio encoder: log-mel rows to features, a row of features per two frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from model.batch import AudioSpec
from model.config import AudioConfig, AudioProjectorConfig, ConfigError
from model.hub import find_file, read_json
from model.llm import hugging_face_config

SETTING = "model.audio.path"


def audio_config(config: AudioConfig, cache_dir: str = "") -> dict[str, Any]:
    """config.json of the encoder."""
    value = read_json(SETTING, config.path, "config.json", cache_dir)
    if value.get("model_type") != "whisper":
        raise ConfigError(f"{SETTING} = {config.path!r}: {value.get('model_type')!r} is not whisper")
    return value


def audio_spec(config: AudioConfig, projector: AudioProjectorConfig, cache_dir: str = "") -> AudioSpec:
    """What data needs to know, from JSON files alone."""
    value = hugging_face_config(SETTING, audio_config(config, cache_dir))
    found = {}
    if find_file(SETTING, config.path, "preprocessor_config.json", cache_dir):
        found = read_json(SETTING, config.path, "preprocessor_config.json", cache_dir)
    return AudioSpec(
        num_mels=value.num_mel_bins,
        window_frames=2 * value.max_source_positions,
        full_window=config.window == "full",
        strides=(2,),
        sampling_rate=found.get("sampling_rate", 16_000),
        n_fft=found.get("n_fft", 400),
        hop=found.get("hop_length", 160),
        num_prompts=projector.prompts,
    )


class AudioEncoder(nn.Module):
    """Log-mel (N, M, F) -> features (N, ceil(F / 2), C) of a Whisper encoder."""

    def __init__(self, value: dict[str, Any]) -> None:
        super().__init__()
        config: Any = hugging_face_config(SETTING, value)
        self.hidden_size: int = config.d_model
        self.blank_length = 2
        self.tower = AutoModel.from_config(config, dtype=torch.float32, attn_implementation="sdpa").encoder

    def valid_rows(self, lengths: Tensor | None) -> Tensor | None:
        """Rows that come from valid frames, (N,)."""
        return None if lengths is None else (lengths - 1) // 2 + 1

    def forward(self, values: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.tower(values).last_hidden_state
