"""WAV files of plain samples: 8, 16, 24 and 32 bit whole numbers, 32 and 64 bit floats.

The chunks are read here and not by the standard library's `wave`, which knows neither floats nor, before Python 3.12, the
extensible header, and believes any length that a header declares.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from data.blob import MediaError

_WHOLE, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_BITS = {_WHOLE: (8, 16, 24, 32), _FLOAT: (32, 64)}
MAX_CHUNKS = 1000
"""Chunks that may stand before the samples; real files have fewer than ten."""


@dataclass(frozen=True)
class WavHeader:
    rate: int  # samples per second
    num_channels: int
    is_float: bool
    bits: int  # of one sample of one channel
    num_samples: int  # of each channel
    start: int  # of the samples, in bytes from the start of the file


def read_header(stream: BinaryIO, name: str, num_bytes: int) -> WavHeader | None:
    """Where the samples of a file of `num_bytes` stand, or None if it is no WAV file of plain samples.

    Raises MediaError unless every sample that the header declares is there.
    """
    head = stream.read(12)
    if len(head) < 12 or head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return None
    form: bytes | None = None
    for _ in range(MAX_CHUNKS):
        chunk = stream.read(8)
        if len(chunk) < 8:
            break
        kind, size = chunk[:4], struct.unpack("<I", chunk[4:])[0]
        at = stream.tell()
        if kind == b"data" and form is not None:
            return _header(form, name, at, size, num_bytes)
        if kind == b"fmt ":
            form = stream.read(min(size, 40))
        stream.seek(at + size + size % 2)
    raise MediaError(f"{name!r} is a WAV file without samples: it has no {'data' if form else 'fmt'} chunk")


def _header(form: bytes, name: str, start: int, size: int, num_bytes: int) -> WavHeader | None:
    if len(form) < 16:
        raise MediaError(f"{name!r} has a fmt chunk of {len(form)} bytes; 16 are the least")
    tag, num_channels, rate, _, align, bits = struct.unpack("<HHIIHH", form[:16])
    if tag == _EXTENSIBLE and len(form) >= 26:
        tag = struct.unpack("<H", form[24:26])[0]
    if bits not in _BITS.get(tag, ()):
        return None
    if num_channels < 1 or align != num_channels * bits // 8:
        raise MediaError(f"{name!r} declares {num_channels} channels of {bits} bits in {align} bytes, which do not agree")
    if start + size > num_bytes:
        held = num_bytes - start
        raise MediaError(f"{name!r} declares {size} bytes of samples and holds {held}: it is cut off, or was written as a stream")
    if size % align:
        raise MediaError(f"{name!r} holds {size} bytes of samples, no whole number of {align}: it is cut off")
    return WavHeader(rate, num_channels, tag == _FLOAT, bits, size // align, start)


def read_samples(stream: BinaryIO, header: WavHeader) -> np.ndarray:
    """(n, channels) float32; whole numbers are scaled to [-1, 1)."""
    stream.seek(header.start)
    raw = stream.read(header.num_samples * header.num_channels * header.bits // 8)
    return _numbers(raw, header).reshape(-1, header.num_channels)


def _numbers(raw: bytes, header: WavHeader) -> np.ndarray:
    if header.is_float:
        return np.frombuffer(raw, dtype=f"<f{header.bits // 8}").astype(np.float32)
    if header.bits == 8:
        return (np.frombuffer(raw, dtype=np.uint8).astype(np.float32) - 128) / 128
    if header.bits == 24:
        wide = np.zeros((len(raw) // 3, 4), dtype=np.uint8)
        wide[:, 1:] = np.frombuffer(raw, dtype=np.uint8).reshape(-1, 3)
        return wide.view("<i4")[:, 0].astype(np.float32) / 2**31
    return np.frombuffer(raw, dtype=f"<i{header.bits // 8}").astype(np.float32) / 2 ** (header.bits - 1)
