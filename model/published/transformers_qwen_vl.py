"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL as published: pictures at their own size, positions of three axes, a merger of 2 x 2 patches.

The language model is that of Qwen2 or Qwen3 but for its positions, and is built as that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from model.files.tensor_files import LazyTensor, Tensors
from model.files.untrusted import Json
from model.published.layout import Given, Layout, PartView, Published, Settings
from model.published.processor_files import feature_token, pixel_settings, placeholder_setting, template_setting
from model.published.transformers_names import is_class, nested_config

VISION_NAMES = ((r"(model\.)?visual\.(?!merger\.|deepstack_merger_list\.)", ""),)
MERGER_NAMES = ((r"(model\.)?visual\.merger\.", ""), (r"(model\.)?visual\.deepstack_merger_list\.", "deepstack."))
LLM_NAMES = (
    (r"model\.language_model\.", ""),
    (r"language_model\.(?=model\.|lm_head\.)", ""),
    (r"(?=model\.(embed_tokens|layers|norm)\.)", ""),
    (r"(?=lm_head\.)", ""),
)
AROUND = ("<|vision_start|>", "<|vision_end|>")
"""Tokens around a picture or video, for a template that does not write them."""
PLAIN_TEXT = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""Language models inside, and the plain ones they are but for their positions."""


def text_part(interleaved: bool) -> Callable[[Published], Json]:
    """Return how to read config.json of the language model, under the model_type of its plain form."""

    def read(source: Published) -> Json:
        whole: Any = source.whole
        found = nested_config(source, "text_config")
        rope = dict(whole.text_config.rope_parameters)
        # The file may have them under an older name beside these, which would be read twice.
        for old in ("rope_scaling", "rope_theta", "vision_config"):
            found.pop(old, None)
        sections = rope.pop("mrope_section", None) or default_sections(interleaved)
        rope.pop("mrope_interleaved", None)
        if hasattr(whole.text_config, "num_experts"):  # its routers always share the weights out among the chosen experts
            found |= {"num_experts": whole.text_config.num_experts, "norm_topk_prob": True}
        found |= {
            "model_type": PLAIN_TEXT[whole.text_config.model_type],
            "tie_word_embeddings": bool(whole.tie_word_embeddings),
            "rope_parameters": rope,
            "mrope_section": list(sections),
            "mrope_interleaved": interleaved,
        }
        return found

    return read


def default_sections(interleaved: bool) -> list[int]:
    """Return the pairs of numbers of each axis where config.json names none, as transformers' classes fill them in."""
    return [24, 20, 20] if interleaved else [16, 24, 24]


def visual_part(source: Published) -> Json:
    """Return config.json of the tower."""
    whole: Any = source.whole
    return {**nested_config(source, "vision_config"), "model_type": type(whole.vision_config).model_type}


def visual_settings(kind: str, stamps: tuple[str, ...]) -> Callable[[Published], Settings]:
    """Return what follows from a model whose merger is of this kind, and which has these tokens around frames."""

    def read(source: Published) -> Settings:
        pixels = pixel_settings(source)
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if pixels.get(key) is False:
                raise source.refused(
                    f"{key} = false among the image processor's settings; pictures are resized and normalised here"
                )
        return {
            "model.vision.layer": Given(-1),
            "model.vision.select": Given("patch"),
            "model.vision.scales": Given([]),
            "model.vision.placeholder": feature_token(source, "image_token", "<|image_pad|>"),
            "model.vision.video_placeholder": placeholder_setting(source, "video_token", "<|video_pad|>"),
            "model.vision.video_stamps": Given(list(stamps)),
            "model.vision_projector.kind": Given(kind),
            "model.vision_projector.newline": Given(False),
            "data.image_fit": Given("native"),
            "data.media_wrap": Given([], also=(list(AROUND),)),  # its own template writes them
            "data.template": template_setting(source),
        }

    return read


def upright_experts(tensors: Tensors) -> Tensors:
    """Turn the fused matrices of experts, which Qwen3-VL's files on the hub hold lying on their side, as they stand in memory."""
    found = dict(tensors)
    for name, rows in tensors.items():
        block, experts, _ = name.rpartition("experts.gate_up_proj")
        down = tensors.get(f"{block}experts.down_proj")
        gate = tensors.get(f"{block}gate.weight")
        if not experts or down is None or gate is None:
            continue
        width = gate.shape[1]
        if rows.shape[1] == width == down.shape[2] and not rows.shape[2] == width == down.shape[1]:
            found |= {name: turned(rows), f"{block}experts.down_proj": turned(down)}
    return found


def turned(tensor: LazyTensor) -> LazyTensor:
    """Return matrices (E, a, b) as (E, b, a)."""
    experts, high, wide = tensor.shape
    return LazyTensor((experts, wide, high), lambda a, b: tensor.read(a, b).transpose(1, 2), tensor.dtype)


def _layout(name: str, cls: str, kind: str, interleaved: bool = False) -> Layout:
    parts = {
        "llm": PartView(LLM_NAMES, text_part(interleaved), upright_experts),
        "vision": PartView(VISION_NAMES, visual_part),
        "vision_projector": PartView(MERGER_NAMES),
    }
    return Layout(
        f"{name} (transformers)", is_class(cls), parts, visual_settings(kind, AROUND if interleaved else ()), reference=cls
    )


LAYOUTS = (
    _layout("Qwen2-VL", "Qwen2VLForConditionalGeneration", "qwen2_vl_merger"),
    _layout("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl_merger"),
    _layout("Qwen3-VL", "Qwen3VLForConditionalGeneration", "qwen3_vl_merger", interleaved=True),
    _layout("Qwen3-VL-MoE", "Qwen3VLMoeForConditionalGeneration", "qwen3_vl_merger", interleaved=True),
)
