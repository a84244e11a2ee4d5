"""Published models with Pixtral's tower, tiny and random, made by the library's own classes: whole folders."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)
from transformers.models.pixtral import image_processing_pil_pixtral as pil

from tests.support.published import PARTS_ONLY, save_model, save_processor, tokenizer_with
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


@dataclass(frozen=True)
class PixtralMaker:
    """How a published model is made: `write` fills a folder; `cls` opens it with transformers."""

    cls: Any
    write: Callable[[Path, bool], None]
    settings: dict[str, Any]  # what follows from the model, by dotted key of run.toml


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
    file = folder / "chat_template.jinja"
    template = file.read_text() if file.is_file() else json.loads((folder / "chat_template.json").read_text())["chat_template"]
    facts = json.loads((folder / "processor_config.json").read_text())
    kept = {key: facts[key] for key in ("patch_size", "spatial_merge_size")}
    pixels, tokenizer = pil.PixtralImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return processor_class()(pixels, tokenizer, chat_template=template, **kept)


PIXTRAL_FACTS: dict[str, Any] = {
    "model.vision.layer": -1,
    "model.vision.placeholder": "[IMG]",
    "model.vision.line_ends": ["[IMG_BREAK]", "[IMG_END]"],
    "data.image_fit": "native",
}
PIXTRAL_MAKERS = {
    "pixtral": PixtralMaker(
        LlavaForConditionalGeneration,
        partial(pixtral, cls=LlavaForConditionalGeneration, config=LlavaConfig, merge=1, vision_feature_select_strategy="full"),
        {**PIXTRAL_FACTS, "model.vision_projector.kind": "mlp2x_gelu"},
    ),
    "mistral3": PixtralMaker(
        Mistral3ForConditionalGeneration,
        partial(pixtral, cls=Mistral3ForConditionalGeneration, config=Mistral3Config, merge=2),
        {**PIXTRAL_FACTS, "model.vision_projector.kind": "mistral3_merger"},
    ),
}
