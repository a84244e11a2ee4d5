"""LLaVA, LLaVA-NeXT and OneVision as their authors publish them: config.json of the language model, with `mm_` keys in it."""

from __future__ import annotations

import re

from model.errors import ConfigError
from model.files.hub import read_json
from model.files.untrusted import Json
from model.published.layout import Given, Layout, PartView, Published, Settings
from model.published.original_prompts import llava_template

LANGUAGE_MODELS = {
    "LlavaLlamaForCausalLM": ("llama", "LlamaForCausalLM"),
    "LlavaMistralForCausalLM": ("mistral", "MistralForCausalLM"),
    "LlavaMixtralForCausalLM": ("mixtral", "MixtralForCausalLM"),
    "LlavaQwenForCausalLM": ("qwen2", "Qwen2ForCausalLM"),
    "LlavaQwenMoeForCausalLM": ("qwen2_moe", "Qwen2MoeForCausalLM"),
    "LlavaGemmaForCausalLM": ("gemma", "GemmaForCausalLM"),
}
"""model_type and class of the language model inside each of LLaVA's classes."""
MODEL_TYPES = {
    "llava_llama": "LlavaLlamaForCausalLM",
    "llava_mistral": "LlavaMistralForCausalLM",
    "llava_mixtral": "LlavaMixtralForCausalLM",
    "llava_qwen": "LlavaQwenForCausalLM",
    "llava_qwen_moe": "LlavaQwenMoeForCausalLM",
    "llava_gemma": "LlavaGemmaForCausalLM",
}
OWN_KEYS = re.compile(
    r"(un)?(freeze|tune)_|mm_|use_(mm_proj|pos_skipping)$|image_(aspect_ratio|grid_pinpoints|(crop|split)_resolution)$|s2($|_)"
    r"|vision_tower_pretrained$|tokenizer_(model_max_length|padding_side)$|add_(faster_video|time_instruction)$|force_sample$"
    r"|faster_token_stride$|delay_load$|pos_skipping_range$|max_num_"
)
"""Keys of config.json that LLaVA adds to those of the language model."""
INSIDE = r"(?:base_model\.model\.)?model\."
"""Prefix of the tensors that LLaVA adds to the language model; a file beside an adapter has PEFT's prefix in front."""
ADDED = r"(?:mm_projector|vision_tower|vision_resampler)\.|image_newline$|faster_token$"
POOLER = ((rf"{INSIDE}mm_projector\.conv_pool\.", "0."), (rf"{INSIDE}mm_projector\.proj\.1\.", "2."))
PROJECTOR = PartView((*POOLER, (rf"{INSIDE}mm_projector\.", ""), (rf"{INSIDE}(?=image_newline$)", "")))
FROZEN_TOWER = rf"{INSIDE}vision_tower\."
GRID = re.compile(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)|\[\s*(\d+)\s*,\s*(\d+)\s*\]")
GRID_RANGE = re.compile(r"\(([1-9]\d?)x([1-9]\d?)\)")
MLP = re.compile(r"mlp[1-9]x_gelu")
S2_SCALES = "336,672,1008"
"""LLaVA's scales where config.json has `s2` and no `s2_scales`."""


def class_of(config: Json) -> str:
    """Return the name of LLaVA's class in config.json; "" when it is none of them."""
    names = [name for name in config.get("architectures") or () if name in LANGUAGE_MODELS]
    return names[0] if names else MODEL_TYPES.get(str(config.get("model_type")), "")


def is_llava(source: Published) -> bool:
    """Tell whether config.json is that of one of LLaVA's classes."""
    return bool(class_of(source.config)) and "mm_vision_tower" in source.config


def holds_tower(source: Published) -> bool:
    """Tell whether the tower was trained, so that the files hold its weights: LLaVA itself decides by these keys."""
    tuned = str(source.config.get("mm_tunable_parts") or "").split(",")
    return bool(source.config.get("unfreeze_mm_vision_tower")) or "mm_vision_tower" in tuned


def _language_model(source: Published) -> Json:
    """Return config.json of the language model: what is left without LLaVA's own keys."""
    kind, name = LANGUAGE_MODELS[class_of(source.config)]
    found = {key: value for key, value in source.config.items() if not OWN_KEYS.match(key)}
    if kind == "qwen2":
        found.pop("rope_scaling", None)  # LLaVA's class sets it to None
    return {**found, "model_type": kind, "architectures": [name]}


def _tower_source(source: Published) -> Published:
    """Return the folder or hub id that config.json names as the tower, with its own config.json. Raises `ConfigError`."""
    written = "" if holds_tower(source) else source.written.get("model.vision.path")
    path, setting = written or source.config["mm_vision_tower"], f"mm_vision_tower in config.json of {source.path}"
    setting = "model.vision.path" if written else setting
    try:
        whole = read_json(setting, str(path), "config.json", source.cache_dir)
    except ConfigError as error:
        where = "name the folder there" if holds_tower(source) else "write the folder where the tower is as model.vision.path"
        raise ConfigError(f"{error}; {where}") from error
    return Published(setting, str(path), source.cache_dir, whole)


def _tower_config(source: Published) -> Json:
    """Return config.json of the tower, which stands in the tower's own folder."""
    whole = _tower_source(source).config
    found: Json = whole.get("vision_config", whole)
    return {"model_type": "clip_vision_model", **found} if whole.get("model_type") == "clip" else found


def _tower_processor(source: Published) -> Json:
    """Return the image processor's settings, which stand in the tower's own folder."""
    tower = _tower_source(source)
    return tower.json("preprocessor_config.json") or tower.json("processor_config.json").get("image_processor", {})


LLM = PartView(((rf"(?!{INSIDE}(?:{ADDED}))", ""),), _language_model)
TOWER = PartView(((rf"{INSIDE}vision_tower\.vision_tower\.(?:vision_model\.)?", ""),), _tower_config, processor=_tower_processor)


def original_settings(source: Published, *names: str) -> Settings:
    """Return what follows from config.json of an original LLaVA, which may also be known by `names`.

    Raises `ConfigError` for what cannot be expressed.
    """
    newline = "unpad" in str(source.config.get("mm_patch_merge_type", "flat"))
    wrap = ["<im_start>", "<im_end>"] if source.config.get("mm_use_im_start_end") else []
    return {
        **_tower(source),
        "model.vision_projector.kind": Given(_projector_kind(source)),
        "model.vision_projector.newline": Given(newline),
        "data.media_wrap": Given(wrap),
        **_fit(source),
        **llava_template(source, LANGUAGE_MODELS[class_of(source.config)][0], *names),
    }


def _tower(source: Published) -> Settings:
    config, value = source.config, _tower_config(source)
    layer, select = config.get("mm_vision_select_layer", -2), config.get("mm_vision_select_feature", "patch")
    if value.get("model_type") == "siglip_vision_model":
        layer, select = -2, "patch"  # LLaVA's class of SigLIP removes the last block and reads no key
    if not isinstance(layer, int) or select not in ("patch", "cls_patch"):
        raise source.refused(
            f"mm_vision_select_layer = {layer!r}, mm_vision_select_feature = {select!r} in config.json read several layers"
        )
    scales = [int(size) for size in str(config.get("s2_scales", S2_SCALES)).split(",")] if config.get("s2") else []
    found = {
        "model.vision.path": Given(source.path if holds_tower(source) else config["mm_vision_tower"], free=not holds_tower(source)),
        "model.vision.layer": Given(layer),
        "model.vision.select": Given(select),
        "model.vision.scales": Given(sorted(scales)[1:]),
    }
    if scales and min(scales) != value.get("image_size"):
        found["model.vision.image_size"] = Given(min(scales))
    return found


def _projector_kind(source: Published) -> str:
    """Return model.vision_projector.kind. Raises `ConfigError` for a projector or resampler that is not built here."""
    kind, resampler = str(source.config.get("mm_projector_type", "linear")), source.config.get("mm_resampler_type")
    if resampler:
        raise source.refused(f"mm_resampler_type = {resampler!r} in config.json: resamplers of LLaVA-NeXT are not built here")
    if kind == "pooler":
        return "conv_mlp"
    if kind not in ("linear", "identity") and not MLP.fullmatch(kind):
        raise source.refused(f"mm_projector_type = {kind!r} in config.json: this kind of projector is not built here")
    return kind


def _fit(source: Published) -> Settings:
    """Return how pictures become views: config.json's image_aspect_ratio, mm_patch_merge_type and image_grid_pinpoints."""
    aspect, merge = source.config.get("image_aspect_ratio") or "square", source.config.get("mm_patch_merge_type", "flat")
    if aspect in ("pad", "square"):
        return {"data.image_fit": Given(aspect)}
    limit = re.fullmatch(r"anyres(?:_max_(\d+))?", str(aspect))
    if limit is None:
        raise source.refused(f"image_aspect_ratio = {aspect!r} in config.json is not 'pad' | 'square' | 'anyres' | 'anyres_max_N'")
    if merge != "spatial_unpad":
        raise source.refused(
            f"mm_patch_merge_type = {merge!r} in config.json with image_aspect_ratio = {aspect!r}: tiles are merged as "
            "'spatial_unpad' here"
        )
    return {
        "data.image_fit": Given("anyres"),
        "data.image_grid": Given(_grids(source)),
        "data.anyres_max": Given(int(limit[1] or 0)),
    }


def _grids(source: Published) -> list[str]:
    """Return data.image_grid: image_grid_pinpoints, which are widths and heights in pixels or ranges of tiles, as tiles."""
    points, side = source.config.get("image_grid_pinpoints") or "", _tower_config(source).get("image_size")
    ends = GRID_RANGE.findall(points) if isinstance(points, str) else []
    if ends:
        return [f"{'x'.join(ends[0])}...{'x'.join(ends[-1])}"] if len(ends) > 1 else ["x".join(ends[0])]
    pairs = [[int(n) for n in match if n] for match in GRID.findall(str(points))]
    if not pairs or not isinstance(side, int) or any(n % side for pair in pairs for n in pair):
        raise source.refused(f"image_grid_pinpoints = {points!r} in config.json are not made of views of {side} pixels")
    return [f"{width // side}x{height // side}" for width, height in pairs]


LAYOUTS = (
    Layout(
        "LLaVA (original, with its tower)",
        lambda source: is_llava(source) and holds_tower(source),
        {"llm": LLM, "vision": TOWER, "vision_projector": PROJECTOR},
        original_settings,
    ),
    Layout(
        "LLaVA (original)",
        lambda source: is_llava(source) and not holds_tower(source),
        {"llm": LLM, "vision_projector": PROJECTOR},
        original_settings,
        nothing=(FROZEN_TOWER,),
    ),
)
