"""Videos at their own size: every kind of video is turned upright, cut to the same patches, and measured as it is decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data.config import DataConfig
from data.media import native_image, native_video
from data.media.blob import Blob, MediaError
from data.records.record import MediaRef
from model.media_spec import MediaMeta, NativeSpec
from tests.support.tiny_media import animation, blob, film, folder, greys

SPEC = NativeSpec(
    *(8, 4, 0, "patch", "qwen", (0.5,) * 3, (0.25,) * 3),
    **{"shrink": 2, "multiple": 2, "frames": 2, "min_pixels": 4 * 64, "max_pixels": 40 * 64, "axes": 3},
)


def measured(source: Blob, span: tuple[float, float] | None = None, **config: Any) -> tuple[MediaMeta, torch.Tensor]:
    """What a video is measured as, and the patches that it is decoded to: as many."""
    ref, limits = MediaRef("video", source.name, span=span), DataConfig(**{"image_fit": "native", "min_frames": 1, **config})
    meta = native_video.measure(source, ref, SPEC, limits, 1)
    values = native_video.load(source, ref, SPEC, limits, meta)
    times, high, wide = meta.patches
    assert values.shape == (times * high * wide, 3, 1 if meta.num_rows == 1 else 2, 4, 4)
    return meta, values


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_folder_an_animation_and_pictures_give_the_same_patches(tmp_path: Path, count: int) -> None:
    pictures = [Image.effect_noise((50, 30), 90).convert("RGB") for _ in range(count)]
    config = DataConfig(image_fit="native")
    stills = native_image.patches_of([picture.resize((48, 32), 3) for picture in pictures], SPEC, config)
    for source in (blob(folder(tmp_path / "v", pictures)), Blob("v", data=animation(pictures, 1000, "WEBP"))):
        meta, values = measured(source)
        assert torch.equal(values, stills) and (meta.num_rows, meta.patches) == (count, ((count + 1) // 2, 8, 12))
        if count == 3:  # the last frame fills its pair
            last = values.unflatten(0, (2, -1))[1]
            assert torch.equal(last[:, :, 0], last[:, :, 1])
    fast = native_image.patches_of([picture.resize((48, 32), 3) for picture in pictures], SPEC, DataConfig(image_decode="fast"))
    assert torch.equal(measured(blob(tmp_path / "v"), image_decode="fast")[1], fast)


@pytest.mark.parametrize(
    ("frames", "config", "span", "expected"),
    [
        (40, {"fps": 2.0}, None, (8, 1.0)),  # four seconds at ten frames per second
        (40, {"fps": 2.0}, (1.0, 3.0), (4, 1.0)),
        (36, {"fps": 1.0}, None, (4, 2.0)),  # at 0, 1, 2 and 3 s
        (41, {"fps": 4.0, "max_frames": 5}, None, (5, 2.0)),  # at 0, 1 ... 4 s
        (31, {"fps": 0.1, "min_frames": 4}, None, (4, 2.0)),  # at 0, 1, 2 and 3 s
        (1, {"fps": 2.0, "min_frames": 4}, None, (4, 0.05)),  # a tenth of a second, shown four times
    ],
)
def test_seconds_are_those_from_one_pair_of_frames_to_the_next(
    frames: int, config: dict[str, Any], span: Any, expected: tuple[int, float]
) -> None:
    meta, _ = measured(Blob("v", data=film(greys(frames))), span, **config)
    assert (meta.num_rows, meta.seconds) == (expected[0], pytest.approx(expected[1]))


def test_a_film_that_is_shown_turned_is_measured_turned() -> None:
    left_red = Image.new("RGB", (64, 48), (0, 0, 255))
    left_red.paste((255, 0, 0), (0, 0, 32, 48))
    data = film([left_red] * 3)
    upright = b"\0\1\0\0" + bytes(12) + b"\0\1\0\0" + bytes(12) + b"\x40\0\0\0"
    clockwise = bytes(4) + b"\0\1\0\0" + bytes(4) + b"\xff\xff\0\0" + bytes(16) + b"\x40\0\0\0"
    at = data.rindex(upright)  # the matrix of the track; the one before is the film's
    lying, _ = measured(Blob("v", data=data))
    standing, values = measured(Blob("v", data=data[:at] + clockwise + data[at + 36 :]))
    times, high, wide = lying.patches
    assert standing.patches == (times, wide, high) and wide > high
    first, last = values[0, :, 0].mean((1, 2)), values[standing.patches[1] * standing.patches[2] - 1, :, 0].mean((1, 2))
    assert first[0] > 1 > -1 > first[2] and last[2] > 1 > -1 > last[0]  # red above, blue below


def test_frames_of_a_folder_take_the_size_of_the_first(tmp_path: Path) -> None:
    path = folder(tmp_path / "v", greys(2, (40, 24)))
    greys(1, (99, 99))[0].save(path / "frame 2.png")
    assert measured(blob(path))[0].patches == (2, 6, 10)


def test_a_budget_shrinks_all_frames_alike() -> None:
    source = Blob("v", data=film(greys(30)))
    meta, _ = measured(source, fps=2.0, video_max_pixels=64 * 30)
    _, high, wide = meta.patches
    assert meta.num_rows == 6 and high * wide * 16 * 6 <= 64 * 30
    with pytest.raises(MediaError, match=r"a video of 6 frames has 63 pixels for each of data\.video_max_pixels = 383"):
        measured(source, fps=2.0, video_max_pixels=383)
