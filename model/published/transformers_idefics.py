"""Idefics3 and SmolVLM as published: a picture in tiles and as a whole, their rows and columns written between their features."""

from __future__ import annotations

from model.files.untrusted import Json
from model.published.layout import Given, Layout, PartView, Published, Settings
from model.published.processor_files import feature_token, pixel_settings, placeholder_setting, template_setting
from model.published.transformers_names import is_class, llm_part, nested_config

LLM_NAMES = ((r"model\.text_model\.", ""), (r"(?=lm_head\.)", ""))
VISION_NAMES = ((r"model\.vision_model\.", ""),)
CONNECTOR_NAMES = ((r"model\.connector\.modality_projection\.", ""),)
WRITTEN = {"fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>"}
"""Texts that the processors write around views, by the tokenizer's key that may name others."""
LONGEST, TILE, TOKENS = 4 * 364, 364, 169
"""Where the processor's files name none, as in transformers' classes: sides in pixels, and tokens of a view."""
SMOLVLM = "smolvlm"
SIDES = (2, 3, 4)
"""Sides of the square of patches that becomes one token."""


def square_tower_part(source: Published) -> Json:
    """Return config.json of the tower, under its own model_type: older folders name that of the whole model."""
    return {**nested_config(source, "vision_config"), "model_type": source.whole.to_dict()["vision_config"]["model_type"]}


def idefics_settings(source: Published) -> Settings:
    """Return what follows from an Idefics3 or a SmolVLM. Raises `ConfigError` for what is read in another way here."""
    side = source.whole.to_dict()["scale_factor"]
    if side not in SIDES:
        raise source.refused(f"scale_factor = {side} in config.json; the connector here joins squares of {SIDES} patches")
    for key, text in WRITTEN.items():
        if (found := placeholder_setting(source, key, text).value) != text:
            raise source.refused(f"{key} = {found!r} among the tokenizer's settings; {text!r} is written around pictures here")
    return {
        "model.vision.layer": Given(-1),
        "model.vision.select": Given("patch"),
        "model.vision.scales": Given([]),
        "model.vision.image_size": Given(0),
        "model.vision.placeholder": feature_token(source, "image_token", "<image>"),
        "model.vision_projector.kind": Given(f"pixel_shuffle{side}_linear"),
        "model.vision_projector.newline": Given(False),
        "data.image_fit": Given("idefics"),
        "data.side_tiles": Given(side_tiles(source), free=True),
        "data.cut_tiles": Given(pixel_settings(source).get("do_image_splitting") is not False, free=True),
        "data.media_wrap": Given([]),
        "data.template": template_setting(source),
        **_video_settings(source),
    }


def _video_settings(source: Published) -> Settings:
    """Return how videos are read: by Idefics3 not at all, by SmolVLM where its frames take the size of pictures on their way.

    Their settings stand in the processor's file, a file of their own or that of pictures, whichever transformers reads first.
    """
    if source.whole.model_type != SMOLVLM:
        return {"data.frame_times": Given(False)}
    nested, own = source.json("processor_config.json").get("video_processor"), source.json("video_preprocessor_config.json")
    found, pixels = nested or own or pixel_settings(source), pixel_settings(source)
    sampling = found.get("video_sampling") or {}
    sides = found.get("size") or sampling.get("video_size") or {"longest_edge": LONGEST}
    same = sides.get("longest_edge") == (pixels.get("size") or {}).get("longest_edge", LONGEST)
    settings = {"data.frame_times": Given(same, free=True), "data.min_frames": Given(1, free=True)}
    for key, kind in (("fps", float), ("max_frames", int)):
        if isinstance(value := sampling.get(key), (int, float)) and value > 0:
            settings[f"data.{key}"] = Given(kind(value), free=True)
    return settings


def side_tiles(source: Published) -> int:
    """Return how many tiles the longer side of a picture becomes. Raises `ConfigError` for a processor of another model."""
    whole, pixels = source.whole.to_dict(), pixel_settings(source)
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if pixels.get(key) is False:
            raise source.refused(f"{key} = false among the image processor's settings; pictures here are resized and normalised")
    side, tile = whole["vision_config"]["image_size"], (pixels.get("max_image_size") or {}).get("longest_edge", TILE)
    if tile != side:
        raise source.refused(
            f"max_image_size = {tile} among the image processor's settings, and vision_config.image_size = {side} in config.json: "
            "restore the file that belongs to this model"
        )
    tokens = (side // whole["vision_config"]["patch_size"]) ** 2 // whole["scale_factor"] ** 2
    if (counted := source.json("processor_config.json").get("image_seq_len", TOKENS)) != tokens:
        raise source.refused(f"image_seq_len = {counted} in processor_config.json, and a view of this model takes {tokens} tokens")
    longest = (pixels.get("size") or {}).get("longest_edge", LONGEST)
    if longest % tile and "data.side_tiles" not in source.written:
        raise source.refused(f"size = {longest} among the image processor's settings is not made of tiles of {tile} pixels")
    return max(1, longest // tile)


def _layout(name: str, cls: str) -> Layout:
    parts = {
        "llm": PartView(LLM_NAMES, llm_part),
        "vision": PartView(VISION_NAMES, square_tower_part),
        "vision_projector": PartView(CONNECTOR_NAMES),
    }
    return Layout(f"{name} (transformers)", is_class(cls), parts, idefics_settings, reference=cls)


LAYOUTS = (_layout("Idefics3", "Idefics3ForConditionalGeneration"), _layout("SmolVLM", "SmolVLMForConditionalGeneration"))
