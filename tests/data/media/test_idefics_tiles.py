"""Split grids and views equal those of Idefics3's and SmolVLM's processors, to the bit."""

import random

import numpy as np
import pytest
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from data.media.blob import MediaError
from data.media.idefics_tiles import idefics_plan, idefics_views
from data.media.image_decode import Picture
from tests.support.pictures import noise

Size = tuple[int, int]
ODD = [(28, 1500), (1333, 777), (1, 1), (64, 64), (300, 2), (63, 65)]


@pytest.mark.parametrize("size", ODD)
@pytest.mark.parametrize(("longest", "tile"), [(256, 64), (100, 64), (101, 101), (64, 64)])
@pytest.mark.parametrize("split", [True, False])
def test_views(size: Size, longest: int, tile: int, split: bool) -> None:
    kind = SmolVLMImageProcessorPil if longest == 256 else Idefics3ImageProcessorPil
    raw = {"do_rescale": False, "do_normalize": False}
    processor = kind(size={"longest_edge": longest}, max_image_size={"longest_edge": tile}, do_image_splitting=split, **raw)
    theirs = processor(noise(size), return_row_col_info=True, return_tensors="np")
    plan = idefics_plan(size, longest, tile, split=split)
    views = idefics_views(Picture.of(noise(size)), plan)
    assert ([[plan.rows]], [[plan.cols]]) == (theirs["rows"], theirs["cols"])
    np.testing.assert_array_equal(np.stack([np.asarray(view).transpose(2, 0, 1) for view in views]), theirs["pixel_values"][0])


@pytest.mark.parametrize(("longest", "tile"), [(1456, 364), (1536, 384), (2048, 512)])
def test_grids_of_published_settings(longest: int, tile: int) -> None:
    processor, chance = Idefics3ImageProcessorPil(), random.Random(0)
    sizes = ODD + [(int(2 ** chance.uniform(0, 13.5)), int(2 ** chance.uniform(0, 13.5))) for _ in range(200)]
    settings = {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": tile}}
    for width, height in sizes:
        plan = idefics_plan((width, height), longest, tile)
        assert (plan.rows * plan.cols + 1, plan.rows, plan.cols) == processor.get_number_of_image_patches(height, width, settings)


def test_no_side_exceeds_the_most_that_the_processors_make() -> None:
    processor = Idefics3ImageProcessorPil(size={"longest_edge": 5000}, max_image_size={"longest_edge": 4096}, do_rescale=False)
    plan = idefics_plan((60, 3), 5000, 4096)
    assert (plan.rows, plan.cols, plan.first, plan.size) == (0, 0, (4096, 204), (4096, 4096))
    picture = np.zeros((3, 3, 60), dtype=np.uint8)
    assert processor.resize(picture, processor.size, 0).shape == (3, 204, 4096)


def test_an_empty_picture_is_refused() -> None:
    with pytest.raises(MediaError, match="0 x 4 pixels is empty"):
        idefics_plan((0, 4), 64, 64)


def test_a_picture_that_rounding_leaves_nothing_of_is_refused_as_the_processor_fails() -> None:
    """49 * (1 / 49) is less than one: 0 pixels wide. No published setting is such a number."""
    with pytest.raises(MediaError, match="1 x 49 pixels are too narrow"):
        idefics_plan((1, 49), 49, 49)
    with pytest.raises(ValueError, match="size must be a dictionary"):
        Idefics3ImageProcessorPil(size={"longest_edge": 49}, max_image_size={"longest_edge": 49})(noise((1, 49)))
