"""The frames of a video file: presentation times from the packets alone, and decoding of selected frames.

A clip that was cut without re-encoding (MP4 and MOV with an edit list) begins with packets that must be decoded but not shown.
libav marks these packets and does not return their frames; one of them may be the key frame that the other frames need.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, SupportsBytes, cast

from PIL import Image

from data.media.av_packets import Packet, frames_from, read_packets
from data.media.blob import MediaError
from data.media.display_matrix import transposition

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet as AvPacket
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

_CUT_SECONDS = 1.0
"""Tolerance: all streams of a whole file end no earlier than this before the length that its header declares."""
_INDEXED = ("mov", "matroska")
"""Formats in which a seek ends at the requested key frame. In others a seek is a search and may end at the wrong place."""
_MAX_JUMPS = 3
"""Key frames that are tried as seek targets, nearest first, before decoding from the beginning."""


@dataclass(frozen=True)
class Timeline:
    """The time at which each frame is shown, in seconds from the first, and the places where decoding may begin."""

    starts: list[float]
    end: float
    stamps: list[int] | None  # presentation time of each frame in the stream's units; None: the times do not distinguish the frames
    places: list[int]  # position of each frame's packet in decoding order; empty without stamps
    keys: dict[int, int]  # stamps, ascending, of key frames, shown or not, to their places; empty without stamps
    begin: int  # where the stream begins, for seeking


def read_timeline(container: InputContainer, stream: VideoStream, name: str) -> Timeline:
    """Build the timeline from the times of all packets, so that a variable frame rate is exact.

    Raises MediaError for a file that is cut off.

    AVI has no presentation times: its frames are shown in decoding order, at the times of the packets.
    """
    packets, last = read_packets(container, stream, name)
    _check_whole(container, packets, last, name)
    begin = _begin(container, packets)
    shown = [packet for packet in packets if not packet.is_discard]
    known = None
    if _goes_back(packets):
        decoded_times = (frame.pts for frame in frames_from(container, stream, begin) or ())
        times = list(accumulate((pts for pts in decoded_times if pts is not None), max))
    elif container.format.name == "avi":
        times = [packet.dts for packet in shown if packet.dts is not None]
    elif (known := _ordered_by_time(container, stream, packets, begin)) is not None:
        times = [packet.pts for packet in known]
    else:
        times = [time for packet in shown if (time := packet.dts if packet.pts is None else packet.pts) is not None]
    if not times:
        raise MediaError(f"{name!r} holds {len(packets)} packets of video, and no frame that can be decoded and has a time")
    if (unit := stream.time_base) is None:
        raise MediaError(f"{name!r} does not say in what unit its times are")
    times = sorted(times)
    starts = [float((time - times[0]) * unit) for time in times]
    final = max(shown, key=lambda packet: packet.dts or 0 if packet.pts is None else packet.pts)
    final_duration = float(final.duration * unit) if final.duration else starts[-1] / max(1, len(starts) - 1)
    if known is None:
        return Timeline(starts, starts[-1] + final_duration, None, [], {}, begin)
    return Timeline(starts, starts[-1] + final_duration, times, [packet.place for packet in known], _keys(packets), begin)


def _begin(container: InputContainer, packets: Sequence[Packet]) -> int:
    """Return a time from which a seek ends at the first packet.

    MP4 seeks among shown frames only, unless the time is before all frames.
    """
    first = min((packet.dts for packet in packets if packet.dts is not None), default=0)
    return first - 1 if container.format.name.startswith("mov") else first


def _goes_back(packets: Sequence[Packet]) -> bool:
    """Return whether an edit list shows several stretches: between shown frames, decoding restarts at a frame that is not shown.

    Which frames come out at such a seam depends on the decoder, so all frames are decoded to know their times.
    """
    shown = [packet for packet in packets if not packet.is_discard]
    latest = max((packet.pts for packet in shown if packet.pts is not None), default=0)
    between = packets[shown[0].place : shown[-1].place]
    return any(packet.is_discard and packet.is_keyframe and packet.pts is not None and packet.pts < latest for packet in between)


def _check_whole(container: InputContainer, packets: Sequence[Packet], last: float, name: str) -> None:
    declared = (container.duration or 0) / 1e6
    if not packets:
        raise MediaError(f"{name!r} holds no frame")
    if last < declared - _CUT_SECONDS:
        raise MediaError(f"{name!r} declares {declared:.2f} s and holds {last:.2f} s: it is cut off")
    if packets[-1].is_corrupt:
        raise MediaError(f"{name!r} ends within a frame, after {last:.2f} s: it is cut off")
    if all(packet.is_discard for packet in packets):
        raise MediaError(f"{name!r} holds {len(packets)} frames, and its edit list shows none of them")


def _ordered_by_time(container: InputContainer, stream: VideoStream, packets: Sequence[Packet], begin: int) -> list[Packet] | None:
    """Return the packets whose frames are shown, by presentation time; None where the times do not distinguish the frames.

    Frames before the first key frame, in decoding or presentation order, refer to frames that may be missing. Whether the decoder
    returns them is found by decoding from the beginning to the first frame after them: it drops them in an open group of pictures.
    """
    key = next((packet for packet in packets if packet.is_keyframe and packet.pts is not None), None)
    follower = next((packet.place for packet in packets if key and packet.pts is not None and packet.pts > key.pts), 0)
    shown = [packet for packet in packets if not packet.is_discard]
    # Matroska has no times before 0: such frames have no time there, or the time of the key frame.
    clipped = {p.place for p in shown if key and p.place < follower and p.pts in (None, key.pts) and p is not key}
    timed = sorted((p for p in shown if p.pts is not None and p.place not in clipped), key=lambda packet: packet.pts)
    if len(timed) + len(clipped) < len(shown) or len({packet.pts for packet in timed}) < len(timed):
        return None
    if key and timed and timed[0].pts >= key.pts and not clipped:
        return timed
    decoded_times: list[int] = []
    for frame in frames_from(container, stream, begin) or ():
        if frame.pts is not None:
            decoded_times.append(frame.pts)
            if key is None or frame.pts >= key.pts:
                break
    return [packet for packet in timed if decoded_times and (packet.pts in decoded_times or packet.pts > decoded_times[-1])]


def _keys(packets: Sequence[Packet]) -> dict[int, int]:
    """Return the stamps of key frames, ascending, and their places in decoding order.

    Only times that occur once count: where an edit list goes back, frames that are not shown repeat the times of shown ones.
    """
    counts = Counter(packet.pts for packet in packets)
    keys = [packet for packet in packets if packet.is_keyframe and packet.pts is not None and counts[packet.pts] == 1]
    return {packet.pts: packet.place for packet in sorted(keys, key=lambda packet: packet.pts)}


def decode_frames(
    container: InputContainer, stream: VideoStream, timeline: Timeline, wanted: Sequence[int], name: str
) -> Iterator[VideoFrame]:
    """Yield the frames whose numbers are `wanted`, ascending. Raises MediaError for a frame that does not decode.

    Between frames that lie far apart the decoder seeks to the last key frame before the next one.
    """
    find = _frames_by_number if timeline.stamps is None else _frames_by_time
    for number, frame in zip(wanted, find(container, stream, timeline, wanted)):
        if frame is None or frame.is_corrupt:
            raise MediaError(f"{name!r} has a frame at {timeline.starts[number]:.3f} s that cannot be decoded")
        yield frame


def _frames_by_number(
    container: InputContainer, stream: VideoStream, timeline: Timeline, wanted: Sequence[int]
) -> Iterator[VideoFrame | None]:
    frames = enumerate(frames_from(container, stream, timeline.begin) or ())
    for number in wanted:
        yield next((frame for i, frame in frames if i == number), None)


def _frames_by_time(
    container: InputContainer, stream: VideoStream, timeline: Timeline, wanted: Sequence[int]
) -> Iterator[VideoFrame | None]:
    stamps, keys = timeline.stamps or [], list(timeline.keys)
    indexed = container.format.name.startswith(_INDEXED)
    frames, due = frames_from(container, stream, timeline.begin), 0  # `due`: number of the frame that the decoder returns next
    for number in wanted:
        nearest = keys[: bisect_right(keys, stamps[number])][-_MAX_JUMPS:][::-1] if indexed else []
        jumps = [key for key in nearest if key > stamps[due]]
        if jumps:
            tries = (frames_from(container, stream, key, _can_reach(timeline, number)) for key in jumps)
            frames = next(filter(None, tries), None)
        frame = _frame_at(frames, stamps[number])
        if frame is None:  # no seek ended where it should
            frames = frames_from(container, stream, timeline.begin)
            frame = _frame_at(frames, stamps[number])
        due = min(number + 1, len(stamps) - 1)
        yield frame


def _can_reach(timeline: Timeline, number: int) -> Callable[[AvPacket], bool]:
    """Return a test whether a PyAV packet is a key frame from which frame `number` can be decoded: one before it in both orders."""
    stamp, place = (timeline.stamps or [])[number], timeline.places[number]
    return lambda first: first.pts is not None and first.pts <= stamp and timeline.keys.get(first.pts, place + 1) <= place


def _frame_at(frames: Iterator[VideoFrame] | None, stamp: int) -> VideoFrame | None:
    """Return the frame with presentation time `stamp`, or None if the decoder does not return it."""
    following = next((frame for frame in frames or () if frame.pts is not None and frame.pts >= stamp), None)
    return following if following is not None and following.pts == stamp else None


def upright(frame: VideoFrame, name: str = "the video") -> Image.Image:
    """Convert the frame to RGB, turned and mirrored as its file says.

    Raises MediaError for a turn that is no whole number of quarters.
    """
    picture: Image.Image = frame.to_image()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    move = transposition(struct.unpack("=9i", bytes(cast(SupportsBytes, matrix))), name) if matrix is not None else None
    return picture if move is None else picture.transpose(move)
