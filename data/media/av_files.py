"""Media containers that only PyAV reads (extra `media`), and their sound; files that a container refers to are never opened.

A playlist can name other files and hosts, and libav would open them. So only formats that hold their own bytes are allowed, and
they are read from an open file, never by a name. Decoders run in one thread: there are many workers already, and a single thread
keeps the order of frames fixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.media.blob import Blob, MediaError
from data.media.foreign_formats import HEAD, READ, foreign_format
from data.media.wav import full_scale

FORMATS = (
    *("mov", "matroska", "avi", "flv", "mpegts", "mpeg", "asf", "ogg"),
    *("wav", "w64", "mp3", "flac", "aac", "aiff", "caf", "au", "amr", "wv"),
)
"""Names of the libav demuxers that may open a file."""


@contextmanager
def open_stream(blob: Blob, kind: str) -> Iterator[tuple[Any, Any]]:
    """Open the container and its first stream of `kind`: "video" (no cover picture) or "audio".

    Raises MediaError for any failure inside the context.
    """
    with blob.open() as file:
        foreign = foreign_format(file.read(HEAD))
    if foreign is not None:
        raise MediaError(f"{blob.name!r} cannot be decoded: it is {foreign}. What is read: {READ[kind]}")
    try:
        import av
    except ImportError as error:
        raise MediaError(f"{blob.name!r} needs PyAV to be read: pip install -e '.[media]'") from error
    known = False  # becomes True once libav has opened the container
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
    try:
        with blob.open() as file, av.open(file, options=options, metadata_errors="replace") as container:
            known = True
            yield container, _stream(container, kind, blob.name)
    except MediaError:
        raise
    # PyAV raises what broken bytes lead it to: its own errors, ValueError, EOFError, UnicodeDecodeError ...
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        advice = "" if known else f"; it is broken, or none of what is read: {READ[kind]}"
        raise MediaError(f"{blob.name!r} cannot be decoded: {reason}{advice}") from error


def _stream(container: Any, kind: str, name: str) -> Any:
    from av.stream import Disposition

    streams = [s for s in container.streams if s.type == kind and not s.disposition & Disposition.attached_pic]
    if streams and streams[0].codec_context is None:
        raise MediaError(f"{name!r} holds {kind} in a coding that libav does not decode; what is read: {READ[kind]}")
    if not streams:
        held = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
        raise MediaError(f"{name!r} holds no {kind} that can be decoded; it holds {held}")
    streams[0].codec_context.thread_count = 1
    streams[0].codec_context.thread_type = "NONE"
    return streams[0]


@dataclass(frozen=True)
class SoundFacts:
    """Facts that the header of a container declares about its sound."""

    rate: int  # samples per second
    num_channels: int
    seconds: float  # often estimated; 0 if unknown


def sound_facts(stream: Any) -> SoundFacts:
    seconds = float(stream.duration * stream.time_base) if stream.duration else 0.0
    return SoundFacts(stream.codec_context.sample_rate or 0, stream.codec_context.channels, seconds)


def sound_blocks(container: Any, stream: Any, name: str) -> Iterator[np.ndarray]:
    """Decode the stream in blocks (n, channels) of float32; integers are scaled to [-1, 1). Raises MediaError."""
    rate = stream.codec_context.sample_rate
    for frame in container.decode(stream):
        if frame.sample_rate != rate:
            raise MediaError(f"{name!r} changes its sampling rate from {rate} to {frame.sample_rate} on the way")
        block = frame.to_ndarray()
        yield full_scale(block.T if frame.format.is_planar else block.reshape(-1, frame.layout.nb_channels))
