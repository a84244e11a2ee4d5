"""Common media formats that this project does not read, recognised by their first bytes so that an error can name them."""

from __future__ import annotations

import re
import tomllib
from importlib.resources import files

HEAD = 16
"""Bytes that are needed to recognise a format."""
READ = {
    "audio": "WAV, W64, FLAC, MP3, AAC, Ogg, AIFF, CAF, AU, AMR, WavPack, WMA, and the sound of MP4, MOV, MKV and the like",
    "video": "MP4, MOV, MKV, WEBM, AVI, FLV, TS, MPG, WMV, Ogg, GIF, WEBP, or a folder of pictures",
}
"""Readable formats by kind, for messages."""
_FORMATS = tomllib.loads(files(__package__).joinpath("foreign_formats.toml").read_text(encoding="utf-8"))
_PATTERNS = {name: re.compile(pattern.encode(), re.DOTALL) for name, pattern in _FORMATS.items()}


def foreign_format(head: bytes) -> str | None:
    """Return the name of the unsupported format that a file beginning with `head` has; None if it is none of these."""
    return next((name for name, pattern in _PATTERNS.items() if pattern.match(head)), None)
