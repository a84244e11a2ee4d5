"""GLM-4.1V and GLM-4.6V-Flash as published: pictures at their own size, positions of three axes, sandwich norms.

The language model is that of GLM-4 but for its positions, and is built as that.
"""

from __future__ import annotations

from typing import Any

from model.files.untrusted import Json
from model.published.layout import Given, Layout, PartView, Published, Settings
from model.published.processor_files import check_pixels_changed, feature_token, template_setting
from model.published.transformers_names import is_class, nested_config
from model.published.transformers_qwen_vl import LLM_NAMES

CLASS, TOWER = "Glm4vForConditionalGeneration", "glm4v_vision"
VISION_NAMES = ((r"(model\.)?visual\.(?!merger\.|downsample\.)", ""),)
MERGER_NAMES = ((r"(model\.)?visual\.(?=merger\.|downsample\.)", ""),)
AROUND = ("<|begin_of_image|>", "<|end_of_image|>")
"""Tokens around a picture, which its own template writes."""
TOKENS = {
    **{"image": "<|image|>", "video": "<|video|>"},
    **{"image_start": AROUND[0], "image_end": AROUND[1]},
    **{"video_start": "<|begin_of_video|>", "video_end": "<|end_of_video|>"},
}
"""Tokens of media, by the beginning of the key in config.json that holds their number."""
ANSWER_END = "<|user|>"
"""Token that ends an answer: it begins the next turn, and its template writes nothing behind the last answer."""
SECTIONS = (8, 12, 12)
"""Pairs of numbers of each axis where config.json names none, as transformers' class fills them in."""
SAME_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_dropout", "pad_token_id"),
)
"""Keys of the language model that mean the same in GLM-4, where several have other defaults."""


def glm_text(source: Published) -> Json:
    """Return config.json of the language model, under the model_type of its plain form. Raises `ConfigError` for odd positions."""
    whole: Any = source.whole
    text = whole.text_config
    head, rope = text.hidden_size // text.num_attention_heads, dict(text.rope_parameters)
    if rope.get("rope_type", "default") != "default":
        raise source.refused(f"rope_type = {rope['rope_type']!r} in config.json; its positions are read in their plain form alone")
    if (own := getattr(text, "head_dim", None) or head) != head:
        raise source.refused(f"head_dim = {own} in config.json, and its class shares hidden_size among its heads: {head} for each")
    found = nested_config(source, "text_config") | {key: getattr(text, key) for key in SAME_KEYS}
    for old in ("rope_scaling", "rope_theta", "partial_rotary_factor", "vision_config"):
        found.pop(old, None)
    return found | {
        "model_type": "glm4",
        "head_dim": head,
        "attention_bias": True,
        "tie_word_embeddings": bool(whole.tie_word_embeddings),
        "mrope_section": list(rope.pop("mrope_section", None) or SECTIONS),
        "mrope_interleaved": False,
        "rope_parameters": {"partial_rotary_factor": 1.0, **rope},
    }


def glm_tower(source: Published) -> Json:
    """Return config.json of the tower, whose model_type older versions write as that of the whole model."""
    return {**nested_config(source, "vision_config"), "model_type": TOWER}


def glm_settings(source: Published) -> Settings:
    """Return what follows from the model. Raises `ConfigError` for one whose parts are not as its class has them at first."""
    whole: Any = source.whole
    vision, text = whole.vision_config, whole.text_config
    if "text_config" not in source.config:
        raise source.refused(
            "config.json has no text_config: later versions of transformers read none of the keys at its top; open it with "
            "transformers 5.17 and save it again"
        )
    for key, value, wanted in (
        ("text_config.model_type", type(text).model_type, "glm4v_text"),
        ("vision_config.model_type", type(vision).model_type, TOWER),
        ("vision_config.hidden_act", vision.hidden_act, "silu"),
        ("vision_config.spatial_merge_size", vision.spatial_merge_size, 2),
        ("vision_config.out_hidden_size", vision.out_hidden_size, text.hidden_size),
    ):
        if value != wanted:
            raise source.refused(f"{key} = {value!r} in config.json; this layout is read with {wanted!r} alone")
    check_pixels_changed(source)
    return {
        "model.vision.layer": Given(-1),
        "model.vision.select": Given("patch"),
        "model.vision.scales": Given([]),
        "model.vision.placeholder": feature_token(source, "image_token", TOKENS["image"]),
        "model.vision.video_stamps": Given(list(AROUND)),
        "model.vision_projector.kind": Given("glm4v_merger"),
        "model.vision_projector.newline": Given(False),
        "data.image_fit": Given("native"),
        "data.media_wrap": Given([], also=(list(AROUND),)),  # its own template writes them
        "data.template": template_setting(source),
        "data.answer_end": Given(ANSWER_END, free=True, when=("data.template", "auto")),
    }


LAYOUTS = (
    Layout(
        "GLM-4.1V, GLM-4.6V-Flash (transformers)",
        is_class(CLASS),
        {
            "llm": PartView(LLM_NAMES, glm_text),
            "vision": PartView(VISION_NAMES, glm_tower),
            "vision_projector": PartView(MERGER_NAMES),
        },
        glm_settings,
        reference=CLASS,
    ),
)
