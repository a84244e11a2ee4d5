"""Sounds and films made in the process, in which every moment is known: tones, and frames of one grey each."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from data.media.blob import Blob

STEP = 8
"""Frame i of a film is of the grey STEP * i."""


def blob(path: Path) -> Blob:
    return Blob(path.name, str(path))


def tone(seconds: float, rate: int, hertz: float = 440.0, channels: int = 1, level: float = 0.5) -> np.ndarray:
    """(n, channels) float32; channel c is `level` / (c + 1) loud."""
    wave = level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.stack([wave / (c + 1) for c in range(channels)], axis=1).astype(np.float32)


def wav(samples: np.ndarray, rate: int, bits: int = 16, is_float: bool = False, **header: Any) -> bytes:
    """A WAV file of (n, channels) samples. `header` may lie: tag, told_channels, told_rate, size. junk: a chunk before them."""
    channels = samples.shape[1]
    body = _float_bytes(samples, bits) if is_float else _whole_bytes(samples, bits)
    tag, align = header.get("tag", 3 if is_float else 1), channels * bits // 8
    told_rate, told_channels = header.get("told_rate", rate), header.get("told_channels", channels)
    form = struct.pack("<HHIIHH", tag, told_channels, told_rate, rate * align % 2**32, told_channels * bits // 8 % 2**16, bits)
    if tag == 0xFFFE:
        form += struct.pack("<HHIH14s", 22, bits, 0, 3 if is_float else 1, b"\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71")
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + header.get("junk", b"")
    chunks += b"data" + struct.pack("<I", header.get("size", len(body))) + body + b"\0" * (len(body) % 2)
    return b"RIFF" + struct.pack("<I", (4 + len(chunks)) % 2**32) + b"WAVE" + chunks


def _float_bytes(samples: np.ndarray, bits: int) -> bytes:
    return samples.astype(f"<f{bits // 8}").tobytes()


def _whole_bytes(samples: np.ndarray, bits: int) -> bytes:
    numbers = np.round(samples.astype(np.float64) * 2 ** (bits - 1)).astype(np.int64)
    if bits == 8:
        return (numbers + 128).astype(np.uint8).tobytes()
    wide = numbers.astype("<i8")[..., None].view(np.uint8)
    return wide[..., : bits // 8].tobytes()


def compressed(samples: np.ndarray, rate: int, form: str, codec: str, bit_rate: int = 0) -> bytes:
    """(n, channels) samples as a file of libav's format `form`."""
    file = io.BytesIO()
    layout = {1: "mono", 2: "stereo"}[samples.shape[1]]
    with av.open(file, "w", format=form) as container:
        stream: Any = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        if bit_rate:
            stream.bit_rate = bit_rate
        stream.codec_context.open()
        size = stream.codec_context.frame_size or None
        fit = av.AudioResampler(stream.codec_context.format.name, layout, rate, frame_size=size)
        for piece in [*fit.resample(frame), *fit.resample(None), None]:
            container.mux(stream.encode(piece))
    return file.getvalue()


def greys(count: int, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    return [Image.new("RGB", size, (i * STEP,) * 3) for i in range(count)]


def film(
    pictures: Sequence[Image.Image],
    form: str = "mp4",
    codec: str = "libx264",
    rate: int = 10,
    times: Sequence[int] | None = None,
    sound: np.ndarray | None = None,
    **options: str,
) -> bytes:
    """A video file with picture i at times[i] / rate seconds; a key frame every twelve, others need two around them."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream: Any = container.add_stream(codec, rate=rate, options={"g": "12", "bf": "2", **options})
        stream.width, stream.height, stream.pix_fmt = *pictures[0].size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        heard: Any = container.add_stream("aac", rate=16_000, layout="mono") if sound is not None else None
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_image(picture)
            frame.pts, frame.time_base = (i if times is None else times[i]), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _add_sound(container, heard, sound)
    return file.getvalue()


def _add_sound(container: Any, stream: Any, samples: np.ndarray) -> None:
    for first in range(0, len(samples), 1024):
        piece = np.ascontiguousarray(samples[first : first + 1024].T)
        frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16_000, first
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def animation(pictures: Sequence[Image.Image], milliseconds: int | list[int], form: str = "GIF") -> bytes:
    file = io.BytesIO()
    options = {"lossless": True} if form == "WEBP" else {}
    pictures[0].save(file, form, save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0, **options)
    return file.getvalue()


def folder(path: Path, pictures: Sequence[Image.Image]) -> Path:
    """Frames called so that their order is not that of their letters."""
    path.mkdir()
    for i, picture in enumerate(pictures):
        picture.save(path / f"frame {i}.png")
    return path
