"""Audio clips: from a path in a record to the log-mel rows its audio encoder was trained on.

Whisper's features equal those of transformers' WhisperFeatureExtractor to 1e-6. A clip longer than its window is split into whole
windows and a rest, each normalised by its own maximum, as if Whisper heard them one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from data.config import DataConfig
from data.media import filter_banks
from data.media.blob import Blob, MediaError
from data.media.resample import resample, resampled_length
from data.media.sound import Length, check_sound, read_audio, sound_length
from data.records.record import MediaRef
from model.media_spec import AudioSpec, MediaMeta, least_frames

_SILENCE = 1e-10
"""Floor of the power of a mel band, as in Whisper."""
_HIGHEST = 8000.0
"""Upper end of the mel bands in Hz, as in Whisper."""


def measure(blob: Blob, ref: MediaRef, spec: AudioSpec, config: DataConfig, num_media: int) -> MediaMeta:
    """Return the clip's mel frames. The count is exact: taken from the header of a WAV file, by decoding any other file.

    Raises MediaError, also for a clip that is too short for one token.
    """
    return clip_meta(blob.name, sound_length(blob, config.max_seconds), spec)


def clip_meta(name: str, length: Length, spec: AudioSpec) -> MediaMeta:
    """Return the mel frames of a clip of a known length. Raises MediaError for one that is too short for a token."""
    frames = num_frames(resampled_length(length.num_samples, length.rate, spec.sampling_rate), spec)
    if frames < (least := least_frames(spec)):
        raise MediaError(f"{name!r} is too short: it makes {frames} frames, and the audio encoder needs {least} for one token")
    return MediaMeta(num_frames=frames)


def load(blob: Blob, ref: MediaRef, spec: AudioSpec, config: DataConfig, meta: MediaMeta) -> Tensor:
    """Decode a clip to log-mel rows (n, M, F) float32, one row per window.

    `model.media_spec.row_frames` gives each row's valid frames.

    F is the window if spec.full_window, with silence after the clip as in Whisper; otherwise F is the frame count of the longest
    row, with zeros after a shorter one. Valid frames are the same either way. Raises MediaError.
    """
    rate, samples = read_audio(blob, config.max_seconds)
    wave = resample(samples, rate, spec.sampling_rate)
    if (frames := num_frames(len(wave), spec)) != meta.num_frames:
        raise MediaError(f"{blob.name!r} was measured as {meta.num_frames} frames and decodes to {frames}")
    return feature_rows(wave, spec)


check = check_sound


def num_frames(num_samples: int, spec: AudioSpec) -> int:
    """Return the mel frames of `num_samples` samples at spec.sampling_rate."""
    return FEATURES[spec.features].num_frames(num_samples, spec)


def feature_rows(wave: Tensor, spec: AudioSpec) -> Tensor:
    """Compute rows (n, M, F), as `load` describes them, of (n,) samples at spec.sampling_rate."""
    return FEATURES[spec.features].rows(wave, spec)


def log_mel_rows(wave: Tensor, spec: AudioSpec) -> Tensor:
    """Compute rows (ceil(n / window), M, F), as `load` describes them, of (n,) samples at spec.sampling_rate."""
    pieces = wave.split(spec.window_frames * spec.hop)
    make = _whole_window if spec.full_window else _own_frames
    rows = [make(piece, spec) for piece in pieces]
    width = max(row.shape[1] for row in rows)
    return torch.stack([F.pad(row, (0, width - row.shape[1])) for row in rows])


def _whole_window(wave: Tensor, spec: AudioSpec) -> Tensor:
    mel, silence = _log_mel(wave, spec)
    return F.pad(mel, (0, spec.window_frames - mel.shape[1]), value=silence)


def _own_frames(wave: Tensor, spec: AudioSpec) -> Tensor:
    return _log_mel(wave, spec)[0][:, : _begun_hops(len(wave), spec)]


def _log_mel(wave: Tensor, spec: AudioSpec) -> tuple[Tensor, float]:
    """Return (M, F) of one window's samples with all frames they reach into, and the value of the silent frames after them.

    The samples are padded with zeros before the transform, so that the last frames equal those of the whole window. Frames beyond
    the padding are silent: their value is known, so they are not computed.
    """
    room = spec.window_frames * spec.hop - len(wave)
    padded = F.pad(wave, (0, min(spec.n_fft + spec.hop, room)))
    window = torch.hann_window(spec.n_fft)
    power = torch.stft(padded, spec.n_fft, spec.hop, window=window, return_complex=True)[:, :-1].abs() ** 2
    mel = (_filters(spec.num_mels, spec.n_fft, spec.sampling_rate) @ power.contiguous()).clamp(min=_SILENCE).log10()
    least = mel.max() - 8
    silence = torch.maximum(torch.tensor(_SILENCE).log10(), least)
    return (torch.maximum(mel, least) + 4) / 4, float((silence + 4) / 4)


def _begun_hops(num_samples: int, spec: AudioSpec) -> int:
    return -(-num_samples // spec.hop)


@lru_cache(maxsize=4)
def _filters(num_mels: int, n_fft: int, sampling_rate: int) -> Tensor:
    """Return the mel filter bank (M, n_fft // 2 + 1) float32: each band's weights over the frequencies.

    Slaney's scale and norm, as in Whisper.
    """
    from transformers.audio_utils import mel_filter_bank

    bank = mel_filter_bank(n_fft // 2 + 1, num_mels, 0.0, _HIGHEST, sampling_rate, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(bank).float().T.contiguous()


@dataclass(frozen=True)
class Features:
    """One kind of features: its frames for a number of samples, and its rows (n, M, F) of (n,) samples."""

    num_frames: Callable[[int, AudioSpec], int]
    rows: Callable[[Tensor, AudioSpec], Tensor]


FEATURES = {
    "whisper": Features(_begun_hops, log_mel_rows),
    "kaldi": Features(filter_banks.num_windows, filter_banks.filter_bank_rows),
}
"""Kinds of features by `AudioSpec.features`."""
