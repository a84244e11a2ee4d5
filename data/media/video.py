"""Videos: from a path in a record to rows of pictures, which the vision tower reads like any other pictures.

Frames are chosen by a rule in seconds, the same for every kind of video and every frame rate:

- one frame every 1 / data.fps seconds, from the start of the range (`video_range` of the record, else the whole video) on;
- if these are more than data.max_frames or than the range has frames, or fewer than data.min_frames, then as many as the limit
  says, spread evenly in time from the range's first frame to its last;
- at each of these moments the frame that is shown then. A frame that would be taken twice is replaced by a neighbour,
  so frames repeat only where the range has fewer of them than data.min_frames.

With data.frame_times they are chosen as SmolVLM's processor does it: see `timed_frames`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch import Tensor

from data.config import DataConfig
from data.media import frames
from data.media.blob import Blob, MediaError
from data.records.frame_times import FrameTimes
from data.records.record import MediaRef
from model.media_spec import ImageSpec, MediaMeta

_ROUNDING = 1e-6
"""Seconds by which two times may differ and still count as equal."""
_SKIPPED = 1.0
"""Seconds at either end of a long video that SmolVLM does not look at."""
_BEYOND = 1.0
"""Seconds by which a range may end after its video: whole seconds are often rounded up."""

check = frames.check


def measure(blob: Blob, ref: MediaRef, spec: ImageSpec, config: DataConfig, num_media: int) -> MediaMeta:
    """Return how many frames are taken, by the times in the file, without decoding it (only a WEBP animation must be decoded).

    Raises MediaError.
    """
    if config.frame_times:
        times = ref.times or frame_times(blob, ref, spec, config)
        return MediaMeta(num_rows=len(times.numbers), moments=times.moments)
    if config.image_fit == "idefics":
        raise MediaError(
            "data.image_fit = 'idefics' with data.frame_times = false reads pictures alone: in Idefics3 there are no videos, and "
            "SmolVLM's stand under a text with the time of each frame; name frames as pictures"
        )
    with frames.open_frames(blob, spec, config) as video:
        return MediaMeta(num_rows=len(chosen(video.starts, video.end, ref.span, config, blob.name)))


def load(blob: Blob, ref: MediaRef, spec: ImageSpec, config: DataConfig, meta: MediaMeta) -> Tensor:
    """Decode the frames, in order, to pixels (meta.num_rows, 3, S, S), typed as those of a picture and never tiled.

    Raises MediaError.
    """
    with frames.open_frames(blob, spec, config) as video:
        numbers = ref.times.numbers if ref.times else chosen(video.starts, video.end, ref.span, config, blob.name)
        if len(numbers) != meta.num_rows:
            raise MediaError(f"{blob.name!r} was measured as {meta.num_rows} frames and gives {len(numbers)}")
        distinct = sorted(set(numbers))
        rows = dict(zip(distinct, video.rows(distinct, spec, config)))
    return torch.cat([rows[number] for number in numbers])


def frame_times(blob: Blob, ref: MediaRef, spec: ImageSpec, config: DataConfig) -> FrameTimes:
    """Choose frames as SmolVLM's processor does, and return when they are shown. Raises MediaError."""
    with frames.open_frames(blob, spec, config) as video:
        return timed_frames(video.starts, video.end, ref.span, config, blob.name)


def timed_frames(
    starts: Sequence[float], end: float, span: tuple[float, float] | None, config: DataConfig, name: str = "the video"
) -> FrameTimes:
    """Choose frames by their numbers, spread evenly; of a long video without its first and its last second (SmolVLM).

    `starts` and `end` are those of `data.media.frames.Frames`. Raises MediaError for a span that the video does not have.
    """
    begin, stop, first, last = _range_of(starts, end, span, name)
    held, seconds = last - first + 1, stop - begin
    low, high = 0, held - 1
    if seconds - 2 * _SKIPPED > config.max_frames * config.fps:  # its rule as it is: frames times frames per second
        skipped = _SKIPPED * held / seconds
        inner = int(skipped + _ROUNDING), min(int(held - skipped + _ROUNDING), held - 1)
        low, high = inner if inner[0] < inner[1] else (low, high)
    due = round(round(config.fps * seconds, 6))
    count = max(config.min_frames, min(due, config.max_frames))
    numbers = [first + int(number) for number in np.unique(np.linspace(low, high, count, dtype=int))]
    return FrameTimes(tuple(numbers), tuple(starts[number] for number in numbers), end)


def chosen(
    starts: Sequence[float], end: float, span: tuple[float, float] | None, config: DataConfig, name: str = "the video"
) -> list[int]:
    """Return the numbers of the frames that are taken, ascending. `starts` and `end` are those of `data.media.frames.Frames`.

    Raises MediaError for a span that the video does not have.
    """
    return sampled(starts, end, span, config, name).numbers


@dataclass(frozen=True)
class Sampled:
    """The frames of a video that are taken."""

    numbers: list[int]  # ascending
    seconds: float  # from one moment at which a frame is taken to the next


def sampled(starts: Sequence[float], end: float, span: tuple[float, float] | None, config: DataConfig, name: str) -> Sampled:
    """Return what `chosen` returns, with the time between."""
    begin, stop, first, last = _range_of(starts, end, span, name)
    due, held = ceil((stop - begin) * config.fps - _ROUNDING), last - first + 1
    count = max(config.min_frames, min(due, config.max_frames, held))
    spread = (starts[last] - begin) / (count - 1) if count > 1 and starts[last] > begin else (stop - begin) / count
    step = 1 / config.fps if count == due else spread
    moments = [(begin + stop) / 2] if count == 1 and due != 1 else [begin + k * step for k in range(count)]
    shown = [min(bisect_right(starts, moment + _ROUNDING) - 1, last) for moment in moments]
    return Sampled(_distinct(shown, last) if count <= held else shown, step)


def _range_of(starts: Sequence[float], end: float, span: tuple[float, float] | None, name: str) -> tuple[float, float, int, int]:
    """Return where a range begins and stops, in seconds, and its first and its last frame."""
    begin, stop = _seconds_of(span, end, name)
    first = bisect_right(starts, begin + _ROUNDING) - 1
    return begin, stop, first, max(first, bisect_left(starts, stop - _ROUNDING) - 1)


def _seconds_of(span: tuple[float, float] | None, end: float, name: str) -> tuple[float, float]:
    if span is None:
        return 0.0, end
    begin, stop = span
    if not 0 <= begin < stop:
        raise MediaError(
            f"video_range [{begin:g}, {stop:g}] is no range of seconds: it must begin at 0 or later and before it ends"
        )
    if begin >= end - _ROUNDING or stop > end + _BEYOND:
        raise MediaError(f"video_range [{begin:g}, {stop:g}] is not in {name!r}, which lasts {end:.2f} s")
    return begin, min(stop, end)


def _distinct(numbers: list[int], last: int) -> list[int]:
    """Return the numbers, moved forward where one comes twice and back where they would pass `last`."""
    ahead: list[int] = []
    for number in numbers:
        ahead.append(max(number, ahead[-1] + 1) if ahead else number)
    return [min(number, last - (len(ahead) - 1 - k)) for k, number in enumerate(ahead)]
