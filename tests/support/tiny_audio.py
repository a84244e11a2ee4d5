"""A tiny random Whisper as a Hugging Face folder, and clips as the rows a batch holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from data.media.audio import log_mel_rows
from model.media_spec import AudioSpec, MediaMeta, row_frames
from tests.support.tiny import SIZES, spread

MELS = 10
ENCODER: dict[str, Any] = {
    "num_mel_bins": MELS,
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
}


def save_whisper(folder: Path, seconds: int = 30, **overrides: Any) -> Path:
    """A whole Whisper, decoder and all, whose window is `seconds` long, with its feature extractor's JSON."""
    torch.manual_seed(3)
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "max_target_positions": 8}
    tokens = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(**{**ENCODER, **decoder, **tokens, "max_source_positions": 50 * seconds, **overrides})
    model = WhisperForConditionalGeneration(config)
    spread(model)
    model.save_pretrained(folder)
    extractor(seconds, config.num_mel_bins).save_pretrained(folder)
    return folder


def extractor(seconds: int = 30, num_mels: int = MELS) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=num_mels, chunk_length=seconds)


def save_qwen2_audio(folder: Path, seconds: int = 30, audio_token: int = 319) -> Qwen2AudioForConditionalGeneration:
    """A whole Qwen2-Audio, which is returned in eval mode."""
    torch.manual_seed(4)
    config = Qwen2AudioConfig(
        audio_config=Qwen2AudioEncoderConfig(**ENCODER, max_source_positions=50 * seconds).to_dict(),
        text_config={"model_type": "qwen2", **SIZES},
        audio_token_index=audio_token,
    )
    model = Qwen2AudioForConditionalGeneration(config)
    spread(model)
    model.save_pretrained(folder)
    extractor(seconds).save_pretrained(folder)
    return model.eval()


def wave(seconds: float, seed: int = 0) -> Tensor:
    """(n,) samples at 16 kHz: noise whose loudness changes, so that no stretch of it is like another."""
    n = round(seconds * 16_000)
    loudness = 0.2 + 0.2 * torch.sin(torch.arange(n) / 700.0)
    return loudness * torch.randn(n, generator=torch.Generator().manual_seed(seed + n))


def joined(waves: list[Tensor], spec: AudioSpec) -> tuple[Tensor, Tensor]:
    """Rows (N, M, F) of all clips, shorter ones filled up with zeros, and their valid frames (N,)."""
    rows = [row for one in waves for row in log_mel_rows(one, spec)]
    width = max(row.shape[1] for row in rows)
    frames = [count for one in waves for count in row_frames(spec, MediaMeta(num_frames=-(-len(one) // spec.hop)))]
    return torch.stack([torch.nn.functional.pad(row, (0, width - row.shape[1])) for row in rows]), torch.tensor(frames)
