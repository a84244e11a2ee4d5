"""Sound as one channel of samples: WAV files are read without any extra package, all others through PyAV."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.media.av_files import open_stream, sound_blocks, sound_facts
from data.media.blob import Blob, MediaError
from data.media.wav import WavHeader, read_wav_header, read_wav_samples

RATES = (1000, 192_000)
"""Lowest and highest samples per second."""
MAX_CHANNELS = 32
MAX_AMPLITUDE = 16.0
"""Largest absolute sample. Full scale is 1; larger floats were never scaled to it, and log-mel features would be off by that."""
_CUT_SECONDS = 0.2
"""Seconds by which a compressed file may decode to less than its header declares: encoders pad."""
_EXACT_LENGTHS = ("flac", "mov", "wav", "aiff", "caf")
"""Formats whose headers hold the number of samples; the lengths of other formats may be guesses from the bit rate."""


@dataclass(frozen=True)
class Length:
    rate: int  # samples per second
    num_samples: int  # per channel
    is_open: bool = False  # a WAV file whose header gives no length, so that it is read to its end


def sound_length(blob: Blob, max_seconds: float) -> Length:
    """Return the exact length of the sound: by the header of a WAV file, by decoding any other.

    Raises MediaError, as `read_audio` does.
    """
    header = _wav_header(blob)
    if header is None:
        return _decoded(blob, max_seconds, keep=False)[0]
    _check_length(blob.name, header.num_samples, header.rate, max_seconds)
    return Length(header.rate, header.num_samples, header.is_open)


def read_audio(blob: Blob, max_seconds: float) -> tuple[int, Tensor]:
    """Return the sampling rate and the samples (n,) float32, the mean of all channels, full scale 1.

    Raises MediaError for a file that is broken, cut off, empty, longer than `max_seconds`, or holds samples that are no sound.
    """
    header = _wav_header(blob)
    if header is None:
        length, blocks = _decoded(blob, max_seconds, keep=True)
        return length.rate, _checked(blob.name, np.concatenate(blocks))
    _check_length(blob.name, header.num_samples, header.rate, max_seconds)
    with blob.open() as stream:
        return header.rate, _checked(blob.name, _mono(read_wav_samples(stream, header)))


def check_sound(blob: Blob) -> None:
    """Raise MediaError for a file that cannot be read as its header says; nothing is decoded."""
    if _wav_header(blob) is None:
        with open_stream(blob, "audio") as (_, stream):
            facts = sound_facts(stream)
            _check_header(blob.name, facts.rate, facts.num_channels)


def _wav_header(blob: Blob) -> WavHeader | None:
    with blob.open() as stream:
        header = read_wav_header(stream, blob.name, blob.num_bytes())
    if header is not None:
        _check_header(blob.name, header.rate, header.num_channels)
        _check_some(blob.name, header.num_samples)
    return header


def _decoded(blob: Blob, max_seconds: float, keep: bool) -> tuple[Length, list[np.ndarray]]:
    """Decode a compressed file; return its length and, with `keep`, its blocks (n,).

    Decoding stops where the sound becomes too long.
    """
    blocks, num_samples = [], 0
    with open_stream(blob, "audio") as (container, stream):
        facts = sound_facts(stream)
        _check_header(blob.name, facts.rate, facts.num_channels)
        for block in sound_blocks(container, stream, blob.name):
            num_samples += len(block)
            _check_length(blob.name, num_samples, facts.rate, max_seconds, facts.seconds)
            if keep:
                blocks.append(_mono(block))
        declared = facts.seconds if container.format.name.split(",")[0] in _EXACT_LENGTHS else 0.0
    _check_some(blob.name, num_samples)
    if num_samples / facts.rate < declared - _CUT_SECONDS:
        raise MediaError(f"{blob.name!r} declares {declared:.2f} s and holds {num_samples / facts.rate:.2f} s: it is cut off")
    return Length(facts.rate, num_samples), blocks


def _mono(samples: np.ndarray) -> np.ndarray:
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)


def _checked(name: str, samples: np.ndarray) -> Tensor:
    if not np.isfinite(samples).all():
        raise MediaError(f"{name!r} holds {int((~np.isfinite(samples)).sum())} samples that are no finite number")
    if (loudest := float(np.abs(samples).max())) > MAX_AMPLITUDE:
        raise MediaError(f"{name!r} reaches {loudest:.6g}; full scale is 1: its samples were stored without being scaled to it")
    return torch.from_numpy(np.ascontiguousarray(samples))


def _check_header(name: str, rate: int, num_channels: int) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise MediaError(f"{name!r} has {rate} samples per second; {RATES[0]} to {RATES[1]} are read")
    if not 1 <= num_channels <= MAX_CHANNELS:
        raise MediaError(f"{name!r} has {num_channels} channels; 1 to {MAX_CHANNELS} are read")


def _check_some(name: str, num_samples: int) -> None:
    if num_samples == 0:
        raise MediaError(f"{name!r} holds no samples")


def _check_length(name: str, num_samples: int, rate: int, max_seconds: float, declared: float = 0.0) -> None:
    if num_samples > max_seconds * rate:
        seconds = max(num_samples / rate, declared)
        raise MediaError(f"{name!r} lasts {seconds:.2f} s; data.max_seconds allows {max_seconds:g}")
