"""Which frames of a video are seen is a rule in seconds; they are the very frames of the file, and what is no video is named."""

from __future__ import annotations

import io
import os
import random
import struct
import sys
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from data.config import DataConfig
from data.media import image, video
from data.media.blob import Blob, MediaError
from data.media.frames import open_frames
from data.media.image_decode import Picture
from data.records.record import MediaRef
from model.media_spec import ImageSpec
from tests.support.tiny_media import STEP, animation, blob, compressed, film, folder, greys, tone

SPEC = ImageSpec(16, 8, 1, "patch", "shortest_edge", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
ALL: dict[str, Any] = {"fps": 1000.0, "min_frames": 1, "max_frames": 1000}


def load(source: Blob, span: tuple[float, float] | None = None, **config: Any) -> Tensor:
    """Rows of a video; as many as were measured."""
    ref, limits = MediaRef("video", source.name, span=span), DataConfig(**{"min_frames": 1, **config})
    meta = video.measure(source, ref, SPEC, limits, 1)
    rows = video.load(source, ref, SPEC, limits, meta)
    assert rows.shape == (meta.num_rows, 3, 16, 16)
    return rows


def numbers(rows: Tensor) -> list[int]:
    """Which frames of a film of greys they are; codecs are a few levels off."""
    return [round(float(row[0, 8, 8] * 0.25 + 0.5) * 255 / STEP) for row in rows]


def chosen(starts: list[float], end: float, fps: float, least: int, most: int, span: Any = None) -> list[int]:
    return video.chosen(starts, end, span, DataConfig(fps=fps, min_frames=least, max_frames=most))


TEN = [i / 10 for i in range(100)]  # ten seconds at ten frames per second
UNEVEN = [0.0, 0.1, 0.2, 0.3, 1.9, 4.0]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ((TEN, 10.0, 1.0, 4, 16), [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]),
        ((TEN, 10.0, 2.0, 4, 16), [0, 6, 13, 19, 26, 33, 39, 46, 52, 59, 66, 72, 79, 85, 92, 99]),  # 20 are due, 16 allowed
        ((TEN, 10.0, 0.1, 4, 16), [0, 33, 66, 99]),  # 1 is due
        ((TEN, 10.0, 1.0, 1, 1), [50]),
        ((TEN, 10.0, 1.0, 1, 2), [0, 99]),
        ((TEN, 10.0, 1.0, 1, 16, (2.05, 4.05)), [20, 30]),
        ((TEN, 10.0, 1.0, 4, 16, (2.0, 3.0)), [20, 23, 26, 29]),
        ((TEN, 10.0, 1.0, 1, 16, (9.95, 10.9)), [99]),  # ends up to a second after the video
        ((TEN[:25], 2.5, 1.0, 1, 16), [0, 10, 20]),
        ((UNEVEN, 5.0, 1.0, 1, 16), [0, 2, 3, 4, 5]),  # 3 s shows the frame of 2 s again, and others make room
        ((UNEVEN, 5.0, 1.0, 4, 4), [0, 3, 4, 5]),
        ((UNEVEN, 5.0, 1.0, 6, 16), [0, 1, 2, 3, 4, 5]),
        ((UNEVEN, 5.0, 1.0, 8, 16), [0, 3, 3, 3, 4, 4, 4, 5]),  # fewer than the least: some repeat
        ((UNEVEN, 5.0, 1.0, 4, 16, (2.0, 3.0)), [4, 4, 4, 4]),  # one frame is on the screen all the time
        (([0.0], 0.0, 1.0, 4, 16), [0, 0, 0, 0]),
        (([0.0], 0.0, 1.0, 1, 16), [0]),
    ],
)
def test_the_rule(case: Any, expected: list[int]) -> None:
    assert chosen(*case) == expected


@given(
    gaps=st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    fps=st.floats(0.05, 60),
    least=st.integers(1, 8),
    extra=st.integers(0, 20),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_the_rule_keeps_its_limits(gaps: list[int], fps: float, least: int, extra: int, cut: tuple[float, float]) -> None:
    starts = [sum(gaps[:i]) / 1000 for i in range(len(gaps))]
    end = sum(gaps) / 1000
    span = (min(cut) * end, max(cut) * end) if abs(cut[0] - cut[1]) * end > 1e-3 else None
    begin, stop = span or (0.0, end)
    on_screen = [i for i, start in enumerate(starts) if start < stop - 1e-6 and (starts + [end])[i + 1] > begin + 1e-6]
    taken = chosen(starts, end, fps, least, least + extra, span)
    assert least <= len(taken) <= least + extra and len(taken) <= max(least, len(on_screen), 1)
    assert taken == sorted(taken) and set(taken) <= set(on_screen)
    assert len(set(taken)) == len(taken) or len(on_screen) < len(taken)


FILMS = {
    "mp4": film(greys(30)),
    "fragments": film(greys(30), movflags="frag_keyframe"),
    "hevc": film(greys(30), codec="libx265", **{"x265-params": "log-level=none:open-gop=1:keyint=10"}),
    "webm": film(greys(30), "webm", "libvpx-vp9"),
    "mkv": film(greys(30), "matroska", "mpeg4", qmax="2"),
    "avi": film(greys(30), "avi", "libx264"),
    "flv": film(greys(30), "flv"),
    "ts": film(greys(30), "mpegts"),
    "mpg": film(greys(30), "mpeg", "mpeg2video", rate=25, qmax="2"),
    "with sound": film(greys(30), sound=tone(3.0, 16_000)),
    "GIF": animation(greys(30), 100),
    "WEBP": animation(greys(30), 100, "WEBP"),
}


@pytest.mark.parametrize("kind", FILMS)
def test_the_frames_that_are_due_are_those_of_the_file(kind: str) -> None:
    source = Blob(kind, data=FILMS[kind])
    video.check(source)
    rate = 25 if kind == "mpg" else 10
    assert numbers(load(source, **ALL)) == list(range(30))
    assert numbers(load(source, fps=rate / 5)) == [0, 5, 10, 15, 20, 25]
    assert numbers(load(source, (11.1 / rate, 28 / rate), fps=rate / 10)) == [11, 21]
    assert numbers(load(source, fps=9.0, max_frames=3)) == [0, 14, 29]


@pytest.mark.parametrize("kind", [k for k in FILMS if k not in ("GIF", "WEBP")])
def test_jumping_gives_the_pixels_of_decoding_everything(kind: str) -> None:
    with av.open(io.BytesIO(FILMS[kind])) as container:
        whole = [image.frame_rows(Picture.of(frame.to_image()), SPEC, DataConfig()) for frame in container.decode(video=0)]
    draw = random.Random(0)
    with open_frames(Blob(kind, data=FILMS[kind]), SPEC, DataConfig()) as frames:
        assert len(frames.starts) == len(whole) == 30
        for wanted in [[29], [0, 29], *(sorted(draw.sample(range(30), 4)) for _ in range(5))]:
            assert all(torch.equal(row, whole[i]) for i, row in zip(wanted, frames.rows(wanted, SPEC, DataConfig()), strict=True))


@pytest.mark.parametrize("make", ["mkv", "GIF", "WEBP"])
def test_a_variable_frame_rate_is_read_by_time(make: str) -> None:
    times = [0, 1, 2, 13, 17, 40]  # tenths of a second
    gaps = [100 * (b - a) for a, b in zip(times, [*times[1:], 41])]
    data = film(greys(6), "matroska", times=times) if make == "mkv" else animation(greys(6), gaps, make)
    assert numbers(load(Blob("v", data=data), (0, 2.5))) == [0, 2, 4]
    assert numbers(load(Blob("v", data=data), max_frames=3)) == [0, 4, 5]
    assert numbers(load(Blob("v", data=data), (1.4, 1.6))) == [3]


def test_an_animation_without_times_runs_as_in_a_browser() -> None:
    assert numbers(load(Blob("v", data=animation(greys(30), 0)), fps=2.0)) == [0, 5, 10, 15, 20, 25]


def test_a_folder_is_read_in_the_natural_order_of_its_names(tmp_path: Path) -> None:
    path = folder(tmp_path / "frames", greys(12))
    (path / "times.txt").write_text("0 1 2")
    (path / ".hidden.png").write_bytes(b"")
    assert numbers(load(blob(path))) == list(range(12))
    assert numbers(load(blob(path), fps=7.0)) == list(range(12))  # its frames count as taken at data.fps
    assert numbers(load(blob(path), max_frames=4)) == [0, 3, 7, 11]
    assert numbers(load(blob(path), (3.0, 6.0))) == [3, 4, 5]
    assert numbers(load(blob(path), (3.0, 5.0), fps=2.0)) == [6, 7, 8, 9]


def test_digits_that_are_no_numbers_are_letters(tmp_path: Path) -> None:
    path = folder(tmp_path / "frames", greys(2))
    for i, name in enumerate(["\u00b2.png", "\u0663 1.png"], 2):
        greys(4)[i].save(path / name)
    assert numbers(load(blob(path), **ALL)) == [0, 1, 2, 3]


def test_frames_are_pictures_to_the_bit(tmp_path: Path) -> None:
    pictures = [Image.effect_noise((40, 30), 90).convert("RGB") for _ in range(2)]
    path = folder(tmp_path / "frames", pictures)
    for options in ({"image_fit": "pad"}, {"image_fit": "square"}, {"image_decode": "fast"}):
        expected = torch.cat([image.frame_rows(Picture.of(picture), SPEC, DataConfig(**options)) for picture in pictures])  # type: ignore[arg-type]
        for source in (blob(path), Blob("v", data=animation(pictures, 1000, "WEBP"))):
            assert torch.equal(load(source, **options), expected)


def test_frames_are_never_tiled(tmp_path: Path) -> None:
    path = folder(tmp_path / "frames", greys(3, (90, 30)))
    for source in (blob(path), Blob("v", data=film(greys(3, (90, 30))))):
        assert len(load(source, image_fit="tiles", max_tiles=6, **ALL)) == 3


def test_a_film_is_turned_as_its_file_says() -> None:
    left_red = Image.new("RGB", (64, 48), (0, 0, 255))
    left_red.paste((255, 0, 0), (0, 0, 32, 48))
    data = film([left_red] * 3)
    upright = b"\0\1\0\0" + bytes(12) + b"\0\1\0\0" + bytes(12) + b"\x40\0\0\0"
    clockwise = bytes(4) + b"\0\1\0\0" + bytes(4) + b"\xff\xff\0\0" + bytes(16) + b"\x40\0\0\0"
    at = data.rindex(upright)  # the matrix of the track; the one before is the film's
    row = load(Blob("v", data=data[:at] + clockwise + data[at + 36 :]), image_fit="square")[0]
    assert row[0, 2, 8] > 1 > -1 > row[2, 2, 8] and row[2, 13, 8] > 1 > -1 > row[0, 13, 8]  # red above, blue below


def test_a_film_in_a_sound_file_is_no_cover_picture() -> None:
    with pytest.raises(MediaError, match=r"'v' holds no video that can be decoded; it holds audio$"):
        load(Blob("v", data=compressed(tone(1.0, 16_000), 16_000, "mp3", "libmp3lame")))


MP4, WEBM, GIF = FILMS["mp4"], FILMS["webm"], FILMS["GIF"]


def taller(gif: bytes, side: int, height: int) -> bytes:
    """A GIF of frames of `side` pixels whose last one declares another height."""
    extent = struct.pack("<BHHHH", 0x2C, 0, 0, side, side)
    before, found, after = gif.rpartition(extent)
    assert found
    return before + struct.pack("<BHHHH", 0x2C, 0, 0, side, height) + after


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "cannot be decoded"),
    "text": (b"no video at all" * 99, "cannot be decoded"),
    "cut mp4": (MP4[: len(MP4) // 2], "cannot be decoded"),
    "cut webm": (film(greys(30), "webm", "libvpx-vp9", rate=5)[: len(WEBM) // 2], "cut off"),
    "cut fragments": (film(greys(30), rate=2, movflags="frag_keyframe")[:-600], "(cut off|cannot be decoded)"),
    "cut GIF": (GIF[: len(GIF) // 2], "cut short"),
    "cut WEBP": (FILMS["WEBP"][:-9], "(cut short|cannot be decoded)"),
    "GIF of no frames": (GIF[:13] + b";", "cannot be decoded"),
    "too large": (film(greys(2, (320, 320))), "320 x 320 = 102400 pixels; data.max_pixels allows 10000"),
    "GIF that grows": (
        taller(animation(greys(3, (20, 20)), 100), 20, 600),
        "20 x 600 = 12000 pixels; data.max_pixels allows 10000",
    ),
    "too large GIF": (animation(greys(2, (320, 320)), 100), "320 x 320 = 102400 pixels; data.max_pixels allows 10000"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_video_is_named(kind: str) -> None:
    data, reason = BROKEN[kind]
    with pytest.raises(MediaError, match=f"^'bad' .*{reason}"):
        load(Blob("bad", data=data), max_pixels=10_000, **ALL)


@pytest.mark.parametrize("kind", ["empty file", "text", "cut mp4", "cut GIF", "cut WEBP"])
def test_the_check_finds_it_without_decoding(kind: str) -> None:
    with pytest.raises(MediaError):
        video.check(Blob("bad", data=BROKEN[kind][0]))


@pytest.mark.parametrize("span", [(5.0, 3.0), (-1.0, 2.0), (2.0, 2.0), (3.0, 4.0), (1.0, 4.5), (float("nan"), 1.0)])
@pytest.mark.parametrize("kind", ["mp4", "GIF"])
def test_a_range_that_the_video_does_not_have_is_named(span: tuple[float, float], kind: str) -> None:
    with pytest.raises(
        MediaError, match=rf"video_range \[{span[0]:g}, {span[1]:g}\] is (no range of seconds|not in 'v', which lasts 3.00 s)"
    ):
        load(Blob("v", data=FILMS[kind]), span)


def test_folders_without_frames_and_links_out_of_them_are_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for act in (load, video.check):
        with pytest.raises(MediaError, match="'empty' is a folder without frames"):
            act(blob(empty))  # type: ignore[operator]
    path = folder(tmp_path / "frames", greys(2))
    greys(1)[0].save(tmp_path / "other.png")
    os.symlink(tmp_path / "other.png", path / "frame 2.png")
    with pytest.raises(MediaError, match=r"frame 2.png' is a link that leaves"):
        load(blob(path))
    assert numbers(load(blob(path), follow_links=True)) == [0, 1, 0]
    (path / "frame 1.png").write_bytes(b"broken")
    with pytest.raises(MediaError, match=r"frames/frame 1.png' is none of"):
        load(blob(path), follow_links=True)


def test_without_pyav_folders_and_animations_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert len(load(blob(folder(tmp_path / "frames", greys(5))))) == len(load(Blob("v", data=GIF), fps=2.0)) - 1
    with pytest.raises(MediaError, match=r"pip install -e '\.\[media\]'"):
        load(Blob("v", data=MP4))


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"fps": 0.0}, "fps"), ({"fps": float("inf")}, "fps"), ({"min_frames": 0}, "min_frames"), ({"min_frames": 17}, "min_frames")]
    + [({"max_seconds": value}, "max_seconds") for value in (0.0, -1.0, float("nan"))],
)
def test_impossible_limits_are_refused(changes: dict[str, Any], key: str) -> None:
    (problem,) = DataConfig(**changes).problems()
    assert problem.startswith(f"data.{key} = {changes[key]} is no")
    assert DataConfig().problems() == []
