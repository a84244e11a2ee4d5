"""Resampling of sound from one sampling rate to another, by windowed-sinc interpolation.

A tone below 0.91 of the lower Nyquist frequency keeps its amplitude and phase to 5e-5; at that Nyquist frequency and above its
amplitude falls to less than 2e-5, so nothing aliases.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, gcd

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ZEROS = 64
"""Zero crossings of the sinc on each side: more of them make the transition band narrower and cost more."""
CUTOFF = 0.955
"""Middle of the transition, as a share of the lower Nyquist frequency."""
KAISER = 9.0
"""Shape of the window: 90 dB in the stop band."""
_TOGETHER = 64
"""Outputs that one matrix computes: wide enough for a fast product, narrow enough not to be mostly zeros."""
_AT_ONCE = 512
"""Strips that are multiplied at once: they overlap, so the product copies them, and so many copies stay in the cache."""


def resampled_length(num_samples: int, rate: int, new_rate: int) -> int:
    """Return how many samples `resample` makes: those that begin before the sound ends."""
    return -(-num_samples * new_rate // rate)


def resample(wave: Tensor, rate: int, new_rate: int) -> Tensor:
    """Resample (n,) float32 at `rate` to (resampled_length,) at `new_rate`; memory grows in proportion to input and output.

    The positions of the outputs between the inputs repeat. Outputs are computed in groups: strips of the sound times the weights of
    some sixty outputs, so that no pair of rates, however odd, needs a large table.
    """
    if rate == new_rate:
        return wave
    common = gcd(rate, new_rate)
    repeats = max(1, _TOGETHER * common // new_rate)
    outputs, inputs = new_rate // common * repeats, rate // common * repeats
    length = resampled_length(len(wave), rate, new_rate)
    blocks = -(-length // outputs)
    reach = ceil(ZEROS / CUTOFF * max(1.0, rate / new_rate))
    padded = F.pad(wave, (reach, blocks * inputs + reach + inputs - len(wave)))
    out = torch.empty(blocks, outputs)
    for first in range(0, outputs, _TOGETHER):
        start, weights = _group(first, outputs, inputs, reach)
        strips = padded[start:].unfold(0, len(weights), inputs)[:blocks]
        for part in range(0, blocks, _AT_ONCE):
            out[part : part + _AT_ONCE, first : first + weights.shape[1]] = strips[part : part + _AT_ONCE] @ weights
    return out.flatten()[:length]


@lru_cache(maxsize=32)
def _group(first: int, outputs: int, inputs: int, reach: int) -> tuple[int, Tensor]:
    """Return the first input of a group of outputs and the group's weights, which take longer to make than ten seconds of sound."""
    start = first * inputs // outputs
    places = np.arange(first, min(first + _TOGETHER, outputs)) * inputs / outputs - start
    return start, _weights(places, reach, CUTOFF / max(1.0, inputs / outputs))


def _weights(places: np.ndarray, reach: int, cutoff: float) -> Tensor:
    """Return weights (taps, k): column k makes the output that lies `places[k]` inputs after the first one.

    Tap 0 is `reach` before that.
    """
    distance = np.arange(-reach, ceil(places[-1]) + reach + 1)[:, None] - places
    inside = np.clip(1 - (distance * cutoff / ZEROS) ** 2, 0, None)
    window = np.where(inside > 0, np.i0(KAISER * np.sqrt(inside)) / np.i0(KAISER), 0.0)
    return torch.from_numpy((cutoff * np.sinc(distance * cutoff) * window).astype(np.float32))
