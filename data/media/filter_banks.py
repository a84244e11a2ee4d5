"""Kaldi's log-mel filter banks, by which VITA's sound encoder hears: equal to torchaudio's `compliance.kaldi.fbank`.

Samples have the scale of 16 bits. A frame is a window of `n_fft` samples that lies wholly inside the clip, so nothing is padded.
Its mean is subtracted, high frequencies are raised, and Povey's window is applied before the transform of the next power of two.
Dither is drawn from one seed for every clip: a clip always has the same features, and the same as from torchaudio after
`torch.manual_seed(0)`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from model.media_spec import AudioSpec, MediaMeta, row_frames

_FULL_SCALE = 1 << 15
_PREEMPHASIS = 0.97
_LOWEST = 20.0
"""Lower end of the mel bands in Hz; the upper end is half the sampling rate."""
_MEL = 1127.0
"""Factor of Kaldi's mel scale: 1127 ln(1 + hertz / 700)."""
_POVEY = 0.85
"""Exponent of the Hann window."""
_SEED = 0


def num_windows(num_samples: int, spec: AudioSpec) -> int:
    """Return the windows that lie wholly inside a clip."""
    return max(0, (num_samples - spec.n_fft) // spec.hop + 1)


def filter_bank_rows(wave: Tensor, spec: AudioSpec) -> Tensor:
    """Compute rows (n, M, F) of (n,) samples, full scale 1, split by `model.media_spec.row_frames`; zeros after a shorter row."""
    frames = filter_banks(wave * _FULL_SCALE, spec)
    if spec.means:
        frames = (frames - torch.tensor(spec.means)) * torch.tensor(spec.scales)
    pieces = frames.T.split(row_frames(spec, MediaMeta(num_frames=len(frames))), dim=1)
    width = max(piece.shape[1] for piece in pieces)
    return torch.stack([F.pad(piece, (0, width - piece.shape[1])) for piece in pieces])


def filter_banks(wave: Tensor, spec: AudioSpec) -> Tensor:
    """Compute frames (F, M) float32 of (n,) samples on the scale of 16 bits, before means and scales."""
    frames = wave.unfold(0, spec.n_fft, spec.hop)
    if spec.dither:
        noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(_SEED))
        frames = frames + noise * spec.dither
    frames = frames - frames.mean(dim=1, keepdim=True)
    frames = frames - _PREEMPHASIS * torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    window = torch.hann_window(spec.n_fft, periodic=False).pow(_POVEY)
    size = 1 << (spec.n_fft - 1).bit_length()
    power = torch.fft.rfft(frames * window, n=size).abs().square()
    mel = power @ _filters(spec.num_mels, size, spec.sampling_rate)
    return mel.clamp(min=torch.finfo(torch.float32).eps).log()


@lru_cache(maxsize=4)
def _filters(num_mels: int, size: int, sampling_rate: int) -> Tensor:
    """Return the weights (size // 2 + 1, M) float32 of the frequencies in each band: triangles on Kaldi's mel scale.

    In float32, as in torchaudio: rounded from float64, the low bands, which cover one or two frequencies, would differ by 2e-4 in
    the logarithm.
    """
    lowest, highest = (_MEL * math.log(1 + hertz / 700) for hertz in (_LOWEST, sampling_rate / 2))
    step = (highest - lowest) / (num_mels + 1)
    mels = _MEL * (1 + sampling_rate / size * torch.arange(size / 2) / 700).log()[:, None]
    band = torch.arange(num_mels)
    left, centre, right = (lowest + (band + i) * step for i in (0.0, 1.0, 2.0))
    rising, falling = (mels - left) / (centre - left), (right - mels) / (right - centre)
    return F.pad(torch.minimum(rising, falling).clamp(min=0), (0, 0, 0, 1))
