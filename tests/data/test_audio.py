"""Clips become Whisper's own features, counted exactly before they are read; what is no sound is named, and nothing is cut."""

from __future__ import annotations

import io
import struct
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import WhisperFeatureExtractor

from data.config import DataConfig
from data.media import audio
from data.media.audio import log_mel_rows
from data.media.blob import Blob, MediaError
from data.media.resample import resample, resampled_length
from data.media.sound import read_audio, sound_length
from data.records.record import MediaRef
from model.media_spec import AudioSpec, MediaMeta, row_frames
from tests.support.tiny_media import compressed, tone, wav

FULL = AudioSpec(80, 3000, True, (2,))
OWN = AudioSpec(80, 3000, False, (2,))
REF = MediaRef("audio", "a")


def in_memory(data: bytes, name: str = "a.wav") -> Blob:
    return Blob(name, data=data)


def load(blob: Blob, spec: AudioSpec = FULL, **config: Any) -> tuple[MediaMeta, Tensor]:
    limits = DataConfig(**config)
    meta = audio.measure(blob, REF, spec, limits, 1)
    return meta, audio.load(blob, REF, spec, limits, meta)


def noise(num_samples: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(num_samples).uniform(-0.9, 0.9, (num_samples, channels)).astype(np.float32)


def extracted(samples: Tensor, num_mels: int) -> Tensor:
    extractor = WhisperFeatureExtractor(feature_size=num_mels)
    return torch.from_numpy(extractor(samples.numpy(), sampling_rate=16_000, return_tensors="np")["input_features"][0])


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("num_samples", [1, 160, 161, 6400, 117_600, 479_600, 480_000])
def test_features_are_whispers(num_samples: int, num_mels: int) -> None:
    samples = torch.from_numpy(noise(num_samples)[:, 0])
    samples[-1] = 20.0  # a click at the very end: its echo in the frames after the clip decides the maximum
    expected = extracted(samples, num_mels)
    full, own = (log_mel_rows(samples, AudioSpec(num_mels, 3000, whole, (2,))) for whole in (True, False))
    frames = -(-num_samples // 160)
    assert full.shape == (1, num_mels, 3000) and own.shape == (1, num_mels, frames)
    assert (full[0] - expected).abs().max() <= 1e-6
    assert (own[0] - expected[:, :frames]).abs().max() <= 1e-6


@pytest.mark.parametrize("spec", [FULL, OWN])
def test_long_clips_are_split_into_windows_that_whisper_would_hear(spec: AudioSpec) -> None:
    samples = torch.cat([torch.from_numpy(noise(480_000)[:, 0]), torch.from_numpy(noise(20_001)[:, 0]) / 1000])
    meta = MediaMeta(num_frames=3126)
    assert row_frames(spec, meta) == (3000, 126)
    rows = log_mel_rows(samples, spec)
    assert rows.shape == (2, 80, 3000)
    for row, piece, frames in zip(rows, samples.split(480_000), row_frames(spec, meta)):
        assert (row[:, :frames] - extracted(piece, 80)[:, :frames]).abs().max() <= 1e-6
    assert bool((rows[1, :, 126:] == 0).all()) != spec.full_window


def test_a_short_window_splits_as_a_long_one_does() -> None:
    spec = AudioSpec(20, 50, False, (2,))
    samples = torch.from_numpy(noise(160 * 120 + 1)[:, 0])
    rows = log_mel_rows(samples, spec)
    assert rows.shape == (3, 20, 50)
    for row, piece in zip(rows, samples.split(8000)):
        alone = log_mel_rows(piece, spec)[0]
        assert torch.equal(row[:, : alone.shape[1]], alone) and not row[:, alone.shape[1] :].any()


def test_silence_is_a_clip() -> None:
    meta, rows = load(in_memory(wav(np.zeros((16_000, 1)), 16_000)))
    assert meta.num_frames == 100 and torch.allclose(rows, torch.full_like(rows, -1.5))


@pytest.mark.parametrize(("bits", "error"), [(8, 2**-8), (16, 2**-16), (24, 2**-24), (32, 2**-24)])
@pytest.mark.parametrize("extensible", [False, True])
def test_every_width_of_whole_numbers_is_read(bits: int, error: float, extensible: bool) -> None:
    samples = noise(1001, 2) * 0.9
    header = {"tag": 0xFFFE} if extensible else {}
    data = wav(samples, 22_050, bits, junk=b"LIST" + struct.pack("<I", 3) + b"abc\0", **header)
    rate, read = read_audio(in_memory(data), 30)
    assert rate == 22_050 and (read - torch.from_numpy(samples.mean(1))).abs().max() <= error
    if not extensible:
        with wave.open(io.BytesIO(data)) as theirs:
            assert (theirs.getnframes(), theirs.getframerate()) == (1001, 22_050)
            raw = np.frombuffer(theirs.readframes(1001), dtype=np.uint8).reshape(1001, 2, bits // 8)
        assert raw.tobytes() in data


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFF - 36])
def test_a_file_from_a_pipe_is_read_to_its_end(size: int) -> None:
    samples = noise(1001, 2)
    expected = read_audio(in_memory(wav(samples, 16_000)), 30)[1]
    data = in_memory(wav(samples, 16_000, size=size, junk=b"LIST\4\0\0\0abcd") + b"\x01")  # cut within a sample
    audio.check(data)
    assert sound_length(data, 30).num_samples == 1001 and sound_length(data, 30).is_open
    assert not sound_length(in_memory(wav(samples, 16_000)), 30).is_open
    assert torch.equal(read_audio(data, 30)[1], expected)
    with pytest.raises(MediaError, match=r"lasts 0\.06 s; data\.max_seconds allows 0\.05"):
        read_audio(data, 0.05)


@pytest.mark.parametrize("after", [b"", b"LIST\4\0\0\0abcd", b"LIST\3\0\0\0abc\0id3 \0\0\0\0"])
def test_chunks_behind_no_samples_are_no_samples(after: bytes) -> None:
    with pytest.raises(MediaError, match=r"'a\.wav' holds no samples"):
        read_audio(in_memory(wav(noise(0), 16_000) + after), 30)


@pytest.mark.parametrize("size", [2000, 2002, 0, 2**64 - 1])
@pytest.mark.parametrize("kind", [b"RF64", b"BW64"])
def test_a_size_of_64_bits_is_read(kind: bytes, size: int) -> None:
    samples = noise(1000)
    plain = wav(samples, 16_000, size=0xFFFFFFFF)
    wide = b"ds64" + struct.pack("<IQQQI", 28, 0, size, 0, 0)
    data = in_memory(kind + plain[4:12] + wide + plain[12:])
    if size == 2002:
        with pytest.raises(MediaError, match="declares 2002 bytes of samples and holds 2000: it is cut off"):
            read_audio(data, 30)
    else:
        assert sound_length(data, 30).is_open == (size != 2000)
        assert torch.equal(read_audio(data, 30)[1], read_audio(in_memory(wav(samples, 16_000)), 30)[1])


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("tag", [3, 0xFFFE])
def test_floats_are_read_as_they_are(bits: int, tag: int) -> None:
    samples = noise(777) * 1.5
    data = wav(samples, 8000, bits, is_float=True, tag=tag)
    assert torch.equal(read_audio(in_memory(data), 30)[1], torch.from_numpy(samples[:, 0]))


def test_flac_is_its_wav_to_the_bit_and_mp3_is_close() -> None:
    samples = tone(1.3, 44_100, channels=2)
    plain = wav(samples, 44_100)
    rate, expected = read_audio(in_memory(plain), 30)
    whole = np.frombuffer(plain[-samples.size * 2 :], dtype="<i2").reshape(-1, 2) / np.float32(2**15)
    flac = read_audio(in_memory(compressed(whole.astype(np.float32), 44_100, "flac", "flac")), 30)
    assert flac[0] == rate and torch.equal(flac[1], expected)
    _, mp3 = read_audio(in_memory(compressed(samples, 44_100, "mp3", "libmp3lame", 320_000)), 30)
    assert len(mp3) == len(expected) and (mp3 - expected)[4000:-4000].abs().max() < 1e-3


@pytest.mark.parametrize(
    ("form", "codec", "rate"),
    [("mp3", "libmp3lame", 44_100), ("flac", "flac", 16_000), ("ogg", "libopus", 48_000), ("mp4", "aac", 22_050)]
    + [("matroska", "flac", 8000), ("wav", "pcm_mulaw", 8000), ("adts", "aac", 32_000), ("mp3", "libmp3lame", 16_000)],
)
@pytest.mark.parametrize("spec", [FULL, OWN])
def test_what_is_measured_is_what_is_loaded(form: str, codec: str, rate: int, spec: AudioSpec) -> None:
    data = compressed(tone(0.731, rate), rate, form, codec)
    meta, rows = load(in_memory(data, "clip"), spec)
    assert 73 <= meta.num_frames <= 90  # encoders pad
    assert rows.shape == (1, 80, 3000 if spec.full_window else meta.num_frames)
    audio.check(in_memory(data, "clip"))


@settings(max_examples=60, deadline=None)
@given(num_samples=st.integers(1, 4000), rate=st.sampled_from([8000, 11_025, 12_345, 16_000, 22_050, 44_100, 48_000, 96_000]))
def test_counts_are_exact_for_every_length_and_rate(num_samples: int, rate: int) -> None:
    spec = AudioSpec(8, 7, False, (2, 2))
    meta, rows = load(in_memory(wav(noise(num_samples), rate)), spec)
    assert meta.num_frames == -(-num_samples * 100 // rate)
    assert rows.shape == (len(row_frames(spec, meta)), 8, min(7, meta.num_frames))


RATES = [(44_100, 16_000), (48_000, 16_000), (8000, 16_000), (22_050, 16_000), (11_025, 16_000), (12_345, 16_000), (96_000, 16_000)]


@pytest.mark.parametrize(("rate", "new_rate"), RATES)
def test_tones_keep_frequency_amplitude_and_phase(rate: int, new_rate: int) -> None:
    nyquist = min(rate, new_rate) / 2
    for share in (0.01, 0.3, 0.7, 0.91):
        made = resample(torch.from_numpy(tone(1.0, rate, share * nyquist)[:, 0]), rate, new_rate)
        assert len(made) == resampled_length(rate, rate, new_rate) == new_rate
        inner = slice(new_rate // 5, -new_rate // 5)  # where the tone begins and ends it is no tone
        assert np.abs(made.numpy() - tone(1.0, new_rate, share * nyquist)[:, 0])[inner].max() < 2.5e-5


@pytest.mark.parametrize(("rate", "new_rate"), [r for r in RATES if r[0] > r[1]])
def test_nothing_above_the_new_nyquist_frequency_folds_back(rate: int, new_rate: int) -> None:
    for share in (1.0, 1.05, 1.3, rate / new_rate * 0.99):
        made = resample(torch.from_numpy(tone(1.0, rate, share * new_rate / 2, level=1.0)[:, 0]), rate, new_rate)
        assert made[new_rate // 5 : -new_rate // 5].abs().max() < 2e-5


def test_rates_without_a_common_divisor_need_no_large_table() -> None:
    made = resample(torch.from_numpy(tone(0.5, 44_101, 5000)[:, 0]), 44_101, 16_000)
    assert np.abs(made.numpy() - tone(0.5, 16_000, 5000)[:, 0])[2000:-2000].max() < 2.5e-5


def test_the_same_rate_changes_nothing() -> None:
    samples = torch.from_numpy(noise(100)[:, 0])
    assert torch.equal(resample(samples, 16_000, 16_000), samples)


def flac(seconds: float = 1.0) -> bytes:
    return compressed(tone(seconds, 16_000), 16_000, "flac", "flac")


CLIP = noise(1600)
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "cannot be decoded"),
    "text": (b"this is not a sound" * 50, "cannot be decoded"),
    "no samples": (wav(CLIP[:0], 16_000), "holds no samples"),
    "cut off": (wav(CLIP, 16_000)[:-7], "declares 3200 bytes of samples and holds 3193: it is cut off"),
    "16-bit floats": (wav(CLIP, 16_000, 16, is_float=True), "WAV file of 16-bit floats; what is read: whole numbers of 8, 16, 24"),
    "SPHERE": (b"NIST_1A\n   1024\n" + bytes(3000), r"it is a NIST SPHERE file \(.*\)\. What is read: WAV, W64, FLAC"),
    "AC-3": (b"\x0b\x77" + bytes(3000), "it is a raw AC-3 stream. What is read: WAV"),
    "H.264": (b"\0\0\0\1\x67\x64" + bytes(3000), "it is a raw H.264 stream. What is read: WAV"),
    "W64 that is none": (b"riff" + bytes(3000), "it is broken, or none of what is read: WAV, W64, FLAC"),
    "2^31 samples": (wav(CLIP, 16_000, size=2**32 - 2), "declares 4294967294 bytes of samples and holds 3200"),
    "half a sample": (wav(CLIP, 16_000, size=3199), "no whole number of 2"),
    "rate 0": (wav(CLIP, 16_000, told_rate=0), "has 0 samples per second; 1000 to 192000 are read"),
    "rate 10 MHz": (wav(CLIP, 16_000, told_rate=10_000_000), "has 10000000 samples per second"),
    "64 channels": (wav(noise(10, 64), 16_000), "has 64 channels; 1 to 32 are read"),
    "0 channels": (wav(CLIP, 16_000, told_channels=0), "declares 0 channels"),
    "no fmt chunk": (b"RIFF\4\0\0\0WAVE", "has no fmt chunk"),
    "no data chunk": (wav(CLIP, 16_000)[:36], "has no data chunk"),
    "short fmt chunk": (b"RIFF\x20\0\0\0WAVEfmt \4\0\0\0\1\0\1\0data\0\0\0\0", "fmt chunk of 4 bytes"),
    "NaN": (wav(np.array([[0.0], [np.nan], [np.inf]]), 16_000, 32, is_float=True), "2 samples that are no finite number"),
    "never scaled": (wav(CLIP * 32767, 16_000, 32, is_float=True), "full scale is 1"),
    "cut FLAC": (flac()[:-3000], "(cut off|cannot be decoded)"),
    "picture": (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "cannot be decoded"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_sound_is_named(kind: str) -> None:
    data, reason = BROKEN[kind]
    with pytest.raises(MediaError, match=f"^'bad' .*{reason}"):
        load(in_memory(data, "bad"))


@pytest.mark.parametrize(
    "kind", ["cut off", "2^31 samples", "rate 0", "64 channels", "no data chunk", "empty file", "text", "no samples"]
)
def test_the_check_finds_it_without_decoding(kind: str) -> None:
    with pytest.raises(MediaError):
        audio.check(in_memory(BROKEN[kind][0]))


@pytest.mark.parametrize("data", [wav(noise(16_001), 16_000), flac(1.01)])
def test_a_clip_that_is_too_long_is_refused_with_both_numbers_and_never_cut(data: bytes) -> None:
    for act in (sound_length, read_audio):
        with pytest.raises(MediaError, match=r"^'long' lasts 1\.0\d* s; data.max_seconds allows 1$"):
            act(in_memory(data, "long"), 1.0)
    assert sound_length(in_memory(wav(noise(16_000), 16_000)), 1.0).num_samples == 16_000


def test_a_clip_that_changed_since_it_was_measured_is_refused() -> None:
    with pytest.raises(MediaError, match="measured as 99 frames and decodes to 10"):
        audio.load(in_memory(wav(CLIP, 16_000)), REF, FULL, DataConfig(), MediaMeta(num_frames=99))


def test_without_pyav_only_wav_is_read_and_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    data = flac()
    monkeypatch.setitem(sys.modules, "av", None)
    assert load(in_memory(wav(CLIP, 16_000)))[0].num_frames == 10
    for act in (load, audio.check):
        with pytest.raises(MediaError, match=r"pip install -e '\.\[media\]'"):
            act(in_memory(data, "a.flac"))  # type: ignore[operator]


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret.flac"
    secret.write_bytes(flac())
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{secret}\n#EXT-X-ENDLIST\n".encode()
    concat = f"ffconcat version 1.0\nfile '{secret}'\n".encode()
    for data in (playlist, concat):
        with pytest.raises(MediaError, match="cannot be decoded"):
            load(in_memory(data, "list"))


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.wav", "does not exist"), (tmp_path, "is not a regular file")):
        with pytest.raises(MediaError, match=reason):
            load(Blob(path.name, str(path)))
