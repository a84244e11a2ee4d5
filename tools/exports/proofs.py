"""The comparison that export tools make before they report success: one sample with a picture and a clip, through two models."""

from __future__ import annotations

import wave
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.processor import Processor
from model.batch import Batch
from model.files.untrusted import Json
from model.llm.decoder_options import decoder_options
from model.multimodal import MultimodalLM
from trainer.errors import ProofError

TOLERANCE = 1e-4
"""Largest difference of float32 logits, relative to the largest: far above rounding, far below the effect of a wrong weight."""


@contextmanager
def sample(processor: Processor) -> Iterator[Json]:
    """Provide a record of one round, with a picture that is not square if the model sees, and a clip if it hears; both are deleted
    afterwards.
    """
    with TemporaryDirectory() as folder:
        parts: list[Json] = []
        if "image" in processor.specs:
            file = Path(folder) / "sample.png"
            sample_picture().save(file)
            parts.append({"type": "image", "path": str(file)})
        if "audio" in processor.specs:
            parts.append({"type": "audio", "path": str(sample_clip(Path(folder) / "sample.wav"))})
        if processor.template.name != "plain":
            parts.append({"type": "text", "text": "What is this?"})
        answer = {"role": "assistant", "content": [{"type": "text", "text": "A picture."}]}
        yield {"messages": [{"role": "user", "content": parts}, answer]}


def sample_picture() -> Image.Image:
    """Return a picture of 37 x 23 pixels in which no two neighbours are alike."""
    image = Image.new("RGB", (37, 23))
    image.putdata([((7 * i) % 256, (31 * i) % 256, (101 * i) % 256) for i in range(37 * 23)])
    return image


def sample_clip(file: Path) -> Path:
    """Write a clip of 0.6 seconds in which no two moments are alike, 16-bit at 16 kHz, and return its path."""
    return write_clip(file, np.array([(7919 * i * i) % 20011 - 10005 for i in range(9600)]))


def write_clip(file: Path, samples: np.ndarray) -> Path:
    """Write samples (n,) of the scale of 16 bits as a clip at 16 kHz, and return its path."""
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(samples.astype("<i2").tobytes())
    return file


def batch_of(processor: Processor, record: Json) -> Batch:
    """Return the record as a batch, as training reads such records, however long it is."""
    return replace(processor, config=replace(processor.config, max_length=1 << 20))([record], answers=True)


def reopened(kind: Any, folder: Path) -> Any:
    """Open an export in float32 with a class of transformers. Raises ProofError when it does not load every tensor."""
    model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
    if wrong := {key: sorted(map(str, names)) for key, names in report.items() if names and key != "error_msgs"}:
        raise ProofError(f"transformers does not load every tensor of the export: {wrong}")
    return model.eval()


def logits(model: MultimodalLM, batch: Batch) -> Tensor:
    """Compute the logits (T, V) float32 of the one row of `batch`."""
    llm: Any = model.llm
    with torch.no_grad():
        embeds = model.embed(batch)
        options = decoder_options(model.llm, batch, embeds)
        return llm(inputs_embeds=embeds, position_ids=batch.position_ids, use_cache=False, **options).logits[0].float()


def in_float32(model: MultimodalLM) -> MultimodalLM:
    """Convert the model, in place, to float32 without changing its values, and return it."""
    model.dtype = torch.float32
    return model.float()


def check_close(found: Tensor, expected: Tensor, what: str) -> float:
    """Return the largest relative difference. Raises ProofError when it is more than rounding."""
    if found.shape != expected.shape:
        raise ProofError(f"{what}: logits of shape {list(found.shape)}, expected {list(expected.shape)}")
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:  # a NaN fails as well
        raise ProofError(
            f"{what}: logits differ by {difference:.2e} of the largest, more than {TOLERANCE:.0e}: nothing was written"
        )
    return difference
