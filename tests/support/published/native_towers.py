"""Tiny random towers that read pictures at their own size, as folders, and what transformers' classes make of a picture alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import PixtralVisionConfig, PixtralVisionModel, Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from tests.support.tiny import spread

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 8,
}


@dataclass(frozen=True)
class NativeTowerMaker:
    """How a tower is made and asked: `states` returns the hidden states of one picture, each (P, C), embeddings first."""

    config: Any
    cls: Any
    pixels: Any  # its image processor
    extra: dict[str, Any]
    states: Callable[[Any, Any], Sequence[Tensor]]


@contextmanager
def narrow_tables_resized() -> Iterator[None]:
    """Resize tables to a width of one patch by their transposes: with antialias, torch 2.13 on the CPU repeats the first row."""
    plain = F.interpolate

    def interpolate(table: Tensor, size: tuple[int, int], **options: Any) -> Tensor:
        if size[1] > 1:
            return plain(table, size=size, **options)
        return plain(table.transpose(2, 3), size=size[::-1], **options).transpose(2, 3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "interpolate", interpolate)
        yield


def naflex_states(model: Any, inputs: Any) -> Sequence[Tensor]:
    with narrow_tables_resized():
        found = model(**inputs, output_hidden_states=True).hidden_states
    return [state[0, : int(inputs["pixel_attention_mask"].sum())] for state in found]


def pixtral_states(model: Any, inputs: Any) -> Sequence[Tensor]:
    return [state[0] for state in model(**inputs, output_hidden_states=True).hidden_states]


NATIVE_TOWER_MAKERS = {
    "naflex": NativeTowerMaker(
        Siglip2VisionConfig,
        Siglip2VisionModel,
        Siglip2ImageProcessorPil(patch_size=8, max_num_patches=49),
        {"num_patches": 25},
        naflex_states,
    ),
    "pixtral": NativeTowerMaker(
        PixtralVisionConfig,
        PixtralVisionModel,
        PixtralImageProcessorPil(patch_size={"height": 8, "width": 8}, size={"longest_edge": 100}),
        {"image_size": 104},
        pixtral_states,
    ),
}


def save_native_tower(folder: Path, name: str, **overrides: Any) -> Any:
    """A random tower in `folder` with its image processor's settings; the tower itself."""
    maker = NATIVE_TOWER_MAKERS[name]
    torch.manual_seed(2)
    model = maker.cls(maker.config(**{**SIZES, **maker.extra, **overrides})).eval()
    spread(model)
    model.save_pretrained(folder)
    maker.pixels.save_pretrained(folder)
    return model


def noise(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 90).convert("RGB")
