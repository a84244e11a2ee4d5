"""Common media formats that this project does not read, recognised by their first bytes so that an error can name them."""

from __future__ import annotations

import re

HEAD = 16
"""Bytes that are needed to recognise a format."""
READ = {
    "audio": "WAV, W64, FLAC, MP3, AAC, Ogg, AIFF, CAF, AU, AMR, WavPack, WMA, and the sound of MP4, MOV, MKV and the like",
    "video": "MP4, MOV, MKV, WEBM, AVI, FLV, TS, MPG, WMV, Ogg, GIF, WEBP, or a folder of pictures",
}
"""Readable formats by kind, for messages."""
_START = rb"\x00?\x00\x00\x01"  # start code of a unit of a raw stream
_FORMATS = {
    "a NIST SPHERE file (TIMIT and others name theirs .wav)": rb"NIST_1A",
    "a raw AC-3 stream": rb"\x0bw",
    "a raw DTS stream": rb"\x7f\xfe\x80\x01",
    "a raw H.264 stream": _START + rb"[\x06\x09\x27\x47\x67][^\x01]",
    "a raw H.265 stream": _START + rb"[\x40\x42\x44\x46\x4e]\x01",
    "a raw MPEG-2 video stream": _START + rb"\xb3",
    "a raw MPEG-4 video stream": _START + rb"[\xb0\xb5]",
    "a raw IVF stream": rb"DKIF",
    "a Y4M stream": rb"YUV4MPEG2",
    "a RealMedia file": rb"\.RMF",
    "an MXF file": rb"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02",
    "a Monkey's Audio file": rb"MAC ",
    "a True Audio file": rb"TTA1",
    "a DSF file": rb"DSD ",
    "a MIDI file, which holds notes and no sound": rb"MThd",
    "a PNG picture": rb"\x89PNG",
    "a JPEG picture": rb"\xff\xd8\xff",
    "a PDF file": rb"%PDF",
    "a ZIP archive": rb"PK\x03\x04",
    "a gzip archive": rb"\x1f\x8b\x08",
    "a web page": rb"(?i)\s*<(!doctype html|html)",
    "a playlist": rb"#EXTM3U|ffconcat",
    "a pointer of Git LFS; fetch the file itself": rb"version https://",
}


def foreign_format(head: bytes) -> str | None:
    """Return the name of the unsupported format that a file beginning with `head` has; None if it is none of these."""
    return next((name for name, pattern in _FORMATS.items() if re.match(pattern, head, re.DOTALL)), None)
