"""Patches equal the rows that the families' processors with the PIL back end cut, to the bit."""

from typing import Literal

import numpy as np
import pytest
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from data.config import DataConfig
from data.media.image_decode import Picture
from data.media.native_image import patches_of, resized
from data.media.native_size import NativeRule, fitted_size, patch_grid
from model.media_spec import NativeSpec
from tests.support.pictures import noise

Size = tuple[int, int]
SIZES = [(28, 1500), (333, 177), (1, 1), (47, 65), (300, 2), (112, 112)]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
QWEN2 = NativeRule("qwen", 14, merge=2, frames=2, min_pixels=56 * 56, max_pixels=28 * 28 * 100)
QWEN3 = NativeRule("qwen", 16, merge=2, frames=2, min_pixels=1 << 12, max_pixels=1 << 18)
NAFLEX = NativeRule("naflex", 16, max_patches=64)
PIXTRAL = NativeRule("pixtral", 16, longest=256)
MISTRAL3 = NativeRule("pixtral", 14, merge=2, longest=308)


LOOKS = {QWEN3: ((0.5,) * 3, (0.5,) * 3, 3), NAFLEX: ((0.5, 0.4, 0.5), (0.5, 0.5, 0.3), 2)}
"""Mean, deviation and filter of the families that have not Qwen2's."""


def spec_of(rule: NativeRule) -> NativeSpec:
    """The spec of a tower that reads pictures by the rule; only Qwen's tokens are joined of patches that stand together."""
    mean, std, resample = LOOKS.get(rule, (MEAN, STD, 3))
    shrink = rule.merge if rule.name == "qwen" else 1
    options = {"resample": resample, "frames": rule.frames, "multiple": rule.merge, "shrink": shrink}
    return NativeSpec(rule.unit, rule.patch, 0, "patch", rule.name, mean, std, **options)


def cut(size: Size, rule: NativeRule, decode: Literal["exact", "fast"] = "exact") -> tuple[np.ndarray, tuple[int, int, int]]:
    """The patches (P, 3, 1, p, p) of a picture, and their grid."""
    fitted, spec = fitted_size(size, rule), spec_of(rule)
    frame = resized(Picture.of(noise(size)), fitted, spec)
    return patches_of([frame], spec, DataConfig(image_decode=decode)).numpy(), patch_grid(fitted, rule)


def qwen(rule: NativeRule, **options: object) -> Qwen2VLImageProcessorPil:
    limits = {"shortest_edge": rule.min_pixels, "longest_edge": rule.max_pixels}
    return Qwen2VLImageProcessorPil(
        size=limits, patch_size=rule.patch, image_mean=spec_of(rule).mean, image_std=spec_of(rule).std, **options
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rule", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_qwen_pictures(size: Size, rule: NativeRule) -> None:
    ours, grid = cut(size, rule)
    theirs = qwen(rule)(noise(size), return_tensors="np")
    assert ours.dtype == np.float32 and ours.shape[2] == 1
    np.testing.assert_array_equal(theirs["image_grid_thw"][0], grid)
    np.testing.assert_array_equal(ours.repeat(2, axis=2).reshape(len(ours), -1), theirs["pixel_values"])


@pytest.mark.parametrize("size", SIZES)
def test_naflex_pictures(size: Size) -> None:
    ours, grid = cut(size, NAFLEX)
    processor = Siglip2ImageProcessorPil(max_num_patches=64, image_mean=LOOKS[NAFLEX][0], image_std=LOOKS[NAFLEX][1])
    theirs = processor(noise(size), return_tensors="np")
    np.testing.assert_array_equal(theirs["spatial_shapes"][0], grid[1:])
    assert theirs["pixel_attention_mask"][0].sum() == len(ours)
    rows = ours[:, :, 0].transpose(0, 2, 3, 1).reshape(len(ours), -1)  # theirs hold the channels of a pixel together
    np.testing.assert_array_equal(rows, theirs["pixel_values"][0, : len(ours)])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rule", [PIXTRAL, MISTRAL3], ids=["pixtral", "mistral3"])
def test_pixtral_pictures(size: Size, rule: NativeRule) -> None:
    ours, grid = cut(size, rule)
    theirs = PixtralImageProcessorPil(size={"longest_edge": rule.longest}, patch_size=rule.unit)(noise(size), return_tensors="np")
    side = rule.patch
    pixels = theirs["pixel_values"][0]
    places = [(row * side, column * side) for row in range(grid[1]) for column in range(grid[2])]
    wanted = [pixels[:, top : top + side, left : left + side] for top, left in places]
    assert pixels.shape == (3, grid[1] * side, grid[2] * side)
    np.testing.assert_array_equal(ours[:, :, 0], wanted)


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_clips_hold_two_frames_per_patch_and_the_last_one_again(frames: int) -> None:
    """The picture processor repeats each frame in time, so that its rows hold every frame's values at every place."""
    pictures = [noise((84, 56), seed=seed) for seed in range(frames)]
    found = patches_of(pictures, spec_of(QWEN2), DataConfig()).numpy()
    ours = (found.repeat(2, axis=2) if frames == 1 else found).reshape(-1, 24, 3, 2, 14, 14)
    processor = qwen(QWEN2, do_resize=False)
    alone = [processor(picture, return_tensors="np")["pixel_values"].reshape(24, 3, 2, 14, 14) for picture in pictures]
    assert len(ours) == -(-frames // 2) == patch_grid((84, 56), QWEN2, frames)[0]
    for t, rows in enumerate(ours):
        np.testing.assert_array_equal(rows[:, :, 0], alone[2 * t][:, :, 0])
        np.testing.assert_array_equal(rows[:, :, 1], alone[min(2 * t + 1, frames - 1)][:, :, 1])


@pytest.mark.parametrize("rule", [QWEN2, NAFLEX, PIXTRAL], ids=["qwen", "naflex", "pixtral"])
def test_bytes_are_those_that_the_values_are_made_of(rule: NativeRule) -> None:
    """A picture is stored once, however many frames a patch has."""
    (bytes_of, grid), (values, _) = cut((47, 65), rule, "fast"), cut((47, 65), rule)
    assert bytes_of.dtype == np.uint8 and bytes_of.shape == (np.prod(grid), 3, 1, rule.patch, rule.patch)
    mean, std = (np.array(value).reshape(3, 1, 1, 1) for value in (spec_of(rule).mean, spec_of(rule).std))
    np.testing.assert_allclose(values, (bytes_of / 255 - mean) / std, atol=1e-6)


def test_bytes_of_clips_hold_every_frame() -> None:
    pictures = [noise((56, 56), seed=seed) for seed in range(3)]
    rows = patches_of(pictures, spec_of(QWEN2), DataConfig(image_decode="fast")).numpy()
    assert rows.shape == (2 * 16, 3, 2, 14, 14) and rows.dtype == np.uint8
    np.testing.assert_array_equal(rows[0, :, 1], np.asarray(pictures[1])[:14, :14].transpose(2, 0, 1))


def test_a_picture_decoded_at_a_fraction_is_cut_from_its_box() -> None:
    half = Picture(noise((51, 40)), (101, 80), (0, 0, 50.5, 40))
    frame = resized(half, fitted_size(half.size, QWEN2), spec_of(QWEN2))
    assert frame.size == (112, 84)
    np.testing.assert_array_equal(np.asarray(frame), np.asarray(half.image.resize((112, 84), 3, half.box)))


def test_a_size_that_is_not_fitted_has_no_grid() -> None:
    with pytest.raises(ValueError, match="60 x 56 pixels are not whole tokens"):
        patch_grid((60, 56), QWEN2)
