"""WAV files of plain samples: integers of 8, 16, 24 and 32 bits, floats of 32 and 64 bits.

The chunks are read here and not by the standard library's `wave`, which supports neither floats nor, before Python 3.12, the
extensible header, and trusts any length that a header declares.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from data.media.blob import MediaError

_WHOLE, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_BITS = {_WHOLE: (8, 16, 24, 32), _FLOAT: (32, 64)}
_NO_SIZE = 0xFFFFFFFF
_UNKNOWN_SIZES = (0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, _NO_SIZE, 0x7FFFFFFF - 36, _NO_SIZE - 36, 2**64 - 1)
"""Sizes that mean "unknown" in files written into a pipe by speech services, sox, arecord and ffmpeg."""
MAX_CHUNKS = 1000
"""Most chunks before the samples; real files have fewer than ten."""


@dataclass(frozen=True)
class WavHeader:
    rate: int  # samples per second
    num_channels: int
    is_float: bool
    bits: int  # of one sample of one channel
    num_samples: int  # per channel
    start: int  # first byte of the samples in the file
    is_open: bool = False  # the header does not give the size of the samples: they extend to the end of the file


def read_wav_header(stream: BinaryIO, name: str, num_bytes: int) -> WavHeader | None:
    """Locate the samples of a file of `num_bytes`; None if it is no WAV file of plain samples.

    Files written into a pipe do not know their size; their samples extend to the end. RF64 and BW64 hold a size of 64 bits. Raises
    MediaError unless every sample that the header declares is there.
    """
    head = stream.read(12)
    if len(head) < 12 or head[:4] not in (b"RIFF", b"RF64", b"BW64") or head[8:] != b"WAVE":
        return None
    form, long_size = None, None
    for _ in range(MAX_CHUNKS):
        chunk = stream.read(8)
        if len(chunk) < 8:
            break
        kind, size = chunk[:4], struct.unpack("<I", chunk[4:])[0]
        at = stream.tell()
        if kind == b"data" and form is not None:
            size = long_size if long_size is not None and size == _NO_SIZE else size
            return _header(form, name, at, size, num_bytes, _is_open(stream, at, size, num_bytes))
        if kind == b"ds64" and size >= 16:
            long_size = struct.unpack("<8xQ", stream.read(16))[0]
        if kind == b"fmt ":
            form = stream.read(min(size, 40))
        stream.seek(at + size + size % 2)
    raise MediaError(f"{name!r} is a WAV file without samples: it has no {'data' if form else 'fmt'} chunk")


def _is_open(stream: BinaryIO, start: int, size: int, num_bytes: int) -> bool:
    """Return whether the samples at `start` extend to the end of the file because their `size` was unknown when it was written."""
    if size != 0:
        return size in _UNKNOWN_SIZES and start + size > num_bytes
    at = start
    for _ in range(MAX_CHUNKS):
        stream.seek(at)
        chunk = stream.read(8)
        if len(chunk) < 8 or not chunk[:4].strip().isalnum():
            break
        at += 8 + (length := struct.unpack("<I", chunk[4:])[0]) + length % 2
    return at < num_bytes or at > num_bytes + 1  # if chunks end exactly with the file, there are no samples


def _header(form: bytes, name: str, start: int, size: int, num_bytes: int, is_open: bool) -> WavHeader | None:
    if len(form) < 16:
        raise MediaError(f"{name!r} has a fmt chunk of {len(form)} bytes; 16 are the least")
    tag, num_channels, rate, _, align, bits = struct.unpack("<HHIIHH", form[:16])
    if tag == _EXTENSIBLE and len(form) >= 26:
        tag = struct.unpack("<H", form[24:26])[0]
    if tag == _FLOAT and bits not in _BITS[_FLOAT]:
        readable = "whole numbers of 8, 16, 24 and 32 bits, floats of 32 and 64"
        raise MediaError(f"{name!r} is a WAV file of {bits}-bit floats; what is read: {readable}")
    if bits not in _BITS.get(tag, ()):
        return None
    if num_channels < 1 or align != num_channels * bits // 8:
        raise MediaError(f"{name!r} declares {num_channels} channels of {bits} bits in {align} bytes, which do not agree")
    if is_open:
        size = (num_bytes - start) // align * align
    if start + size > num_bytes:
        held = num_bytes - start
        raise MediaError(f"{name!r} declares {size} bytes of samples and holds {held}: it is cut off")
    if size % align:
        raise MediaError(f"{name!r} holds {size} bytes of samples, no whole number of {align}: it is cut off")
    return WavHeader(rate, num_channels, tag == _FLOAT, bits, size // align, start, is_open)


def read_wav_samples(stream: BinaryIO, header: WavHeader) -> np.ndarray:
    """Read the samples as (n, channels) float32; integers are scaled to [-1, 1)."""
    stream.seek(header.start)
    raw = stream.read(header.num_samples * header.num_channels * header.bits // 8)
    return _numbers(raw, header).reshape(-1, header.num_channels)


def _numbers(raw: bytes, header: WavHeader) -> np.ndarray:
    if header.bits == 24:
        wide = np.zeros((len(raw) // 3, 4), dtype=np.uint8)
        wide[:, 1:] = np.frombuffer(raw, dtype=np.uint8).reshape(-1, 3)
        return full_scale(wide.view("<i4")[:, 0])
    kind = "f" if header.is_float else "u" if header.bits == 8 else "i"
    return full_scale(np.frombuffer(raw, dtype=f"<{kind}{header.bits // 8}"))


def full_scale(samples: np.ndarray) -> np.ndarray:
    """Convert samples of any type to float32, whole numbers to [-1, 1); bytes have no sign, and their silence is 128."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    return samples.astype(np.float32) / 2 ** (8 * samples.dtype.itemsize - 1)
