"""Clips cut without re-encoding, as `ffmpeg -ss T -i in.mp4 -t D -c copy` cuts them; their greys tell the original's time."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import av
from PIL import Image

from tests.support.tiny_media import film

RATE, COUNT = 10, 48
"""Frames per second, and of the original."""
_DARKEST, _STEP = 30, 4


@cache
def original(codec: str, gop: int, b_frames: int, is_open: bool) -> bytes:
    """An MP4 whose frame i is of one grey, a key frame every `gop`. `is_open`: frames before one refer to the group before it."""
    pictures = [Image.new("RGB", (64, 48), (_DARKEST + _STEP * i,) * 3) for i in range(COUNT)]
    settings = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes={b_frames}:b-adapt=0:open-gop={int(is_open)}:qp=4"
    settings += ":log-level=none" if codec == "libx265" else ""
    return film(pictures, codec=codec, rate=RATE, **{codec.removeprefix("lib") + "-params": settings, "g": str(gop)})


def told(level: float) -> int:
    """Number in the original of a frame of that grey, 0 to 255."""
    return round((level - _DARKEST) / _STEP)


def cut(data: bytes, start: Fraction, length: Fraction, form: str) -> tuple[bytes, list[int], list[int]]:
    """The clip; the original's frames whose packets it holds, in order of time; those of its key frames.

    It begins with the last key frame before `start`; MP4 and MOV tell by an edit list that what comes before `start` is not shown.
    """
    file = io.BytesIO()
    held, keys = [], []
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format=form) as target:
        packets = [packet for packet in source.demux(video=0) if packet.size]
        stream = target.add_stream_from_template(source.streams.video[0])
        times = [Fraction(packet.pts) * packet.time_base for packet in packets]  # type: ignore[arg-type]
        first = max(k for k, packet in enumerate(packets) if packet.is_keyframe and times[k] <= start)
        for packet, time in zip(packets[first:], times[first:]):
            shift = round(start / packet.time_base)  # type: ignore[operator]
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift  # type: ignore[operator]
            if packet.dts * packet.time_base >= length:  # type: ignore[operator]
                break
            held.append(round(time * RATE))
            keys += held[-1:] if packet.is_keyframe else []
            packet.stream = stream
            target.mux(packet)
    return file.getvalue(), sorted(held), keys


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        yield kind, start, start + size
        start += size


def find_box(data: bytes, *path: bytes) -> tuple[int, int]:
    """Where the first box of an MP4 with that path begins and ends."""
    start, end = -8, len(data)
    for name in path:
        start, end = next((a, b) for kind, a, b in _boxes(data, start + 8, end) if kind == name)
    return start, end


def with_matrix(data: bytes, matrix: Sequence[float]) -> bytes:
    """The MP4 with (a, b, c, d) in the display matrix of its first track."""
    a, b, c, d = (round(number * 65536) for number in matrix)
    at = find_box(data, b"moov", b"trak", b"tkhd")[1] - 8 - 36
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


def with_edits(data: bytes, edits: Sequence[tuple[float, float | None]]) -> bytes:
    """The MP4 of one track that shows these stretches of its media one after the other: (seconds, from where; None: nothing)."""
    scales = [struct.unpack_from(">I", data, find_box(data, *path)[0] + 20)[0] for path in _HEADERS]
    lines = [(round(seconds * scales[0]), -1 if at is None else round(at * scales[1]), 1, 0) for seconds, at in edits]
    content = struct.pack(">II", 0, len(lines)) + b"".join(struct.pack(">Iihh", *line) for line in lines)
    box = struct.pack(">I4sI4s", 16 + len(content), b"edts", 8 + len(content), b"elst") + content
    start, end = find_box(data, b"moov", b"trak", b"edts")
    made = bytearray(data[:start] + box + data[end:])
    for path in ((b"moov",), (b"moov", b"trak")):  # it stands behind the media, whose places stay
        at, stop = find_box(data, *path)
        made[at : at + 4] = struct.pack(">I", stop - at + len(box) - (end - start))
    return bytes(made)


_HEADERS: Any = ((b"moov", b"mvhd"), (b"moov", b"trak", b"mdia", b"mdhd"))
