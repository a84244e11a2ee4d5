"""InternVL as transformers publishes it: tiles and a thumbnail, a pixel shuffle, `<IMG_CONTEXT>` between `<img>` and `</img>`."""

from __future__ import annotations

from typing import Any

from model.published.layout import Given, Layout, Published, Settings
from model.published.processor_files import feature_token, pixel_settings, placeholder_setting
from model.published.transformers_llava import check_gelu, tower_settings
from model.published.transformers_names import LLM, TOWER, is_class, projector_view

LAYERS = (("layer_norm", "0"), ("linear_1", "1"), ("linear_2", "3"))
TILES = ("data.image_fit", "tiles")


def internvl_settings(source: Published) -> Settings:
    """Return what follows from an InternVL."""
    whole: Any = source.whole
    check_gelu(source)
    if whole.downsample_ratio != 0.5:
        raise source.refused(f"downsample_ratio = {whole.downsample_ratio} in config.json; the shuffle here joins 2 x 2 patches")
    if not whole.vision_config.use_mean_pooling and whole.vision_feature_layer == -1:
        raise source.refused("use_mean_pooling = false of its tower puts a norm behind the last block, which is not read here")
    before, after = (placeholder_setting(source, f"{end}_image_token", tag) for end, tag in (("start", "<img>"), ("end", "</img>")))
    return {
        **tower_settings(source),
        "model.vision.placeholder": feature_token(source, "context_image_token", "<IMG_CONTEXT>"),
        "model.vision_projector.kind": Given("pixel_shuffle_mlp"),
        "model.vision_projector.newline": Given(False),
        "data.media_wrap": Given([before.value, after.value]),
        **tile_settings(source),
    }


def tile_settings(source: Published) -> Settings:
    """Return how pictures are cut; a run may cut them into more or fewer tiles, or see one view of each."""
    pixels = pixel_settings(source)
    if (most := pixels.get("max_patches", 12)) == 1:
        return {"data.image_fit": Given("square", also=("tiles",))}
    return {
        "data.image_fit": Given("tiles", also=("square",)),
        "data.min_tiles": Given(pixels.get("min_patches", 1), free=True, when=TILES),
        "data.max_tiles": Given(most, free=True, when=TILES),
        "data.thumbnail": Given(True, when=TILES),
    }


LAYOUTS = (
    Layout(
        "InternVL (transformers)",
        is_class("InternVLForConditionalGeneration"),
        {"llm": LLM, "vision": TOWER, "vision_projector": projector_view(*LAYERS)},
        internvl_settings,
        reference="InternVLForConditionalGeneration",
    ),
)
