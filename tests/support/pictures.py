"""Made-up pictures, and the pixels that are made of their bytes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from data.config import DataConfig
from data.media import image
from data.media.blob import Blob
from data.records.record import MediaRef
from model.media_spec import ImageSpec

CLIP = ImageSpec(30, 10, 1, "patch", "shortest_edge", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIGLIP = ImageSpec(30, 10, 0, "patch", "exact", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SIZES = [(30, 30), (64, 48), (47, 65), (31, 200), (7, 5), (100, 29)]


def noise(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    width, height = size
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    if mode == "I;16":
        return Image.fromarray(np.random.default_rng(seed).integers(0, 65536, (height, width), dtype=np.uint16))
    return picture if mode == "RGBA" else picture.convert("RGB").convert(mode)


def loaded(data: bytes, spec: ImageSpec, **config: Any) -> Tensor:
    """The first row, (3, S, S), of a picture in memory."""
    blob, ref, settings = Blob("memory", data=data), MediaRef("image", "memory"), DataConfig(**config)
    return image.load(blob, ref, spec, settings, image.measure(blob, ref, spec, settings, 1))[0]


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()
