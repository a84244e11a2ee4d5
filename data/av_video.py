"""The frames of a video file: when each is shown, from its packets alone, and the decoding of those that are wanted."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from data.blob import MediaError

MAX_FRAMES = 2_000_000
"""Of a film: nine hours of sixty frames a second."""
_CUT_SECONDS = 1.0
"""All streams of a whole file end no earlier than this before the length that its header declares."""
_INDEXED = ("mov", "matroska")
"""Formats in which a jump ends at the key frame that was asked for. In others it is a search, and may end in the wrong place."""
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
"""By degrees counterclockwise."""


@dataclass(frozen=True)
class Timeline:
    """When each frame is shown, in seconds from the first, and where decoding may begin."""

    starts: list[float]
    end: float
    stamps: list[int] | None  # presentation time of each frame in the stream's units; None: they cannot be told apart by it
    keys: list[int]  # those of the frames that need no other, ascending
    begin: int  # where the stream begins, for seeking


def read_timeline(container: Any, stream: Any, name: str) -> Timeline:
    """By the times of all packets, so that a variable frame rate is no guess. Raises MediaError for a file that is cut off.

    AVI knows no presentation times: there frames come as they are decoded, at the times of the packets.
    """
    packets, last = _packets(container, stream, name)
    declared = (container.duration or 0) / 1e6
    if not packets:
        raise MediaError(f"{name!r} holds no frame")
    if last < declared - _CUT_SECONDS:
        raise MediaError(f"{name!r} declares {declared:.2f} s and holds {last:.2f} s: it is cut off")
    if packets[-1].is_corrupt:
        raise MediaError(f"{name!r} ends within a frame, after {last:.2f} s: it is cut off")
    shown = [packet for packet in packets if not packet.is_discard]
    by_stamp = container.format.name != "avi" and len({packet.pts for packet in shown} - {None}) == len(shown)
    keys = sorted(packet.pts for packet in shown if packet.is_keyframe) if by_stamp else []
    # What is shown before the first key frame refers to frames that are not there.
    times = (
        sorted(packet.pts for packet in shown if packet.pts >= keys[0])
        if keys
        else sorted(p.dts for p in shown if p.dts is not None)
    )
    if not times:
        raise MediaError(f"{name!r} holds {len(packets)} packets of video and no time of any")
    starts = [float((time - times[0]) * stream.time_base) for time in times]
    final = max(shown, key=lambda packet: packet.pts if keys else packet.dts or 0)
    stays = float(final.duration * stream.time_base) if final.duration else starts[-1] / max(1, len(starts) - 1)
    begin = min((packet.dts for packet in packets if packet.dts is not None), default=times[0])
    return Timeline(starts, starts[-1] + stays, times if keys else None, keys, begin)


@dataclass(frozen=True)
class _Packet:
    """What is asked of a packet; the packet itself would keep its bytes in memory, and all of them are the file."""

    pts: Any  # int, or None: without a time
    dts: Any
    duration: int
    is_keyframe: bool
    is_discard: bool
    is_corrupt: bool


def _packets(container: Any, stream: Any, name: str) -> tuple[list[_Packet], float]:
    """Those of `stream` in the order of decoding, and the second at which the last packet of any stream ends."""
    packets: list[_Packet] = []
    last = 0.0
    for packet in container.demux():
        time = packet.pts if packet.pts is not None else packet.dts
        if not packet.size:  # the end of a stream
            continue
        if time is not None:
            last = max(last, float((time + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == stream.index:
            flags = bool(packet.is_keyframe), bool(packet.is_discard), bool(packet.is_corrupt)
            packets.append(_Packet(packet.pts, packet.dts, packet.duration or 0, *flags))
            if len(packets) > MAX_FRAMES:
                raise MediaError(f"{name!r} has more than {MAX_FRAMES} frames; cut it into shorter films")
    return packets, last


def decoded(container: Any, stream: Any, timeline: Timeline, wanted: Sequence[int], name: str) -> Iterator[Any]:
    """The frames whose numbers are `wanted`, ascending. Raises MediaError for one that does not decode.

    Between frames that lie far apart it jumps to the last key frame before the next one.
    """
    found = (
        _counted(container, stream, timeline, wanted) if timeline.stamps is None else _stamped(container, stream, timeline, wanted)
    )
    for number, frame in zip(wanted, found):
        if frame is None or frame.is_corrupt:
            raise MediaError(f"{name!r} has a frame at {timeline.starts[number]:.3f} s that cannot be decoded")
        yield frame


def _counted(container: Any, stream: Any, timeline: Timeline, wanted: Sequence[int]) -> Iterator[Any]:
    frames = enumerate(_from(container, stream, timeline.begin))
    for number in wanted:
        yield next((frame for i, frame in frames if i == number), None)


def _stamped(container: Any, stream: Any, timeline: Timeline, wanted: Sequence[int]) -> Iterator[Any]:
    stamps, keys = timeline.stamps or [], timeline.keys
    frames, due = _from(container, stream, timeline.begin), 0  # number of the frame that comes next
    for number in wanted:
        stamp = stamps[number]
        key = keys[bisect_right(keys, stamp) - 1]
        if key > stamps[due] and container.format.name.startswith(_INDEXED):
            frames = _from(container, stream, key)
        frame = _at(frames, stamp)
        if frame is None:  # the jump went too far
            frames = _from(container, stream, timeline.begin)
            frame = _at(frames, stamp)
        due = min(number + 1, len(stamps) - 1)
        yield frame


def _from(container: Any, stream: Any, time: int) -> Iterator[Any]:
    container.seek(time, stream=stream, backward=True)
    return container.decode(stream)


def _at(frames: Iterator[Any], stamp: int) -> Any:
    """The frame of that time, or None if it does not come."""
    later = next((frame for frame in frames if frame.pts is not None and frame.pts >= stamp), None)
    return later if later is not None and later.pts == stamp else None


def upright(frame: Any) -> Image.Image:
    """The frame in RGB, turned as the file says it should be shown."""
    picture: Image.Image = frame.to_image()
    return picture.transpose(_TURNS[frame.rotation % 360]) if frame.rotation % 360 in _TURNS else picture
