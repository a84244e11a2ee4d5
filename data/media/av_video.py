"""The frames of a video file: when each is shown, from its packets alone, and the decoding of those that are wanted.

A clip that was cut without re-encoding (MP4 and MOV with an edit list) begins with packets that are to be decoded and not to be
shown. libav marks them and keeps their frames back; the key frame that the others need may be one of them.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from PIL import Image

from data.media.av_packets import Packet, frames_from, read_packets
from data.media.blob import MediaError
from data.media.display_matrix import transposition

_CUT_SECONDS = 1.0
"""All streams of a whole file end no earlier than this before the length that its header declares."""
_INDEXED = ("mov", "matroska")
"""Formats in which a jump ends at the key frame that was asked for. In others it is a search, and may end in the wrong place."""
_MAX_JUMPS = 3
"""Key frames that a jump is tried to, the nearest first, before a frame is looked for from the beginning."""


@dataclass(frozen=True)
class Timeline:
    """When each frame is shown, in seconds from the first, and where decoding may begin."""

    starts: list[float]
    end: float
    stamps: list[int] | None  # presentation time of each frame in the stream's units; None: they cannot be told apart by it
    places: list[int]  # where each frame's packet stands in the order of decoding; empty without stamps
    keys: dict[int, int]  # stamps, ascending, of frames that need no other, shown or not, and their places; empty without stamps
    begin: int  # where the stream begins, for seeking


def read_timeline(container: Any, stream: Any, name: str) -> Timeline:
    """By the times of all packets, so that a variable frame rate is no guess. Raises MediaError for a file that is cut off.

    AVI knows no presentation times: there frames come as they are decoded, at the times of the packets.
    """
    packets, last = read_packets(container, stream, name)
    _check_whole(container, packets, last, name)
    begin = _begin(container, packets)
    shown = [packet for packet in packets if not packet.is_discard]
    known = None
    if _goes_back(packets):
        come = (frame.pts for frame in frames_from(container, stream, begin) or ())
        times = list(accumulate((pts for pts in come if pts is not None), max))
    elif container.format.name == "avi":
        times = [packet.dts for packet in shown if packet.dts is not None]
    elif (known := _told_apart(container, stream, packets, begin)) is not None:
        times = [packet.pts for packet in known]
    else:
        times = [time for packet in shown if (time := packet.dts if packet.pts is None else packet.pts) is not None]
    if not times:
        raise MediaError(f"{name!r} holds {len(packets)} packets of video, and no frame that can be decoded and has a time")
    times = sorted(times)
    starts = [float((time - times[0]) * stream.time_base) for time in times]
    final = max(shown, key=lambda packet: packet.dts or 0 if packet.pts is None else packet.pts)
    stays = float(final.duration * stream.time_base) if final.duration else starts[-1] / max(1, len(starts) - 1)
    if known is None:
        return Timeline(starts, starts[-1] + stays, None, [], {}, begin)
    return Timeline(starts, starts[-1] + stays, times, [packet.place for packet in known], _keys(packets), begin)


def _begin(container: Any, packets: Sequence[Packet]) -> int:
    """A time from which a jump ends at the first packet. MP4 looks among shown frames only, unless the time is before all."""
    first = min((packet.dts for packet in packets if packet.dts is not None), default=0)
    return first - 1 if container.format.name.startswith("mov") else first


def _goes_back(packets: Sequence[Packet]) -> bool:
    """Whether an edit list shows several stretches: between frames that are shown, decoding begins anew with one that is not.

    Which frames come out at such a seam depends on the decoder, so all of them are decoded to know their times.
    """
    shown = [packet for packet in packets if not packet.is_discard]
    latest = max((packet.pts for packet in shown if packet.pts is not None), default=0)
    between = packets[shown[0].place : shown[-1].place]
    return any(packet.is_discard and packet.is_keyframe and packet.pts is not None and packet.pts < latest for packet in between)


def _check_whole(container: Any, packets: Sequence[Packet], last: float, name: str) -> None:
    declared = (container.duration or 0) / 1e6
    if not packets:
        raise MediaError(f"{name!r} holds no frame")
    if last < declared - _CUT_SECONDS:
        raise MediaError(f"{name!r} declares {declared:.2f} s and holds {last:.2f} s: it is cut off")
    if packets[-1].is_corrupt:
        raise MediaError(f"{name!r} ends within a frame, after {last:.2f} s: it is cut off")
    if all(packet.is_discard for packet in packets):
        raise MediaError(f"{name!r} holds {len(packets)} frames, and its edit list shows none of them")


def _told_apart(container: Any, stream: Any, packets: Sequence[Packet], begin: int) -> list[Packet] | None:
    """Packets whose frames are shown, by presentation time; None where that does not tell them apart.

    Frames that come before the first key frame, decoded or shown, refer to frames that may not be there. Whether the decoder
    gives them out is asked of it, from the beginning to the first frame after them: it leaves them out of an open group.
    """
    key = next((packet for packet in packets if packet.is_keyframe and packet.pts is not None), None)
    follower = next((packet.place for packet in packets if key and packet.pts is not None and packet.pts > key.pts), 0)
    shown = [packet for packet in packets if not packet.is_discard]
    # Matroska has no times before 0: such frames have none there, or that of the key frame.
    clipped = {p.place for p in shown if key and p.place < follower and p.pts in (None, key.pts) and p is not key}
    timed = sorted((p for p in shown if p.pts is not None and p.place not in clipped), key=lambda packet: packet.pts)
    if len(timed) + len(clipped) < len(shown) or len({packet.pts for packet in timed}) < len(timed):
        return None
    if key and timed and timed[0].pts >= key.pts and not clipped:
        return timed
    come: list[int] = []
    for frame in frames_from(container, stream, begin) or ():
        if frame.pts is not None:
            come.append(frame.pts)
            if key is None or frame.pts >= key.pts:
                break
    return [packet for packet in timed if come and (packet.pts in come or packet.pts > come[-1])]


def _keys(packets: Sequence[Packet]) -> dict[int, int]:
    """Only those with a time of their own: where an edit list goes back, what is not shown repeats times of what is."""
    counts = Counter(packet.pts for packet in packets)
    keys = [packet for packet in packets if packet.is_keyframe and packet.pts is not None and counts[packet.pts] == 1]
    return {packet.pts: packet.place for packet in sorted(keys, key=lambda packet: packet.pts)}


def decoded(container: Any, stream: Any, timeline: Timeline, wanted: Sequence[int], name: str) -> Iterator[Any]:
    """The frames whose numbers are `wanted`, ascending. Raises MediaError for one that does not decode.

    Between frames that lie far apart it jumps to the last key frame before the next one.
    """
    find = _counted if timeline.stamps is None else _stamped
    for number, frame in zip(wanted, find(container, stream, timeline, wanted)):
        if frame is None or frame.is_corrupt:
            raise MediaError(f"{name!r} has a frame at {timeline.starts[number]:.3f} s that cannot be decoded")
        yield frame


def _counted(container: Any, stream: Any, timeline: Timeline, wanted: Sequence[int]) -> Iterator[Any]:
    frames = enumerate(frames_from(container, stream, timeline.begin) or ())
    for number in wanted:
        yield next((frame for i, frame in frames if i == number), None)


def _stamped(container: Any, stream: Any, timeline: Timeline, wanted: Sequence[int]) -> Iterator[Any]:
    stamps, keys = timeline.stamps or [], list(timeline.keys)
    indexed = container.format.name.startswith(_INDEXED)
    frames, due = frames_from(container, stream, timeline.begin), 0  # number of the frame that comes next
    for number in wanted:
        nearest = keys[: bisect_right(keys, stamps[number])][-_MAX_JUMPS:][::-1] if indexed else []
        jumps = [key for key in nearest if key > stamps[due]]
        if jumps:
            tries = (frames_from(container, stream, key, _before(timeline, number)) for key in jumps)
            frames = next(filter(None, tries), None)
        frame = _at(frames, stamps[number])
        if frame is None:  # no jump ended where it should
            frames = frames_from(container, stream, timeline.begin)
            frame = _at(frames, stamps[number])
        due = min(number + 1, len(stamps) - 1)
        yield frame


def _before(timeline: Timeline, number: int) -> Callable[[Any], bool]:
    """Whether a packet of PyAV is a key frame from which frame `number` can be decoded: one before it in both orders."""
    stamp, place = (timeline.stamps or [])[number], timeline.places[number]
    return lambda first: first.pts is not None and first.pts <= stamp and timeline.keys.get(first.pts, place + 1) <= place


def _at(frames: Iterator[Any] | None, stamp: int) -> Any:
    """The frame of that time, or None if it does not come."""
    later = next((frame for frame in frames or () if frame.pts is not None and frame.pts >= stamp), None)
    return later if later is not None and later.pts == stamp else None


def upright(frame: Any, name: str = "the video") -> Image.Image:
    """The frame in RGB, turned and mirrored as its file says. Raises MediaError for a turn that is no whole number of quarters."""
    picture: Image.Image = frame.to_image()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    move = transposition(struct.unpack("=9i", bytes(matrix)), name) if matrix is not None else None
    return picture if move is None else picture.transpose(move)
