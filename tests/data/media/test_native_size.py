"""Sizes, grids and numbers of tokens of pictures and clips equal those of the families' processors, whatever the size."""

import random
from dataclasses import replace

import numpy as np
import pytest
from transformers.image_utils import ChannelDimension
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from data.media.blob import MediaError
from data.media.native_size import ClipBudget, NativeRule, fitted_size, fitted_video_size, patch_grid

Size = tuple[int, int]
QWEN2 = NativeRule("qwen", 14, merge=2, frames=2, min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
QWEN3 = replace(QWEN2, patch=16, min_pixels=1 << 16, max_pixels=1 << 24)
SMALL = replace(QWEN2, min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 16)
NAFLEX = NativeRule("naflex", 16, max_patches=256)
PIXTRAL = NativeRule("pixtral", 16, longest=1024)
ODD = [
    (28, 1500),
    (1333, 777),
    (1, 1),
    (1, 200),
    (200, 1),
    (1, 201),
    (27, 29),
    (42, 70),
    (14, 14),
    (16, 16),
    (20_000, 15_000),
    (9000, 1),
]


def random_sizes(number: int) -> list[Size]:
    chance = random.Random(0)
    return [(int(2 ** chance.uniform(0, 13.5)), int(2 ** chance.uniform(0, 13.5))) for _ in range(number)]


SIZES = ODD + random_sizes(200)


def fitted(size: Size, rule: NativeRule) -> Size | None:
    """The size that we pick; None if the picture is refused."""
    try:
        return fitted_size(size, rule)
    except MediaError:
        return None


@pytest.mark.parametrize("rule", [QWEN2, QWEN3, SMALL], ids=["qwen2", "qwen3", "small"])
def test_qwen_sizes_grids_and_tokens(rule: NativeRule) -> None:
    limits = {"shortest_edge": rule.min_pixels, "longest_edge": rule.max_pixels}
    processor = Qwen2VLImageProcessorPil(size=limits, patch_size=rule.patch)
    refused = 0
    for width, height in SIZES:
        try:
            high, wide = smart_resize(height, width, rule.unit, rule.min_pixels, rule.max_pixels)
        except ValueError:
            refused += 1
            assert fitted((width, height), rule) is None, (width, height)
            continue
        assert fitted((width, height), rule) == (wide, high), (width, height)
        grid = patch_grid((wide, high), rule)
        assert grid == (1, high // rule.patch, wide // rule.patch)
        assert np.prod(grid) == processor.get_number_of_image_patches(height, width)
    assert 10 < refused < 60


@pytest.mark.parametrize("most", [256, 1024, 1, 7])
def test_naflex_sizes(most: int) -> None:
    rule = replace(NAFLEX, max_patches=most)
    for width, height in SIZES:
        high, wide = get_image_size_for_max_num_patches(height, width, 16, most)
        assert fitted((width, height), rule) == (wide, high), (width, height)
        assert np.prod(patch_grid((wide, high), rule)) <= most


def test_naflex_patches_that_are_merged_fit_as_larger_patches_do() -> None:
    merged, larger = replace(NAFLEX, merge=2), replace(NAFLEX, patch=32, max_patches=64)
    assert [fitted(size, merged) for size in SIZES] == [fitted(size, larger) for size in SIZES]


@pytest.mark.parametrize(("longest", "patch", "merge"), [(1024, 16, 1), (1540, 14, 2), (100, 14, 1)])
def test_pixtral_sizes(longest: int, patch: int, merge: int) -> None:
    """Mistral 3's processor passes the side of a token as patch_size."""
    rule = replace(PIXTRAL, longest=longest, patch=patch, merge=merge)
    for width, height in SIZES:
        picture = np.broadcast_to(np.uint8(0), (3, height, width))
        high, wide = get_resize_output_image_size(picture, longest, patch * merge, ChannelDimension.FIRST)
        assert fitted((width, height), rule) == ((wide, high) if min(wide, high) else None), (width, height)


CLIPS = [
    ((1, 1), 9, ClipBudget(100352, 602112, False, 200), (336, 336)),
    ((28, 1500), 768, ClipBudget(4096, 25165824, False, 200), (28, 476)),
    ((1333, 777), 9, ClipBudget(100352, 602112, False, 128000), (1008, 588)),
    ((1333, 777), 1, ClipBudget(100352, 602112, False, 0), (1008, 588)),
    ((640, 360), 100, ClipBudget(100352, 602112, False, 0), (644, 364)),
    ((1920, 1080), 3, ClipBudget(4096, 25165824, False, 0), (1932, 1092)),
    ((31, 33), 9, ClipBudget(1024, 4000, False, 200), (56, 56)),
    ((3840, 2160), 100, ClipBudget(100352, 602112, False, 128000), (1008, 560)),
    ((200, 1), 2, ClipBudget(4096, 25165824, False, 0), (924, 28)),
    ((90, 70), 1, ClipBudget(100352, 602112, False, 200), (364, 280)),
    ((201, 1), 2, ClipBudget(4096, 25165824, False, 0), None),
    ((1, 1), 9, ClipBudget(131072, 786432, True, 0), (128, 128)),
    ((1, 1), 5, ClipBudget(131072, 786432, True, 0), (192, 192)),
    ((28, 1500), 1, ClipBudget(4096, 25165824, True, 0), None),
    ((28, 1500), 768, ClipBudget(4096, 25165824, True, 0), (32, 1312)),
    ((1333, 777), 2, ClipBudget(131072, 786432, True, 768), (800, 448)),
    ((1333, 777), 768, ClipBudget(131072, 786432, True, 768), (480, 256)),
    ((640, 360), 9, ClipBudget(131072, 786432, True, 200), (480, 256)),
    ((1920, 1080), 768, ClipBudget(4096, 25165824, True, 0), (224, 128)),
    ((31, 33), 5, ClipBudget(1024, 4000, True, 0), (32, 32)),
    ((3840, 2160), 5, ClipBudget(131072, 786432, True, 0), (512, 288)),
    ((200, 1), 3, ClipBudget(4096, 25165824, True, 200), (6400, 32)),
    ((90, 70), 9, ClipBudget(131072, 786432, True, 200), (160, 128)),
]
"""Size, frames and what transformers 5.23's Qwen2VLVideoProcessor (not shared) and Qwen3VLVideoProcessor (shared) made of them.

Written down, as their modules are not importable without torchvision.
"""


@pytest.mark.parametrize(("size", "frames", "budget", "wanted"), CLIPS)
def test_clip_sizes(size: Size, frames: int, budget: ClipBudget, wanted: Size | None) -> None:
    rule = QWEN3 if budget.shared else QWEN2
    if wanted is None:
        with pytest.raises(MediaError):
            fitted_video_size(size, frames, rule, budget)
    else:
        assert fitted_video_size(size, frames, rule, budget) == wanted


def test_clips_without_a_shared_budget_are_sized_as_their_frames() -> None:
    rule = replace(QWEN2, min_pixels=128 * 28 * 28, max_pixels=768 * 28 * 28)
    for size in SIZES:
        if (wanted := fitted(size, rule)) is not None:
            assert fitted_video_size(size, 3, rule, ClipBudget(rule.min_pixels, rule.max_pixels)) == wanted


@pytest.mark.parametrize(("frames", "wanted"), [(1, 1), (2, 1), (3, 2), (5, 3)])
def test_a_part_of_a_patch_of_time_counts(frames: int, wanted: int) -> None:
    assert patch_grid((56, 84), QWEN2, frames) == (wanted, 6, 4)


@pytest.mark.parametrize(
    ("size", "rule", "reason"),
    [
        ((1, 201), QWEN2, "1 x 201 pixels: one side is 201 times the other; this model's processor allows 200"),
        ((3000, 1), PIXTRAL, "3000 x 1 pixels are too narrow"),
        ((0, 5), NAFLEX, "0 x 5 pixels is empty"),
        ((5, 5), replace(NAFLEX, max_patches=0), "do not fit into 0 patches"),
        ((5, 5), replace(QWEN2, min_pixels=0), "less than one token"),
    ],
)
def test_refusals_say_why(size: Size, rule: NativeRule, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        fitted_size(size, rule)


def test_a_size_that_is_not_fitted_has_no_grid() -> None:
    with pytest.raises(ValueError, match="57 x 56 pixels are not whole tokens of 28 pixels"):
        patch_grid((57, 56), QWEN2)


def test_a_clip_without_frames_or_with_half_a_patch_is_refused() -> None:
    with pytest.raises(MediaError, match="0 frames"):
        fitted_video_size((56, 56), 0, QWEN2, ClipBudget(1, 10**6))
    with pytest.raises(MediaError, match="a clip of 1 frames: this model's processor needs 2"):
        fitted_video_size((56, 56), 1, QWEN3, ClipBudget(1, 10**6, shared=True))
