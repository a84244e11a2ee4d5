"""Truncation checks for picture files by their markers, without decoding: Pillow's `verify()` accepts a JPEG that was cut in half.

Each function named after a format returns what is missing, or None. Bytes after the end (padding, a film in a phone's photo) are no
fault.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

_TAIL = 1 << 12
_JPEG_SCAN, _JPEG_END = 0xDA, b"\xff\xd9"
_JPEG_ALONE = (0x00, 0x01, *range(0xD0, 0xDA))
"""Markers without a length: a stuffed byte, TEM, RST0 to RST7, SOI, EOI."""


def missing_of_jpeg(stream: BinaryIO, num_bytes: int) -> str | None:
    """Look for the end marker after the start of the first scan.

    Pixels cannot be mistaken for it: in them 0xFF is followed by 0x00.
    """
    start = _jpeg_scan(stream)
    if start is None:
        return "it ends before its first scan"
    # Search the tail first, where the end marker should be, and all bytes only if something follows it.
    for begin in (max(start, num_bytes - _TAIL), start):
        stream.seek(begin)
        if _JPEG_END in stream.read():
            return None
    return "its end-of-image marker is missing"


def _jpeg_scan(stream: BinaryIO) -> int | None:
    """Return the position of the first scan, or None.

    Segments before it are skipped: a thumbnail in one has an end marker of its own.
    """
    stream.seek(2)
    while len(head := stream.read(2)) == 2:
        if head[0] != 0xFF or head[1] == 0xFF:  # junk or a fill byte: the marker may begin one byte on
            stream.seek(-1, 1)
        elif head[1] == _JPEG_SCAN:
            return stream.tell()
        elif head[1] not in _JPEG_ALONE:
            stream.seek(max(int.from_bytes(stream.read(2), "big") - 2, 0), 1)
    return None


def png(stream: BinaryIO, num_bytes: int) -> str | None:
    kind, end = b"", 0
    for kind, end in png_chunks(stream):
        if end > num_bytes:
            return f"its chunk {kind!r} ends at byte {end} of {num_bytes}"
    return None if kind == b"IEND" else "its IEND chunk is missing"


def png_chunks(stream: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield the kind of each chunk and the position after it, up to IEND or the end of the file."""
    position, kind = 8, b""
    while kind != b"IEND":
        stream.seek(position)
        head = stream.read(8)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head)
        position += 12 + length  # length, kind, data, checksum
        yield kind, position


def gif(stream: BinaryIO, num_bytes: int) -> str | None:
    """Walk from block to block to the trailer, since any byte of a frame may look like it.

    Bytes that begin no block are skipped, as in Pillow.
    """
    stream.seek(0)
    data = stream.read()
    position = 13 + _gif_colours(data[10:11])
    while position < num_bytes:
        block = data[position]
        if block == 0x3B:
            return None
        if block == 0x2C:  # a frame: nine bytes, its colours, one byte, its data
            position += 11 + _gif_colours(data[position + 9 : position + 10])
        elif block == 0x21:
            position += 2
        else:
            position += 1
            continue
        while position < num_bytes and data[position]:
            position += 1 + data[position]
        position += 1
    return "its trailer is missing"


def _gif_colours(flags: bytes) -> int:
    """Return the bytes of the colour table that `flags` announce."""
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0


def webp(stream: BinaryIO, num_bytes: int) -> str | None:
    stream.seek(4)
    end = struct.unpack("<I", stream.read(4))[0] + 8
    return f"it should have {end} bytes and has {num_bytes}" if end > num_bytes else None


MISSING = {"JPEG": missing_of_jpeg, "MPO": missing_of_jpeg, "PNG": png, "GIF": gif, "WEBP": webp}
"""Truncation check by Pillow's name of the format; MPO is a JPEG with further pictures behind it. A BMP is only decoded.

A GIF may be a film: Pillow takes one that is cut between two frames for a shorter film.
"""
