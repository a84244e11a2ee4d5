"""Published models with Pixtral's tower, tiny and random, made by the library's own classes: whole folders."""

from __future__ import annotations

import json
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)
from transformers.image_utils import ChannelDimension
from transformers.models.pixtral import image_processing_pil_pixtral as pil

from tests.support.published import PARTS_ONLY, save_model, save_processor, tokenizer_with
from tests.support.published.native import Inputs, NativeMaker, Size, template_of
from tests.support.tiny import SIZES

SIGNS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
TEMPLATE = PARTS_ONLY.replace("'<image>'", "'[IMG]'")
TOWER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "patch_size": 8,
    "image_size": 96,
}
LONGEST = 90


def pixtral(folder: Path, hub: bool, cls: Any, config: Any, merge: int, **options: Any) -> None:
    """A LLaVA with Pixtral, or a Mistral 3: under the names of the hub, or of 5.x."""
    tokenizer = tokenizer_with(*SIGNS, template=TEMPLATE)
    text = MistralConfig(**{**SIZES, "vocab_size": len(tokenizer), "head_dim": 16, "sliding_window": None, "rms_norm_eps": 1e-5})
    whole = config(
        vision_config=PixtralVisionConfig(**TOWER),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        **options,
    )
    save_model(folder, cls, whole, hub)
    signs = dict(zip(("image_token", "image_break_token", "image_end_token"), SIGNS))
    pixels = pil.PixtralImageProcessorPil(patch_size={"height": 8, "width": 8}, size={"longest_edge": LONGEST})
    options = {"patch_size": 8, "spatial_merge_size": merge, **signs}
    save_processor(folder, "PixtralProcessor", hub, tokenizer, options, image_processor=pixels)


def processor_class() -> Any:
    """Transformers' processor, whose module imports the image processor of torchvision; here it gets that of PIL."""
    package = "transformers.models.pixtral"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, f"{package}.image_processing_pixtral", pil)
        return import_module(f"{package}.processing_pixtral").PixtralProcessor


def pixtral_reader(folder: Path) -> Any:
    """The folder's own processor."""
    facts = json.loads((folder / "processor_config.json").read_text())
    kept = {key: facts[key] for key in ("patch_size", "spatial_merge_size")}
    pixels, tokenizer = pil.PixtralImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return processor_class()(pixels, tokenizer, chat_template=template_of(folder), **kept)


def pixtral_pixels(inputs: Inputs, merge: int) -> Tensor:
    """Patches (P, 3, 1, p, p) of every picture without what pads it; those of one token stand together."""
    side, found = TOWER["patch_size"], []
    for picture, (high, wide) in zip(inputs["pixel_values"], inputs["image_sizes"].tolist(), strict=True):
        rows = picture[:, :high, :wide].reshape(3, high // side // merge, merge, side, wide // side // merge, merge, side)
        found.append(rows.permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3))
    return torch.cat(found)[:, :, None]


def pixtral_tokens(reader: Any, size: Size) -> int | None:
    """Tokens of a picture with its line ends; None where the processor resizes a side to nothing.

    The processor's own count takes a picture of one or three rows for channels, and counts line ends of one that is nothing.
    """
    patch = reader.image_processor.patch_size["height"] * reader.spatial_merge_size
    picture = np.broadcast_to(np.uint8(0), (3, *size[::-1]))
    high, wide = pil.get_resize_output_image_size(picture, LONGEST, patch, ChannelDimension.FIRST)
    return high // patch * (wide // patch + 1) if min(high, wide) else None


PIXTRAL_FACTS: dict[str, Any] = {
    "model.vision.layer": -1,
    "model.vision.placeholder": "[IMG]",
    "model.vision.line_ends": ["[IMG_BREAK]", "[IMG_END]"],
    "data.image_fit": "native",
}


def _maker(cls: Any, config: Any, merge: int, kind: str, **options: Any) -> NativeMaker:
    return NativeMaker(
        cls,
        partial(pixtral, cls=cls, config=config, merge=merge, **options),
        pixtral_reader,
        {**PIXTRAL_FACTS, "model.vision_projector.kind": kind},
        "transformer.layers.1.attention.q_proj",
        partial(pixtral_pixels, merge=merge),
        pixtral_tokens,
    )


PIXTRAL_MAKERS = {
    "pixtral": _maker(LlavaForConditionalGeneration, LlavaConfig, 1, "mlp2x_gelu", vision_feature_select_strategy="full"),
    "mistral3": _maker(Mistral3ForConditionalGeneration, Mistral3Config, 2, "mistral3_merger"),
}
