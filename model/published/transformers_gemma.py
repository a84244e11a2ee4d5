"""Gemma 3 as published: SigLIP behind its last norm, squares of patches pooled, pictures whose tokens see each other both ways."""

from __future__ import annotations

import math
from typing import Any

from model.files.untrusted import Json
from model.published.layout import Given, Layout, PartView, Published, Settings
from model.published.processor_files import check_pixels, check_placeholder, pixel_settings, placeholder_setting, stored_template
from model.published.transformers_names import LLM, TOWER, is_class, nested_config

PROJECTOR_NAMES = ((r"(model\.)?multi_modal_projector\.", ""),)
TOKENS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
"""Tokens before and behind a picture's features, and of a feature, by the tokenizer's keys that may name others."""
SIDES = (2, 3, 4)
"""Sides of the square of patches whose mean becomes one token."""
TOKENS_PER_PICTURE = 256
"""Where the processor's file names no number, as in transformers' class."""
EPSILON = 1e-6


def siglip_part(source: Published) -> Json:
    """Return config.json of the tower. Published folders have no pooling head."""
    return {**nested_config(source, "vision_config"), "vision_use_head": False}


def gemma_settings(source: Published) -> Settings:
    """Return what follows from a Gemma 3. Raises `ConfigError` for what is read in another way here."""
    check_pixels(source)
    if pixel_settings(source).get("do_pan_and_scan"):
        raise source.refused("do_pan_and_scan = true among the image processor's settings; pictures are not cut into crops here")
    if not stored_template(source):
        raise source.refused(
            "the folder has no chat template, by which pictures are written: put that of the instruction-tuned model, of the same "
            "name with -it, into chat_template.jinja"
        )
    before, behind, feature = (token_of(source, key) for key in TOKENS)
    return {
        "model.llm.image_attention": Given("two_way"),
        "model.vision.layer": Given(-1),
        "model.vision.final_norm": Given(True),
        "model.vision.select": Given("patch"),
        "model.vision.scales": Given([]),
        "model.vision.image_size": Given(0),
        "model.vision.placeholder": Given(feature),
        "model.vision_projector.kind": Given(f"pool{pooled_side(source)}_norm_linear"),
        "model.vision_projector.newline": Given(False),
        "data.image_fit": Given("square"),
        "data.media_wrap": Given([f"\n\n{before}", f"{behind}\n\n"]),
        "data.template": Given("auto"),
    }


def token_of(source: Published, key: str) -> str:
    """Return one of TOKENS as the tokenizer names it. Raises `ConfigError` where config.json has another number for features."""
    token: str = placeholder_setting(source, key, TOKENS[key]).value
    if key == "image_token":
        check_placeholder(source, token)
    return token


def pooled_side(source: Published) -> int:
    """Return the side of the square of patches that becomes one token. Raises `ConfigError` for a model of another form."""
    whole: Any = source.whole
    tower, text = whole.vision_config, whole.text_config
    if (kind := tower.model_type) != "siglip_vision_model" or text.model_type != "gemma3_text":
        raise source.refused(
            f"vision_config is of {kind!r} and text_config of {text.model_type!r}; a Gemma 3 has a SigLIP and a gemma3_text"
        )
    if text.use_bidirectional_attention:
        raise source.refused("use_bidirectional_attention = true in config.json: such a model reads texts and writes none")
    if (found := tower.layer_norm_eps) != EPSILON:
        raise source.refused(
            f"vision_config.layer_norm_eps = {found} in config.json, by which the projector norms too; here by {EPSILON}"
        )
    tokens, grid = whole.mm_tokens_per_image, tower.image_size // tower.patch_size
    if (counted := source.json("processor_config.json").get("image_seq_length", TOKENS_PER_PICTURE)) != tokens:
        raise source.refused(
            f"image_seq_length = {counted} in processor_config.json, and mm_tokens_per_image = {tokens} in config.json"
        )
    for side in SIDES:
        if tokens == math.isqrt(tokens) ** 2 and grid == side * math.isqrt(tokens):
            return side
    raise source.refused(
        f"mm_tokens_per_image = {tokens} in config.json for {grid} x {grid} patches; squares of {SIDES} patches become a token"
    )


LAYOUTS = (
    Layout(
        "Gemma 3 (transformers)",
        is_class("Gemma3ForConditionalGeneration"),
        {"llm": LLM, "vision": PartView(TOWER.names, siglip_part), "vision_projector": PartView(PROJECTOR_NAMES)},
        gemma_settings,
        reference="Gemma3ForConditionalGeneration",
        nothing=(r"vision_model\.head\.", r"vision_tower\.head\."),
    ),
)
