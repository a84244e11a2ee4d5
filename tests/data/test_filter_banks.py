"""Kaldi's filter banks, compared with their definition written out; torchaudio's are compared in docs/exchange.md."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data.config import DataConfig
from data.media.audio import feature_rows, load, measure, num_frames
from data.media.blob import Blob, MediaError
from data.media.filter_banks import filter_banks
from data.records.record import MediaRef
from model.media_spec import AudioSpec, MediaMeta, least_frames, num_tokens, row_frames, row_tokens, token_rows
from tests.support.tiny_audio import wave
from tests.support.tiny_media import wav

SPEC = AudioSpec(20, 20_000, False, (2, 2, 2), features="kaldi", kernels=(3, 3, 1))


def by_definition(samples: np.ndarray, num_mels: int) -> np.ndarray:
    """(F, num_mels), in float64, one frame and one band at a time."""

    def mel(hertz: float) -> float:
        return 1127 * math.log(1 + hertz / 700)

    step = (mel(8000) - mel(20)) / (num_mels + 1)
    found = []
    for start in range(0, len(samples) - 399, 160):
        frame = samples[start : start + 400] - samples[start : start + 400].mean()
        raised = [frame[0] - 0.97 * frame[0], *(frame[i] - 0.97 * frame[i - 1] for i in range(1, 400))]
        window = [(0.5 - 0.5 * math.cos(2 * math.pi * i / 399)) ** 0.85 for i in range(400)]
        power = np.abs(np.fft.fft(np.array(raised) * window, 512)) ** 2
        bands = []
        for band in range(num_mels):
            left, centre, right = (mel(20) + (band + i) * step for i in range(3))
            places = [mel(k * 16_000 / 512) for k in range(256)]
            weights = [max(0.0, min((m - left) / (centre - left), (right - m) / (right - centre))) for m in places]
            bands.append(math.log(max(float(np.dot(weights, power[:256])), 2.0**-23)))
        found.append(bands)
    return np.array(found)


def test_they_are_what_kaldi_defines() -> None:
    samples = wave(0.1) * 32768
    found = filter_banks(samples, SPEC)
    assert found.shape == (8, 20)
    np.testing.assert_allclose(found.numpy(), by_definition(samples.double().numpy(), 20), rtol=0, atol=1e-4)
    # Silence is the smallest number that float32 tells from 1 + itself.
    assert filter_banks(torch.zeros(400), SPEC).eq(math.log(2.0**-23)).all()


def test_means_and_scales_of_the_training_data_are_applied() -> None:
    plain = feature_rows(wave(0.1), SPEC)
    means, scales = tuple(0.5 * band for band in range(20)), tuple(1 + 0.1 * band for band in range(20))
    scaled = feature_rows(wave(0.1), AudioSpec(**{**vars(SPEC), "means": means, "scales": scales}))
    expected = (plain - torch.tensor(means)[:, None]) * torch.tensor(scales)[:, None]
    assert plain.shape == (1, 20, 8) and torch.equal(scaled, expected)


def test_dither_is_noise_that_a_clip_always_has() -> None:
    noisy = AudioSpec(**{**vars(SPEC), "dither": 1.0})
    first = feature_rows(torch.zeros(32_000), noisy)
    torch.manual_seed(99)
    assert torch.equal(first, feature_rows(torch.zeros(32_000), noisy))
    # Samples of deviation 1: the power behind the raised high frequencies and the window, 1.94 * 400 * 0.39, by the bands' widths.
    assert 4 < first.mean() < 8 and first.std() > 0.3


@pytest.mark.parametrize(("samples", "frames"), [(399, 0), (400, 1), (559, 1), (560, 2), (1360, 7), (16_000, 98)])
def test_a_frame_lies_wholly_inside_the_clip(samples: int, frames: int) -> None:
    assert num_frames(samples, SPEC) == frames
    if frames:
        assert feature_rows(torch.randn(samples), SPEC).shape == (1, 20, frames)


def test_tokens_are_counted_by_unpadded_convolutions() -> None:
    assert least_frames(SPEC) == 7 and least_frames(AudioSpec(80, 3000, True, (2, 2))) == 1
    counts = {7: 1, 11: 1, 15: 2, 28: 3, 348: 43, 352: 44, 2988: 373, 6498: 812}  # 7 frames make a row, 4 more another
    for frames, tokens in counts.items():
        assert num_tokens(SPEC, MediaMeta(num_frames=frames)) == tokens == len(torch.ones(frames)[2::2][2::2][::2])
    assert [num_tokens(SPEC, MediaMeta(num_frames=frames)) for frames in range(7)] == [0] * 7


def test_a_rest_that_is_too_short_takes_from_the_window_before_it() -> None:
    spec = AudioSpec(**{**vars(SPEC), "window_frames": 50})
    for frames, expected in [(49, (49,)), (50, (50,)), (53, (46, 7)), (57, (50, 7)), (103, (50, 46, 7)), (110, (50, 50, 10))]:
        meta = MediaMeta(num_frames=frames)
        assert row_frames(spec, meta) == expected
        rows = feature_rows(torch.randn(400 + 160 * (frames - 1)), spec)
        assert rows.shape == (len(expected), 20, max(expected))
        for row, valid in zip(rows, expected):
            assert row[:, :valid].ne(0).all() and row[:, valid:].eq(0).all()
        assert min(row_tokens(spec, meta)) > 0 and len(token_rows(spec, meta, 12)) == num_tokens(spec, meta)


def clip(seconds: float) -> Blob:
    return Blob("x.wav", data=wav(wave(seconds).numpy()[:, None], 16_000))


def test_what_is_measured_is_loaded_and_a_click_is_refused() -> None:
    config = DataConfig()
    ref = MediaRef("audio", "x.wav")
    for seconds in (0.085, 0.3, 1.0):
        blob = clip(seconds)
        meta = measure(blob, ref, SPEC, config, 1)
        assert load(blob, ref, SPEC, config, meta).shape[-1] == meta.num_frames
    with pytest.raises(MediaError, match="is too short: it makes 6 frames, and the audio encoder needs 7 for one token"):
        measure(clip(0.0849), ref, SPEC, config, 1)
