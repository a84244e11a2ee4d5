"""Budgets of pixels are kept, and within them sizes are those that the families' processors pick."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from transformers.image_utils import ChannelDimension
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from data.config import DataConfig
from data.index.token_estimate import least_tokens, media_bytes, media_tokens
from data.media.blob import MediaError
from data.media.pixel_budget import check_budgets, clip_size, largest_meta, picture_size
from model.errors import ConfigError
from model.media_spec import ImageSpec, NativeSpec, num_tokens

GREY: dict[str, Any] = {"size": 28, "num_prefix": 0, "select": "patch", "mean": (0.5,) * 3, "std": (0.5,) * 3}
QWEN = NativeSpec(
    patch=14, resize="qwen", shrink=2, multiple=2, frames=2, min_pixels=56 * 56, max_pixels=28 * 28 * 1280, axes=3, **GREY
)
SHARED = replace(QWEN, video_pixels=(4096, 25_165_824))
NAFLEX = NativeSpec(patch=16, resize="naflex", max_patches=256, **GREY)
PIXTRAL = NativeSpec(patch=16, resize="pixtral", longest=1024, **GREY)


def native(**settings: Any) -> DataConfig:
    return DataConfig(image_fit="native", **settings)


def sizes(number: int) -> list[tuple[int, int]]:
    chance = random.Random(3)
    found = [(int(2 ** chance.uniform(0, 12)), int(2 ** chance.uniform(0, 12))) for _ in range(2 * number)]
    return [size for size in found if max(size) <= 200 * min(size)][:number]


@pytest.mark.parametrize(("least", "most"), [(0, 0), (0, 28 * 28 * 64), (28 * 28 * 9, 28 * 28 * 9), (100_000, 0)])
def test_a_picture_has_the_size_that_its_processor_picks_within_the_budget(least: int, most: int) -> None:
    config = native(fit_min_pixels=least, fit_max_pixels=most)
    limits = {"min_pixels": least or QWEN.min_pixels, "max_pixels": most or QWEN.max_pixels}
    for width, height in sizes(200):
        assert picture_size((width, height), QWEN, config, 3) == smart_resize(height, width, factor=28, **limits)[::-1]


def test_other_families_are_told_in_their_own_terms() -> None:
    config = native(fit_max_pixels=100 * 256 + 255)
    for width, height in sizes(200):
        rows = get_image_size_for_max_num_patches(height, width, patch_size=16, max_num_patches=100)
        assert picture_size((width, height), NAFLEX, config, 1) == rows[::-1]
        if max(width, height) < 160 * min(width, height):
            blank = np.broadcast_to(np.zeros(1), (3, height, width))
            rows = get_resize_output_image_size(blank, 160, 16, ChannelDimension.FIRST)
            assert picture_size((width, height), PIXTRAL, config, 1) == rows[::-1]


@pytest.mark.parametrize("spec", [QWEN, NAFLEX, PIXTRAL], ids=["qwen", "naflex", "pixtral"])
@pytest.mark.parametrize("budget", [3136 * 5, 200_000])
def test_pictures_of_a_record_stay_within_its_budget(spec: NativeSpec, budget: int) -> None:
    config, chance, found = native(record_max_pixels=budget), random.Random(1), sizes(200)
    kept = 0
    for count in (1, 2, 5, 19):
        for _ in range(60):
            record = chance.sample(found, count)
            try:
                fitted = [picture_size(size, spec, config, count) for size in record]
                plain = [picture_size(size, spec, native(), count) for size in record]
            except MediaError as error:  # a strip of which nothing would be left
                assert spec is PIXTRAL and "too narrow" in str(error)
                continue
            assert sum(map(math.prod, fitted)) <= budget
            share = [(ours, own) for ours, own in zip(fitted, plain) if math.prod(own) <= budget // count]
            assert all(ours == own for ours, own in share)
            kept += 1
    assert kept > 100
    with pytest.raises(MediaError, match=rf"^100 pictures share data.record_max_pixels = {budget}: {budget // 100} pixels"):
        picture_size((999, 999), replace(spec, patch=56), config, 100)


@pytest.mark.parametrize("spec", [QWEN, SHARED], ids=["per frame", "shared"])
def test_frames_of_a_video_stay_within_its_budget(spec: NativeSpec) -> None:
    budget = 28 * 28 * 60
    for width, height in sizes(200):
        for count in (2, 3, 5, 16):
            size = clip_size((width, height), count, spec, native(video_max_pixels=budget))
            own = clip_size((width, height), count, spec, native())
            padded = count + count % 2
            assert math.prod(size) * padded <= budget and (size == own or math.prod(own) * padded > budget)
            if spec is QWEN:
                limits = {"min_pixels": QWEN.min_pixels, "max_pixels": QWEN.max_pixels}
                assert own == smart_resize(height, width, factor=28, **limits)[::-1]


def test_what_nobody_measured_is_planned_within_the_budgets() -> None:
    config = native(fit_max_pixels=28 * 28 * 100, video_max_pixels=28 * 28 * 160, max_frames=5, min_frames=3)
    usual = media_tokens({"image": QWEN}, config)
    assert usual == {"image": 88, "video": 3 * 20, "audio": 0}  # 11 x 8 tokens; 5 x 4 in each of three pairs
    assert least_tokens({"image": QWEN}, config) == {"image": 1, "video": 2, "audio": 0}
    assert media_bytes({"image": QWEN}, config) == {"image": 88 * 4 * 588 * 4, "video": 60 * 4 * 1176 * 4, "audio": 0}
    assert num_tokens(QWEN, largest_meta(QWEN, config, 4000)) == 100
    assert num_tokens(QWEN, largest_meta(QWEN, config, 50)) == 49


@pytest.mark.parametrize(
    ("settings", "spec", "reason"),
    [
        ({"fit_max_pixels": 783}, QWEN, "data.fit_max_pixels = 783 is less than 784: as many are one token"),
        ({"record_max_pixels": 9}, NAFLEX, "data.record_max_pixels = 9 is less than 196"),
        ({"video_max_pixels": 783 * 16}, QWEN, "less than 12544: as many are one token of each of data.max_frames = 16"),
        ({"fit_min_pixels": 900}, PIXTRAL, "data.fit_min_pixels = 900 has no effect: this model's processor has no least size"),
        ({"fit_max_pixels": 2000}, QWEN, "data.fit_max_pixels = 2000 is less than 3136, .* lower data.fit_min_pixels too"),
        ({"fit_min_pixels": 2_000_000}, QWEN, "data.fit_min_pixels = 2000000 is more than 1003520, .* raise data.fit_max_pixels"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_named(settings: dict[str, int], spec: NativeSpec, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_budgets(native(**settings), {"image": replace(spec, patch=14)})
    check_budgets(native(), {"image": spec})
    check_budgets(native(**settings), {"image": ImageSpec(patch=14, resize="exact", **GREY)})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"image_fit": "native", "fit_max_pixels": -1}, r"data.fit_max_pixels = -1 is negative; 0 leaves it to the model's own"),
        ({"image_fit": "pad", "record_max_pixels": 5}, r"data.record_max_pixels = 5 has no effect with data.image_fit = 'pad'"),
        ({"image_fit": "native", "fit_min_pixels": 9, "fit_max_pixels": 4}, r"data.fit_max_pixels = 4 is less than data.fit_min"),
    ],
)
def test_nonsense_in_the_run_file_is_named(settings: dict[str, Any], reason: str) -> None:
    (problem,) = DataConfig(**settings).problems()
    assert problem.startswith(reason)
