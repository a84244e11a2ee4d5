"""LLaVA, LLaVA-NeXT and OneVision as transformers publishes them; `tools.export_adapter --for hf` writes the first of them too."""

from __future__ import annotations

import re
from typing import Any

from model.published.layout import Given, Layout, Published, Settings
from model.published.processor_files import check_pixels, feature_token, fit_setting, template_setting
from model.published.transformers_names import LLM, TOWER, is_class, projector_view

HAS_CLS = ("clip_vision_model", "dinov2", "internvl_vision")
"""Towers with one row before the patches, which `vision_feature_select_strategy = "default"` drops."""
MLP = (("linear_1", "0"), ("linear_2", "2"))
MAX = re.compile(r"anyres_max_(\d+)")


def tower_settings(source: Published) -> Settings:
    """Return the settings of [model.vision]: the layer that is read, and which of its rows."""
    whole: Any = source.whole
    check_pixels(source)
    layer, strategy = whole.vision_feature_layer, getattr(whole, "vision_feature_select_strategy", "full")
    if not isinstance(layer, int):
        raise source.refused(f"vision_feature_layer = {layer} in config.json reads several layers, and one is read here")
    has_cls = whole.vision_config.model_type in HAS_CLS
    if strategy == "default" and not has_cls:
        raise source.refused(
            "vision_feature_select_strategy = 'default' in config.json drops the first row of a tower that has no CLS row, a patch "
            "of the picture; such a model is not supported"
        )
    return {
        "model.vision.layer": Given(layer),
        "model.vision.select": Given("cls_patch" if strategy == "full" and has_cls else "patch"),
        "model.vision.scales": Given([]),
        "data.template": template_setting(source),
    }


def mlp_settings(source: Published, newline: bool, token: str = "<image>", bias: bool = True) -> Settings:
    """Return the settings of [model.vision_projector]: two matrices and a GELU between them. `token`: the usual one of features."""
    whole: Any = source.whole
    check_gelu(source)
    if bias and not getattr(whole, "multimodal_projector_bias", True):
        raise source.refused("multimodal_projector_bias = false in config.json; the projector here has biases")
    return {
        "model.vision_projector.kind": Given("mlp2x_gelu"),
        "model.vision_projector.newline": Given(newline),
        "model.vision.placeholder": feature_token(source, "image_token", token),
    }


def check_gelu(source: Published) -> None:
    """Refuse a projector with another function than GELU between its matrices."""
    whole: Any = source.whole
    if (act := whole.projector_hidden_act) != "gelu":
        raise source.refused(f"projector_hidden_act = {act!r} in config.json; the projector here has a 'gelu'")


def llava_settings(source: Published) -> Settings:
    """Return what follows from a LLaVA: one view per picture."""
    return {**tower_settings(source), **mlp_settings(source, newline=False), "data.image_fit": fit_setting(source)}


def next_settings(source: Published) -> Settings:
    """Return what follows from a LLaVA-NeXT or OneVision: tiles of the picture's own aspect, lines that end in a line break."""
    aspect = getattr(source.whole, "vision_aspect_ratio", "anyres")
    limit = MAX.fullmatch(str(aspect))
    if aspect != "anyres" and limit is None:
        raise source.refused(f"vision_aspect_ratio = {aspect!r} in config.json is neither 'anyres' nor 'anyres_max_N'")
    return {
        **tower_settings(source),
        **mlp_settings(source, newline=True),
        "data.image_fit": Given("anyres"),
        "data.image_grid": Given(grid_names(source)),
        "data.anyres_max": Given(int(limit[1]) if limit else 0),
    }


def grid_names(source: Published) -> list[str]:
    """Return data.image_grid: the grids of config.json, which are heights and widths in pixels, as tiles across and down."""
    whole: Any = source.whole
    side, found = whole.vision_config.image_size, []
    for height, width in whole.image_grid_pinpoints or ():
        if not isinstance(side, int) or height % side or width % side:
            raise source.refused(f"image_grid_pinpoints hold [{height}, {width}], which is not made of views of {side} pixels")
        found.append(f"{width // side}x{height // side}")
    if not found:
        raise source.refused("config.json has no image_grid_pinpoints")
    return found


LAYOUTS = (
    Layout(
        "LLaVA (transformers)",
        is_class("LlavaForConditionalGeneration"),
        {"llm": LLM, "vision": TOWER, "vision_projector": projector_view(*MLP)},
        llava_settings,
        reference="LlavaForConditionalGeneration",
    ),
    Layout(
        "LLaVA-NeXT (transformers)",
        is_class("LlavaNextForConditionalGeneration"),
        {"llm": LLM, "vision": TOWER, "vision_projector": projector_view(*MLP, newline=True)},
        next_settings,
        reference="LlavaNextForConditionalGeneration",
    ),
    Layout(
        "LLaVA-OneVision (transformers)",
        is_class("LlavaOnevisionForConditionalGeneration"),
        {"llm": LLM, "vision": TOWER, "vision_projector": projector_view(*MLP, newline=True)},
        next_settings,
        reference="LlavaOnevisionForConditionalGeneration",
    ),
)
