"""The frames of a video and their times: a folder of pictures, an animated GIF or WEBP, or a file that PyAV reads."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from data.config import DataConfig
from data.media import image
from data.media.av_files import open_stream
from data.media.av_video import Timeline, decode_frames, read_timeline, upright
from data.media.blob import Blob, MediaError, resolve_path
from data.media.image_decode import Picture, Size, decode, header_size, open_picture
from data.media.image_fit import needed_size
from model.media_spec import ImageSpec, MediaMeta

if TYPE_CHECKING:
    from av.video.stream import VideoStream

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""Extensions of the files in a folder that are its frames; other files, such as a list of times, are ignored."""
_ANIMATION = re.compile(rb"GIF8|RIFF....WEBP", re.DOTALL)
MAX_FRAMES = 20_000
"""Most frames of an animation; all of them are stepped through to find their times."""
MAX_WORK = 16
"""Most pixels of all frames of an animation together, in units of `max_pixels`: a gigapixel takes some ten seconds."""
_SHORTEST, _UNTIMED = 0.02, 0.1
"""Seconds: an animation's frame that is shown for less than the first counts as shown for the second, as in browsers."""


Needed = Callable[[Size], Size] | None
"""Map from the size of an upright frame to the size that it will be resized to; None: frames are decoded at full size."""


@dataclass(frozen=True)
class Frames:
    """The frames of a video: frame i is shown from starts[i] until the next one, in seconds from the first frame, ascending."""

    starts: Sequence[float]
    end: float  # end of the last frame
    size: Callable[[int], Size]
    """Return the size of one upright frame. Raises MediaError."""
    pictures: Callable[[Sequence[int], Needed], Iterator[Picture]]
    """Decode frames, whose numbers must ascend, to upright pictures. Raises MediaError."""

    def rows(self, wanted: Sequence[int], spec: ImageSpec, config: DataConfig) -> Iterator[Tensor]:
        """Decode frames, whose numbers must ascend, to pixels (1, 3, S, S) each. Raises MediaError."""
        fitted = image.one_view(config)
        needed = (lambda size: needed_size(size, spec, fitted, MediaMeta())) if config.image_decode == "fast" else None
        for picture in self.pictures(wanted, needed):
            yield image.frame_rows(picture, spec, config)


def open_frames(blob: Blob, spec: ImageSpec, config: DataConfig) -> AbstractContextManager[Frames]:
    """Open the frames of a video, which stays open as long as the context. Any fault of the video is raised as MediaError."""
    return _opener(blob)(blob, spec, image.one_view(config))


def check(blob: Blob) -> None:
    """Raise MediaError for a video that cannot be opened or, by its markers, is cut off. Decodes nothing."""
    opener = _opener(blob)
    if opener is _folder:
        _names(blob)
    elif opener is _animation:
        image.check_file(blob)
    else:
        with open_stream(blob, "video") as (_, stream):
            _size(stream, blob.name)


def _opener(blob: Blob) -> Callable[[Blob, ImageSpec, DataConfig], AbstractContextManager[Frames]]:
    if blob.is_folder:
        return _folder
    with blob.open() as stream:
        return _animation if _ANIMATION.match(stream.read(12)) else _file


@contextmanager
def _folder(blob: Blob, spec: ImageSpec, config: DataConfig) -> Iterator[Frames]:
    """Open a folder of pictures in the natural order of their names; pictures carry no times and count as taken at data.fps."""
    names = _names(blob)

    def frame(i: int) -> Blob:
        return Blob(os.path.join(blob.name, names[i]), resolve_path(names[i], blob.path, follow_links=config.follow_links))

    def judge(i: int) -> Callable[[Size], None]:
        return lambda size: image.judge(frame(i).name, size, spec, config)

    def pictures(wanted: Sequence[int], needed: Needed) -> Iterator[Picture]:
        for i in wanted:
            yield decode(frame(i), judge(i), needed)

    starts = [i / config.fps for i in range(len(names))]
    yield Frames(starts, len(names) / config.fps, lambda i: header_size(frame(i), judge(i)), pictures)


def _names(blob: Blob) -> list[str]:
    names = os.listdir(blob.path)
    found = [name for name in names if name.lower().endswith(_PICTURES) and not name.startswith(".")]
    if not found:
        raise MediaError(f"{blob.name!r} is a folder without frames; their names end with {', '.join(_PICTURES)}")
    return sorted(found, key=_natural)


def _natural(name: str) -> tuple[list[str | int], str]:
    """Return a sort key that compares numbers in names by value: "9.png" before "10.png"."""
    parts = re.split("([0-9]+)", name)  # every second one is a number
    return [int(part) if k % 2 else part for k, part in enumerate(parts)], name


@contextmanager
def _animation(blob: Blob, spec: ImageSpec, config: DataConfig) -> Iterator[Frames]:
    image.check_file(blob)
    with open_picture(blob) as (_, picture):
        image.judge(blob.name, picture.size, spec, config)
        starts, count = [0.0], getattr(picture, "n_frames", 1)
        _judge_work(blob.name, count, picture.size, config)
        for i in range(count):
            starts.append(starts[-1] + _seconds(picture, i))
            image.judge(blob.name, picture.size, spec, config)  # a later frame of a GIF may make the picture larger

        def size(i: int) -> Size:
            picture.seek(i)
            return picture.size

        def pictures(wanted: Sequence[int], needed: Needed) -> Iterator[Picture]:
            for i in wanted:
                picture.seek(i)
                yield Picture.of(picture.convert("RGB"))

        yield Frames(starts[:-1], starts[-1], size, pictures)


def _judge_work(name: str, count: int, size: tuple[int, int], config: DataConfig) -> None:
    """Raise MediaError for an animation whose frames take too long to step through: a small file can hold hours of work."""
    if count > MAX_FRAMES:
        raise MediaError(f"{name!r} has {count} frames; an animation of at most {MAX_FRAMES} is read")
    if (pixels := count * size[0] * size[1]) > MAX_WORK * config.max_pixels:
        amount = f"{count} frames of {size[0]} x {size[1]} = {pixels} pixels"
        raise MediaError(f"{name!r} has {amount}; at most {MAX_WORK} times data.max_pixels is read")


def _seconds(picture: Image.Image, i: int) -> float:
    """Return the seconds for which frame i is shown."""
    picture.seek(i)
    if picture.format == "WEBP":
        picture.load()  # Pillow knows the duration of a WEBP frame only once the frame is decoded
    seconds = picture.info.get("duration", 0) / 1000
    return seconds if seconds >= _SHORTEST else _UNTIMED


@contextmanager
def _file(blob: Blob, spec: ImageSpec, config: DataConfig) -> Iterator[Frames]:
    with open_stream(blob, "video") as (container, stream):
        image.judge(blob.name, _size(stream, blob.name), spec, config)
        timeline: Timeline = read_timeline(container, stream, blob.name)

        def pictures(wanted: Sequence[int], needed: Needed) -> Iterator[Picture]:
            for frame in decode_frames(container, stream, timeline, wanted, blob.name):
                image.judge(blob.name, (frame.width, frame.height), spec, config)
                yield Picture.of(upright(frame, blob.name))

        def size(i: int) -> Size:
            return next(pictures([i], None)).size  # how it is turned stands with some codecs in the frame alone

        yield Frames(timeline.starts, timeline.end, size, pictures)


def _size(stream: VideoStream, name: str) -> tuple[int, int]:
    width, height = stream.codec_context.width, stream.codec_context.height
    if width < 1 or height < 1:
        raise MediaError(f"{name!r} holds a video of {width} x {height} pixels")
    return width, height
