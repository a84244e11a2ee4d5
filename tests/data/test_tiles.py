"""Dynamic tiling: the grids of InternVL, the pixels of Hugging Face's processor, and never more rows than were promised."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import GotOcr2ImageProcessorPil

from data.config import DataConfig
from data.media import image
from data.media.blob import Blob
from data.media.tiling import best_tile_grid, budget, candidates, plan_tiles
from data.records.record import MediaRef
from model.media_spec import ImageSpec, MediaMeta, num_tokens

SPEC = ImageSpec(20, 10, 1, "patch", "shortest_edge", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIDES = st.integers(1, 4000)


def picture(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def rows(data: bytes, num_media: int = 1, **config: object) -> tuple[MediaMeta, torch.Tensor]:
    blob, ref, settings = Blob("memory", data=data), MediaRef("image", "memory"), DataConfig(image_fit="tiles", **config)  # type: ignore[arg-type]
    meta = image.measure(blob, ref, SPEC, settings, num_media)
    return meta, image.load(blob, ref, SPEC, settings, meta)


@pytest.mark.parametrize(
    "size,max_tiles,grid,num_rows",
    [
        ((640, 480), 12, (4, 3), 13),
        ((1920, 1080), 12, (4, 2), 9),
        ((448, 448), 12, (1, 1), 1),
        ((100, 100), 12, (1, 1), 1),
        ((2000, 2000), 12, (3, 3), 10),
        ((800, 400), 12, (2, 1), 3),
        ((1200, 600), 12, (2, 1), 3),
        ((1300, 650), 12, (4, 2), 9),  # of the same aspect as 2 x 1, and more than half the pixels of eight tiles
        ((640, 480), 6, (3, 2), 7),
    ],
)
def test_golden_grids_of_internvl(size: tuple[int, int], max_tiles: int, grid: tuple[int, int], num_rows: int) -> None:
    assert plan_tiles(size, 448, 1, max_tiles, True) == MediaMeta(num_rows, grid=grid)
    assert plan_tiles(size, 448, 1, max_tiles, False).num_rows == grid[0] * grid[1]


def test_candidates_are_as_many_as_internvls_and_in_a_fixed_order() -> None:
    assert (len(candidates(1, 12)), len(candidates(1, 6))) == (35, 14)
    assert candidates(1, 4) == ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1))
    assert candidates(3, 4) == ((1, 3), (3, 1), (1, 4), (2, 2), (4, 1))


@given(width=SIDES, height=SIDES, least=st.integers(1, 14), most=st.integers(1, 14), side=st.integers(1, 500), n=st.integers(1, 9))
def test_a_grid_is_a_nearest_candidate_within_the_budget(width: int, height: int, least: int, most: int, side: int, n: int) -> None:
    cap = budget(most, n)
    across, down = best_tile_grid((width, height), side, least, cap)
    assert min(least, cap) <= across * down <= cap
    distances = [abs(width / height - i / j) for i, j in candidates(min(least, cap), cap)]
    assert abs(width / height - across / down) == min(distances)
    assert n * cap <= max(most, n)  # all pictures of a sample together
    meta = plan_tiles((width, height), side, least, cap, True)
    assert meta.num_rows == (across * down + 1 if across * down > 1 else 1)


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 200), height=st.integers(1, 200), least=st.integers(1, 3), most=st.integers(3, 12))
def test_tiles_equal_hugging_face_to_the_bit(width: int, height: int, least: int, most: int) -> None:
    processor = GotOcr2ImageProcessorPil(
        size={"height": 20, "width": 20}, crop_to_patches=True, min_patches=least, max_patches=most
    )
    data = picture(width, height)
    expected = processor(Image.open(io.BytesIO(data)), return_tensors="pt")["pixel_values"]
    meta, ours = rows(data, min_tiles=least, max_tiles=most)
    assert torch.equal(ours, expected) and len(ours) == meta.num_rows
    assert num_tokens(SPEC, meta) == 4 * len(ours)


def test_tiles_go_row_by_row_and_the_thumbnail_comes_last() -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (250, 0, 250), (0, 250, 250)]
    whole = Image.new("RGB", (60, 40))
    for i, colour in enumerate(colours):
        whole.paste(colour, (i % 3 * 20, i // 3 * 20, i % 3 * 20 + 20, i // 3 * 20 + 20))
    buffer = io.BytesIO()
    whole.save(buffer, "PNG")
    meta, ours = rows(buffer.getvalue(), max_tiles=6)
    assert meta == MediaMeta(7, grid=(3, 2)) and ours.shape == (7, 3, 20, 20)
    for row, colour in zip(ours, colours):
        expected = (torch.tensor(colour) / 255 - torch.tensor(SPEC.mean)) / torch.tensor(SPEC.std)
        torch.testing.assert_close(row, expected[:, None, None].expand(3, 20, 20), atol=1e-6, rtol=0)
    assert len(ours[6].unique()) > 6
    assert torch.equal(rows(buffer.getvalue(), max_tiles=6, thumbnail=False)[1], ours[:6])


def test_several_pictures_share_the_tiles_of_a_sample() -> None:
    data = picture(120, 80)
    assert [rows(data, n, max_tiles=12)[0].num_rows for n in (1, 2, 4, 12, 50)] == [7, 7, 3, 1, 1]
    assert rows(data, 50, min_tiles=4, max_tiles=12)[0].num_rows == 1


def test_the_grid_is_that_of_the_upright_picture() -> None:
    tag = Image.Exif()
    tag[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (60, 20), "white").save(buffer, "JPEG", exif=tag)
    meta, ours = rows(buffer.getvalue(), max_tiles=6)
    assert meta.grid == (1, 3) and ours.shape == (4, 3, 20, 20)


@pytest.mark.parametrize(
    "config,problem",
    [
        ({"max_tiles": 12}, "data.max_tiles = 12 has no effect unless data.image_fit = 'tiles'"),
        ({"min_tiles": 2}, "data.min_tiles = 2 has no effect unless"),
        ({"thumbnail": False}, "data.thumbnail = false has no effect unless"),
        ({"image_fit": "tiles"}, "cuts nothing with data.max_tiles = 1"),
        ({"image_fit": "tiles", "min_tiles": 4, "max_tiles": 3}, "data.min_tiles = 4 is not in [1, data.max_tiles = 3]"),
        ({"image_fit": "tiles", "min_tiles": 0, "max_tiles": 3}, "data.min_tiles = 0 is not in"),
        ({"image_fit": "tiles", "max_tiles": 257}, "data.max_tiles = 257 is more than 256"),
    ],
)
def test_contradictions_are_named(config: dict[str, object], problem: str) -> None:
    found = DataConfig(**config).problems()  # type: ignore[arg-type]
    assert len(found) == 1 and problem in found[0]
    assert not DataConfig(image_fit="tiles", min_tiles=2, max_tiles=6, thumbnail=False).problems()
