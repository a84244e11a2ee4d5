"""The packets of a video stream: the facts that each packet states about its frame, and decoding from a given time on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from data.media.blob import MediaError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet as AvPacket
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MAX_FRAMES = 2_000_000
"""Most frames of a video: nine hours at sixty frames a second."""


@dataclass(frozen=True, slots=True)
class Packet:
    """Facts of one packet. The PyAV packet itself is not kept: it holds its bytes, and those of all packets are the whole file."""

    place: int  # in the order of decoding
    pts: Any  # int, or None: without a time
    dts: Any
    duration: int
    is_keyframe: bool
    is_discard: bool  # to be decoded but not shown: an edit list leaves it out
    is_corrupt: bool


def read_packets(container: InputContainer, stream: VideoStream, name: str) -> tuple[list[Packet], float]:
    """Return the packets of `stream` in decoding order, and the second at which the last packet of any stream ends.

    Raises MediaError for more than MAX_FRAMES packets.
    """
    packets: list[Packet] = []
    last = 0.0
    for packet in container.demux():
        time = packet.pts if packet.pts is not None else packet.dts
        if not packet.size:  # the end of a stream
            continue
        if time is not None:
            last = max(last, float((time + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == stream.index:
            flags = bool(packet.is_keyframe), bool(packet.is_discard), bool(packet.is_corrupt)
            packets.append(Packet(len(packets), packet.pts, packet.dts, packet.duration or 0, *flags))
            if len(packets) > MAX_FRAMES:
                raise MediaError(f"{name!r} has more than {MAX_FRAMES} frames; cut it into shorter films")
    return packets, last


def frames_from(
    container: InputContainer, stream: VideoStream, time: int, is_safe: Callable[[AvPacket], bool] = lambda first: True
) -> Iterator[VideoFrame] | None:
    """Return the decoded frames from the key frame before `time` on.

    Returns None if there is no packet, or if `is_safe` rejects the first PyAV packet there.
    """
    container.seek(time, stream=stream, backward=True)
    packets = container.demux(stream)
    first = next(packets, None)
    return _decoded(chain([first], packets)) if first is not None and is_safe(first) else None


def _decoded(packets: Iterator[AvPacket]) -> Iterator[VideoFrame]:
    """Decode `packets` into frames.

    Frames before the first key frame of a cut file may refer to missing ones: if they fail to decode, they are skipped.
    """
    from av.error import InvalidDataError

    begun = False
    for packet in packets:
        begun = begun or packet.is_keyframe
        try:
            frames = packet.decode()
        except InvalidDataError:
            if begun:
                raise
            continue
        yield from frames
