"""Pictures in tiles of their own aspect: transformers' LLaVA-NeXT and OneVision choose, cut, unpad, shrink and compute alike."""

from __future__ import annotations

import io
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import LlavaNextProcessor, LlavaOnevisionProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from data.config import DataConfig
from data.index.token_estimate import media_tokens
from data.media import image
from data.media.blob import Blob
from data.media.tiling import best_anyres_grid, grids, plan_anyres
from data.records.record import MediaRef
from model.batch import Media
from model.errors import ConfigError
from model.media_spec import ImageSpec, MediaMeta, num_tokens, row_width, token_rows, token_weights
from model.splice import placeholder_rows
from model.tile_tokens import tile_map
from tests.support.anyres import NEXT, ONEVISION, SIZES, pinpoints

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SPEC = ImageSpec(20, 5, 1, "patch", "shortest_edge", MEAN, STD, newline=True)
SIDES = st.integers(1, 3000)


def config(shrink: int = 0, **settings: Any) -> DataConfig:
    """LLaVA-NeXT's grids, or OneVision's with tokens of `shrink` tiles."""
    return DataConfig(image_fit="anyres", image_grid=("1x1...4x4",) if shrink else (), anyres_max=shrink, **settings)


def picture(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(size[0] * size[1]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def loaded(data: bytes, settings: DataConfig, num_media: int = 1, spec: ImageSpec = SPEC) -> tuple[MediaMeta, Tensor]:
    blob, ref = Blob("memory", data=data), MediaRef("image", "memory")
    meta = image.measure(blob, ref, spec, settings, num_media)
    return meta, image.load(blob, ref, spec, settings, meta)


def their_count(size: tuple[int, int], shrink: int, spec: ImageSpec) -> int:
    """By the processors' own arithmetic, without an image."""
    kind: Any = LlavaOnevisionProcessor if shrink else LlavaNextProcessor
    facts = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints(ONEVISION if shrink else NEXT, spec.size)),
        patch_size=spec.patch,
        num_additional_image_tokens=0,
        num_image_tokens=(spec.size // spec.patch) ** 2,
        vision_aspect_ratio=f"anyres_max_{shrink}",
    )
    facts._get_unpadded_features = partial(kind._get_unpadded_features, facts)
    return kind._get_number_of_features(facts, size[1], size[0], spec.size, spec.size)


def their_tokens(features: Tensor, size: tuple[int, int], shrink: int, newline: Tensor, spec: ImageSpec) -> Tensor:
    """The tokens that transformers makes of the projected features (n, L, D) of one picture."""
    tower = SimpleNamespace(image_size=spec.size, patch_size=spec.patch)
    facts = SimpleNamespace(
        config=SimpleNamespace(vision_config=tower, image_grid_pinpoints=pinpoints(ONEVISION if shrink else NEXT, spec.size))
    )
    options: Any = {"image_newline": newline}
    if shrink:
        kind, options["vision_aspect_ratio"] = LlavaOnevisionModel, f"anyres_max_{shrink}"
    else:
        kind, options["vision_feature_select_strategy"] = LlavaNextModel, "default"
    found, _ = kind.pack_image_features(facts, [features], [(size[1], size[0])], **options)
    return found[0]


def vanishes(meta: MediaMeta, spec: ImageSpec) -> bool:
    """Whether the map is so narrow that transformers shrinks it to no line or no column, and then fails."""
    tiles = tile_map(meta.size, meta.grid, spec.size // spec.patch, meta.max_tiles)
    return tiles.is_shrunk and min(tiles.lines, tiles.columns) < 4


def our_tokens(features: Tensor, meta: MediaMeta, newline: Tensor, spec: ImageSpec) -> Tensor:
    rows, weights = token_rows(spec, meta, row_width(spec)), token_weights(spec, meta)
    rows = np.where(rows < 0, len(features) * features.shape[1] - 1 - rows, rows)
    media = Media(
        features, torch.from_numpy(rows), torch.arange(len(rows)), weights=None if weights is None else torch.from_numpy(weights)
    )
    return placeholder_rows(torch.cat([features.flatten(0, 1), newline[None]]), media)


@given(size=st.tuples(SIDES, SIDES), side=st.sampled_from([20, 336, 384]), grid=st.sampled_from([NEXT, ONEVISION]))
def test_the_grid_is_the_one_that_transformers_chooses(size: tuple[int, int], side: int, grid: list[tuple[int, int]]) -> None:
    down, across = select_best_resolution((size[1], size[0]), pinpoints(grid, side))
    assert best_anyres_grid(size, side, tuple(grid)) == (across // side, down // side)


@given(size=st.tuples(SIDES, SIDES), geometry=st.sampled_from([(20, 5), (336, 14), (384, 14)]), shrink=st.sampled_from([0, 3, 9]))
def test_as_many_tokens_as_the_processors_count(size: tuple[int, int], geometry: tuple[int, int], shrink: int) -> None:
    spec = ImageSpec(*geometry, 1, "patch", "exact", MEAN, STD, newline=True)
    meta = plan_anyres(size, spec.size, config(shrink))
    assume(not vanishes(meta, spec))
    expected = their_count(size, shrink, spec)
    rows, weights = token_rows(spec, meta, row_width(spec)), token_weights(spec, meta)
    assert num_tokens(spec, meta) == len(rows) == expected
    assert rows.min() >= -1 and rows.max() < meta.num_rows * row_width(spec)
    assert (weights is None) == (rows.ndim == 1) and (weights is None or rows.shape == weights.shape == (expected, 4))


@settings(max_examples=60, deadline=None)
@given(size=st.tuples(st.integers(1, 300), st.integers(1, 300)), shrink=st.sampled_from([0, 1, 2, 3]))
def test_tokens_are_packed_as_transformers_packs_them(size: tuple[int, int], shrink: int) -> None:
    meta = plan_anyres(size, SPEC.size, config(shrink))
    generator = torch.Generator().manual_seed(size[0])
    features, newline = torch.randn(meta.num_rows, 16, 7, generator=generator), torch.randn(7, generator=generator)
    assume(not vanishes(meta, SPEC))
    expected = their_tokens(features, size, shrink, newline, SPEC)
    torch.testing.assert_close(our_tokens(features, meta, newline, SPEC), expected, rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(size=st.tuples(st.integers(1, 200), st.integers(1, 200)), shrink=st.sampled_from([0, 3]))
def test_pixels_equal_transformers_to_the_bit(size: tuple[int, int], shrink: int) -> None:
    square = {"height": 20, "width": 20}
    points = pinpoints(ONEVISION if shrink else NEXT, 20)
    processor: Any = LlavaNextImageProcessorPil(size={"shortest_edge": 20}, crop_size=square, image_grid_pinpoints=points)
    if shrink:
        processor = LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=points, image_mean=MEAN, image_std=STD)
    data = picture(size)
    expected = processor(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"][0]
    meta, ours = loaded(data, config(shrink))
    assert torch.equal(ours, expected) and len(ours) == meta.num_rows


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_line_break_ends_every_line_and_every_other_picture(size: tuple[int, int]) -> None:
    meta, pixels = loaded(picture(size), config())
    rows = token_rows(SPEC, meta, 16)
    assert rows[:16].tolist() == list(range(16)) and rows[-1] == -1
    lines = np.split(rows[16:], np.flatnonzero(rows[16:] < 0) + 1)[:-1]
    assert len({len(line) for line in lines}) == 1 and len(pixels) == meta.num_rows
    of_tiles = rows[16:][rows[16:] >= 0]
    assert (of_tiles >= 16).all() and len(set(of_tiles)) == len(of_tiles)  # none of the base view, none twice
    several, padded = loaded(picture(size), config(), num_media=2)
    assert several == MediaMeta() and token_rows(SPEC, several, 16).tolist() == [*range(16), -1]
    assert torch.equal(padded, loaded(picture(size), DataConfig(image_fit="pad"))[1])
    assert token_rows(SPEC, MediaMeta(num_rows=3), 16).tolist() == [*range(48), -1]  # a video of three frames


@pytest.mark.parametrize("size", [(90, 31), (641, 480), (100, 1500)])
def test_bytes_of_a_fast_decode_are_the_same_views(size: tuple[int, int]) -> None:
    meta, exact = loaded(picture(size), config())
    again, fast = loaded(picture(size), config(image_decode="fast"))
    assert again == meta and fast.dtype == torch.uint8
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    torch.testing.assert_close((fast / 255 - mean) / std, exact, rtol=0, atol=1e-5)
    buffer = io.BytesIO()
    gradient = Image.radial_gradient("L").convert("RGB").resize(size)
    gradient.save(buffer, "JPEG", quality=95)
    meta, exact = loaded(buffer.getvalue(), config())
    drafted = loaded(buffer.getvalue(), config(image_decode="fast"))[1]
    assert meta.size == size and len(drafted) == meta.num_rows
    assert float(((drafted / 255 - mean) / std - exact).abs().mean()) < 0.05


def test_sums_leave_single_rows_beside_them_as_they_are() -> None:
    meta = plan_anyres((80, 80), 20, config(2))
    weights = token_weights(SPEC, meta)
    assert weights is not None
    torch.testing.assert_close(torch.from_numpy(weights).sum(1), torch.ones(len(weights)))
    features = torch.randn(17, 16, 8, dtype=torch.bfloat16)
    found = our_tokens(features, meta, newline := torch.randn(8, dtype=torch.bfloat16), SPEC)
    assert found.dtype == torch.bfloat16 and torch.equal(found[:16], features[0]) and torch.equal(found[-1], newline)


def test_several_pictures_that_are_grids_of_other_towers_are_refused() -> None:
    assert grids(("2x1", (40, 40), "1x2...2x2"), 20) == ((2, 1), (2, 2), (1, 2))
    with pytest.raises(ConfigError, match=r"data\.image_grid\.1 = \[336, 672\] is not made of .* 20 x 20"):
        media_tokens({"image": SPEC}, DataConfig(image_fit="anyres", image_grid=("1x1", (336, 672))))
    assert media_tokens({"image": SPEC}, config())["image"] in (16 + 4 * 13, 16 + 12 * 5)  # three tiles and their breaks


@pytest.mark.parametrize(
    "values,problem",
    [
        ({"image_grid": ("2x2",)}, "data.image_grid = ['2x2'] has no effect unless data.image_fit = 'anyres'"),
        ({"anyres_max": 9}, "data.anyres_max = 9 has no effect unless"),
        ({"image_fit": "anyres", "anyres_max": -1}, "data.anyres_max = -1 is negative"),
        ({"image_fit": "anyres", "max_tiles": 4}, "data.max_tiles = 4 has no effect unless data.image_fit = 'tiles'"),
        ({"image_fit": "anyres", "image_grid": ("2by2",)}, "data.image_grid.0 = '2by2' is no grid"),
        ({"image_fit": "anyres", "image_grid": ("0x2",)}, "data.image_grid.0 = '0x2' is no grid"),
        ({"image_fit": "anyres", "image_grid": ("2x2...1x3",)}, "data.image_grid.0 = '2x2...1x3' is no grid"),
        (
            {"image_fit": "anyres", "image_grid": ("2x2", "1x1...17x17")},
            "data.image_grid.1 = '1x1...17x17' has more than 256 tiles",
        ),
        ({"image_fit": "anyres", "image_grid": ((0, 336),)}, "data.image_grid.0 = [0, 336] is not [width, height]"),
    ],
)
def test_contradictions_are_named(values: dict[str, Any], problem: str) -> None:
    found = DataConfig(**values).problems()
    assert len(found) == 1 and problem in found[0]
    assert not DataConfig(image_fit="anyres", image_grid=("1x1...6x6", (672, 336)), anyres_max=9).problems()
