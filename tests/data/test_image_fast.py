"""What fast decoding costs: rounding alone, but for large JPEGs, whose pixels stand where they should."""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from model.media_spec import ImageSpec
from model.vision.normalise import normalised
from tests.support.pictures import CLIP, SIGLIP, SIZES, encoded, loaded, noise


def fast(data: bytes, spec: ImageSpec = CLIP, fit: str = "pad") -> Tensor:
    pixels = loaded(data, spec, image_fit=fit, image_decode="fast")
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, spec.size, spec.size)
    return normalised(pixels[None], spec, torch.float32)[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spec,fit", [(CLIP, "pad"), (CLIP, "square"), (SIGLIP, "pad"), (SIGLIP, "square"), (CLIP, "tiles")])
def test_fast_is_exact_but_for_rounding_where_no_jpeg_is_scaled(size: tuple[int, int], spec: ImageSpec, fit: str) -> None:
    config = {"image_fit": fit, "max_tiles": 4 if fit == "tiles" else 1}
    for data in (encoded(noise((size[0] * 3, size[1] * 3)), "PNG"), encoded(noise((25, 19)), "JPEG")):
        sent = loaded(data, spec, image_decode="fast", **config)
        exact = loaded(data, spec, **config)
        torch.testing.assert_close(normalised(sent[None], spec, torch.float32)[0], exact, atol=1e-6, rtol=0)


@cache
def scene(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Like a photograph: edges and shades of every size, the finer the weaker."""
    random, layers = np.random.default_rng(seed), np.zeros((size[1], size[0], 3))
    for cells in (3, 6, 12, 24, 48, 96, 192):
        layer = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        layers += (np.asarray(layer.resize(size, Image.Resampling.BICUBIC), dtype=float) - 128) * 2 / cells**0.5
    return Image.fromarray((128 + layers).clip(0, 255).astype(np.uint8))


def shift(exact: Tensor, other: Tensor) -> Tensor:
    """By how many pixels (right, down) `other` is moved against `exact`, both (3, S, S): least squares over the slopes."""
    down, right = torch.gradient(exact, dim=(1, 2))
    slopes = torch.stack([right.flatten(), down.flatten()], dim=1)
    return torch.linalg.lstsq(slopes, (exact - other).flatten()[:, None]).solution[:, 0]


ODD_SIZES = [(400, 300), (301, 403), (723, 480), (997, 333), (481, 483), (333, 999)]


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("fit", ["pad", "square"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_jpeg_stands_where_it_should_and_its_error_is_small(size: tuple[int, int], fit: str, orientation: int) -> None:
    tag = Image.Exif()
    tag[0x0112] = orientation
    data = encoded(scene(size), "JPEG", quality=92, subsampling=0, exif=tag)
    exact, ours = loaded(data, CLIP, image_fit=fit), fast(data, CLIP, fit)
    error = (exact - ours).abs()
    assert shift(exact, ours).abs().max() < 0.005
    assert 0 < error.mean() < 0.04 and error.max() < 0.25  # of a standard deviation
