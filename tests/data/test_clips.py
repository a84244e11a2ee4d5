"""A clip that was cut without re-encoding gives the frames that a player shows, at the times at which it shows them."""

from __future__ import annotations

import shutil
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.config import DataConfig
from data.media import av_video, video
from data.media.av_files import open_stream
from data.media.av_video import decode_frames, read_timeline, upright
from data.media.blob import Blob, MediaError
from data.records.record import MediaRef
from model.media_spec import ImageSpec
from tests.support.tiny_clips import RATE, cut, original, told, with_edits, with_matrix
from tests.support.tiny_media import film

SPEC = ImageSpec(16, 8, 1, "patch", "shortest_edge", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
KINDS = [("libx264", 60, 0, False), ("libx264", 60, 3, False), ("libx264", 12, 0, False), ("libx264", 12, 3, False)]
KINDS += [("libx264", 12, 3, True), ("libx265", 60, 3, False), ("libx265", 12, 0, False), ("libx265", 12, 3, True)]
STARTS = [Fraction(21, 10), Fraction(47, 20), Fraction(24, 10)]  # on a frame, between two, on a key frame of groups of 12


def read(data: bytes, *wanted: list[int]) -> tuple[list[float], float, list[list[int]]]:
    """When the frames of a clip are shown, when it ends, and which of the original all of them and the wanted ones are."""
    with open_stream(Blob("clip", data=data), "video") as (container, stream):
        timeline = read_timeline(container, stream, "clip")
        asked = [list(range(len(timeline.starts))), *wanted]
        frames = ([*decode_frames(container, stream, timeline, numbers, "clip")] for numbers in asked)
        return timeline.starts, timeline.end, [[told(upright(frame).getpixel((32, 24))[0]) for frame in some] for some in frames]


def shown_by_ffmpeg(path: Path) -> tuple[list[float], list[int]]:
    """The same of ffmpeg, an independent program, at whatever version it is there."""
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-fps_mode", "passthrough"]
    grey = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "gray", "-"], check=True, capture_output=True).stdout
    levels = np.frombuffer(grey, np.uint8).reshape(-1, 48, 64)[:, 24, 32]
    table = subprocess.run([*command, "-f", "framehash", "-"], check=True, capture_output=True, text=True).stdout.splitlines()
    base = Fraction(next(line for line in table if line.startswith("#tb 0:")).split(":")[1].strip())
    times = [int(line.split(",")[2]) * base for line in table if not line.startswith("#")]
    return [float(time - times[0]) for time in times], [told(float(level)) for level in levels]


@pytest.mark.parametrize(("form", "start"), [("mp4", start) for start in STARTS] + [("mov", STARTS[1]), ("matroska", STARTS[1])])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "{}-{}-{}-{}".format(*kind))
def test_a_cut_clip_gives_the_frames_that_a_player_shows(kind: Any, form: str, start: Fraction, tmp_path: Path) -> None:
    data, held, keys = cut(original(*kind), start, Fraction(2), form)
    # Matroska has no edit list: there all is shown that can be decoded.
    expected = [i for i in held if i >= (keys[0] if form == "matroska" else start * RATE)]
    some = [[len(expected) - 1], [0, len(expected) - 1], [1, 9, 10, 17]]
    starts, end, found = read(data, *some)
    assert found == [expected, *([expected[k] for k in numbers] for numbers in some)]
    assert starts == pytest.approx([(i - expected[0]) / RATE for i in expected], abs=1e-3)
    assert end == pytest.approx(starts[-1] + 1 / RATE, abs=2e-3)
    if shutil.which("ffmpeg") and form == "mp4" and start == STARTS[1]:
        (tmp_path / "clip").write_bytes(data)
        times, numbers = shown_by_ffmpeg(tmp_path / "clip")
        assert numbers == expected and times == pytest.approx(starts, abs=1e-3)


def test_seconds_of_a_cut_clip_are_its_own() -> None:
    data = cut(original("libx264", 12, 3, False), Fraction(47, 20), Fraction(2), "mp4")[0]
    config = DataConfig(fps=2.0, min_frames=1)
    for span, expected in (((0.0, 1.0), [24, 29]), ((1.0, 1.9), [34, 39]), (None, [24, 29, 34, 39])):
        ref = MediaRef("video", "clip", span=span)
        blob = Blob("clip", data=data)
        video.check(blob)
        meta = video.measure(blob, ref, SPEC, config, 1)
        rows = video.load(blob, ref, SPEC, config, meta)
        assert [told(float(row[0, 8, 8] * 0.25 + 0.5) * 255) for row in rows][: len(expected)] == expected
    with pytest.raises(MediaError, match="is not in 'clip', which lasts 2"):
        video.measure(blob, MediaRef("video", "clip", span=(2.5, 3.0)), SPEC, config, 1)


def test_a_late_frame_of_a_cut_clip_needs_its_own_group_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    data = cut(original("libx264", 12, 3, False), Fraction(47, 20), Fraction(2), "mp4")[0]
    come: list[int] = []
    whole = av_video.frames_from

    def counted(*args: Any) -> Any:
        found = whole(*args)
        return None if found is None else (come.append(frame.pts) or frame for frame in found)  # type: ignore[func-returns-value]

    monkeypatch.setattr(av_video, "frames_from", counted)
    with open_stream(Blob("clip", data=data), "video") as (container, stream):
        timeline = read_timeline(container, stream, "clip")
        assert come == []  # its times are known without decoding
        (frame,) = decode_frames(container, stream, timeline, [14], "clip")
    assert told(upright(frame).getpixel((32, 24))[0]) == 38 and len(come) <= 3


EDITS: dict[str, tuple[list[tuple[float, float | None]], list[int]]] = {
    "late": ([(1.5, None), (1, 2.0)], [*range(20, 30)]),
    "two": ([(1, 0.55), (1, 3.05)], [*range(6, 16), *range(31, 41)]),
    "back": ([(1, 3.05), (1, 0.55)], [*range(31, 41), *range(6, 16)]),
    "twice": ([(0.5, 2.0), (0.5, 2.0)], [*range(20, 25)] * 2),
}


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("kind", EDITS)
def test_stretches_of_an_edit_list_are_shown_one_after_the_other(kind: str, codec: str) -> None:
    edits, expected = EDITS[kind]
    starts, _, found = read(with_edits(original(codec, 12, 0, False), edits), [0, len(expected) - 2])
    assert found == [expected, [expected[0], expected[-2]]]
    assert starts == pytest.approx([k / RATE for k in range(len(expected))], abs=0.06)  # a seam may lie between two frames


def test_an_edit_list_that_shows_nothing_is_named() -> None:
    with pytest.raises(MediaError, match=r"'clip' holds \d+ frames, and its edit list shows none of them"):
        read(with_edits(original("libx264", 12, 0, False), [(0.05, 2.02)]))


COLOURS = {(-1, -1): (255, 0, 0), (1, -1): (0, 255, 0), (-1, 1): (0, 0, 255), (1, 1): (255, 255, 255)}
"""By the quarter of the picture: left or right, above or below."""


@pytest.fixture(scope="module")
def quartered() -> bytes:
    picture = Image.new("RGB", (64, 48))
    for (x, y), colour in COLOURS.items():
        picture.paste(colour, (16 + 16 * x, 12 + 12 * y, 48 + 16 * x, 36 + 12 * y))
    return film([picture] * 2, qp="4")


def shown(data: bytes) -> Image.Image:
    with open_stream(Blob("clip", data=data), "video") as (container, stream):
        (frame,) = decode_frames(container, stream, read_timeline(container, stream, "clip"), [0], "clip")
        return upright(frame, "clip")


STRAIGHT = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)]
TURNED = [(0, b, c, 0) for b in (1, -1) for c in (1, -1)]


@pytest.mark.parametrize("matrix", [*STRAIGHT, *TURNED, (0.5, 0, 0, -2), (0, 0, 0, 0)])
def test_a_film_is_turned_and_mirrored_by_its_matrix(quartered: bytes, matrix: tuple[float, ...]) -> None:
    """A point (x, y) of what is stored is shown at (a x + c y, b x + d y)."""
    picture = shown(with_matrix(quartered, matrix))
    assert picture.size == ((48, 64) if matrix in TURNED else (64, 48))
    a, b, c, d = matrix if any(matrix) else (1, 0, 0, 1)  # an empty matrix moves nothing
    for (x, y), colour in COLOURS.items():
        across, down = np.sign(a * x + c * y), np.sign(b * x + d * y)
        seen = picture.getpixel((int(picture.width * (2 + across) / 4), int(picture.height * (2 + down) / 4)))
        assert np.abs(np.subtract(seen, colour)).max() < 12


def test_a_turn_that_is_no_quarter_is_refused(quartered: bytes) -> None:
    with pytest.raises(MediaError, match="'clip' is shown turned by 45 degrees; quarters are read"):
        shown(with_matrix(quartered, (0.7, 0.7, -0.7, 0.7)))
