"""Bytes that the model normalises are the pixels that the workers would have made."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.collate import collate
from data.config import DataConfig
from data.media import image
from data.media.blob import Blob
from data.records.record import MediaRef
from model.batch import Batch
from model.build import build_model
from model.config import LlmConfig, ModelConfig, VisionConfig, VisionProjectorConfig
from model.media_spec import AudioSpec, ImageSpec
from model.vision.normalise import normalised
from tests.support.tiny import save_llm, save_tower
from tests.support.tiny_data import SPECS, dataset, sample, talk

SPEC = ImageSpec(16, 8, 1, "patch", "exact", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def every_level() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(decode: str) -> torch.Tensor:
    blob, ref, config = Blob("memory", data=every_level()), MediaRef("image", "memory"), DataConfig(image_decode=decode)  # type: ignore[arg-type]
    return image.load(blob, ref, SPEC, config, image.measure(blob, ref, SPEC, config, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_become_the_pixels_of_the_processor(dtype: torch.dtype) -> None:
    exact, sent = rows("exact"), rows("fast")
    assert (exact.dtype, sent.dtype, sent.shape) == (torch.float32, torch.uint8, (1, 3, 16, 16))
    found = normalised(sent, SPEC, dtype)
    assert found.dtype == dtype
    # Normalised in float32 and rounded once: a coarser type for the arithmetic would be a whole step off.
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found.float(), exact, atol=1e-6, rtol=tolerance)


def test_pixels_that_are_ready_are_only_cast() -> None:
    exact = rows("exact")
    assert torch.equal(normalised(exact, SPEC, torch.float32), exact)
    assert torch.equal(normalised(exact, SPEC, torch.bfloat16), exact.bfloat16())


def test_bytes_are_pixels_of_pictures_only() -> None:
    with pytest.raises(TypeError, match="AudioSpec"):
        normalised(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), AudioSpec(80, 3000, True, (2,)), torch.float32)


def batch(folder: Path, decode: str) -> Batch:
    Image.open(io.BytesIO(every_level())).resize((40, 24)).save(folder / "a.png")
    data = dataset(folder, [talk("<image> what?", "A cat.", images=["a.png"])], image_decode=decode)
    return collate([sample(data, 0)], 0)


def test_a_model_sees_the_same_in_bytes(tmp_path: Path) -> None:
    save_llm(tmp_path / "llm", vocab_size=512), save_tower(tmp_path / "vision")
    parts = {"vision": VisionConfig(str(tmp_path / "vision")), "vision_projector": VisionProjectorConfig()}
    model = build_model(ModelConfig(LlmConfig(str(tmp_path / "llm"), "full"), dtype="float32", **parts))  # type: ignore[arg-type]
    model.specs = SPECS
    sent, exact = batch(tmp_path, "fast"), batch(tmp_path, "exact")
    assert sent.media["image"].values.dtype == torch.uint8
    assert sent.media["image"].values.nbytes * 4 == exact.media["image"].values.nbytes
    torch.testing.assert_close(model.embed(sent), model.embed(exact), atol=1e-5, rtol=1e-5)
