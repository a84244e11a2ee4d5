"""Pixtral and Mistral 3 as transformers publishes them: pictures at their own size, with tokens at the ends of their lines."""

from __future__ import annotations

from functools import reduce

from model.files.untrusted import Json
from model.published.layout import Given, Layout, PartView, Published, Settings
from model.published.processor_files import placeholder_setting
from model.published.transformers_llava import MLP, mlp_settings, tower_settings
from model.published.transformers_names import LLM, TOWER, is_class, projector_view

TOWER_KIND = "pixtral"
"""model_type of the tower's part of config.json."""
PATCH = 16
"""Side of a patch in pixels where the processor's settings name none, as in transformers' class."""
MERGE, EPSILON = 2, 1e-5
"""Of the merger that is built for Mistral 3: side of the square that becomes one token, in patches, and of its norm."""
MERGER_NAMES = tuple(
    (rf"(model\.)?multi_modal_projector\.{old}\.", f"{new}.")
    for old, new in (
        ("norm", "norm"),
        (r"patch_merger\.merging_layer", "merging_layer"),
        ("linear_1", "linear_1"),
        ("linear_2", "linear_2"),
    )
)


def fact(source: Published, key: str) -> object:
    """Return a value of config.json by its dotted key, or what transformers' class has in its place."""
    return reduce(getattr, key.split("."), source.whole)


def has_pixtral(source: Published) -> bool:
    """Tell whether config.json is that of a LLaVA whose tower is Pixtral."""
    tower: Json = source.config.get("vision_config") or {}
    return is_class("LlavaForConditionalGeneration")(source) and tower.get("model_type") == TOWER_KIND


def line_settings(source: Published, merge: int) -> Settings:
    """Return what follows from Pixtral's processor: its three tokens, and pictures at their own size.

    `merge`: side, in patches, of the square that becomes one token. Raises `ConfigError` for a processor that counts others.
    """
    patch = fact(source, "vision_config.patch_size")
    processor = source.json("processor_config.json")
    counted = processor.get("patch_size", PATCH), processor.get("spatial_merge_size", 1)
    if counted != (patch, merge):
        raise source.refused(
            f"its processor counts patches of {counted[0]} pixels, {counted[1]} x {counted[1]} to a token, and the model has those "
            f"of {patch} pixels, {merge} x {merge} to a token: restore processor_config.json"
        )
    ends = [placeholder_setting(source, f"image_{key}_token", f"[IMG_{key.upper()}]").value for key in ("break", "end")]
    return {
        "model.vision.line_ends": Given(ends),
        "data.image_fit": Given("native"),
        "data.media_wrap": Given([]),
    }


def pixtral_settings(source: Published) -> Settings:
    """Return what follows from a LLaVA with Pixtral's tower."""
    return {**tower_settings(source), **mlp_settings(source, newline=False, token="[IMG]"), **line_settings(source, 1)}


def mistral_settings(source: Published) -> Settings:
    """Return what follows from a Mistral 3. Raises `ConfigError` for a projector of another form."""
    for key, built in (
        ("spatial_merge_size", MERGE),
        ("multimodal_projector_bias", False),
        ("vision_config.model_type", TOWER_KIND),
        ("text_config.rms_norm_eps", EPSILON),
    ):
        if (value := fact(source, key)) != built:
            raise source.refused(f"{key} = {value!r} in config.json; what is built here has {built!r}")
    found = {**tower_settings(source), **mlp_settings(source, newline=False, token="[IMG]", bias=False)}
    return {**found, **line_settings(source, MERGE), "model.vision_projector.kind": Given("mistral3_merger")}


LAYOUTS = (
    Layout(
        "LLaVA with Pixtral (transformers)",
        has_pixtral,
        {"llm": LLM, "vision": TOWER, "vision_projector": projector_view(*MLP)},
        pixtral_settings,
        reference="LlavaForConditionalGeneration",
    ),
    Layout(
        "Mistral 3 (transformers)",
        is_class("Mistral3ForConditionalGeneration"),
        {"llm": LLM, "vision": TOWER, "vision_projector": PartView(MERGER_NAMES)},
        mistral_settings,
        reference="Mistral3ForConditionalGeneration",
    ),
)
