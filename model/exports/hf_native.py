"""Classes of transformers that read pictures at their own size: what each has, as the folders on the hub write it.

Qwen2-VL and Qwen2.5-VL have the keys of their language model at the top of config.json there, Qwen3-VL and GLM-4.1V in
`text_config`, and all have rotary positions under their older names: every version of transformers and vLLM that knows the class
reads that form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from model.card import ModelCard
from model.exports.media_facts import MediaFacts
from model.files.tensor_files import Entry
from model.files.untrusted import Json
from model.llm.multi_axis_rope import INTERLEAVED, SECTIONS
from model.media_spec import NativeSpec
from model.multimodal import MultimodalLM
from model.published import transformers_glm4v as glm
from model.published.transformers_qwen_vl import AROUND
from model.vision.merger import MERGE
from model.vision.native_kinds import NATIVE_TOWERS
from model.vision.tower_kinds import num_blocks

FUSED = (".experts.gate_up_proj", ".experts.down_proj")
NAMED_OTHERWISE = ("rope_parameters", SECTIONS, INTERLEAVED, "model_type", "architectures")
GLM, FIXED = "glm4", ("head_dim", "attention_bias")
"""Plain language model of GLM-4.1V, and its keys that the class has no choice of."""
HALF = 0.5
"""Part of a head that turns where config.json of a GLM-4 says nothing."""
OWN_HEADS = ("qwen3", "qwen3_moe")
"""Language models whose heads may be of any size."""
FILLED_IN = {"rope_type": "axial", "rope_theta": 10_000.0}
"""Rotary positions of towers as transformers fills them in; its older versions know no kind of this name."""


@dataclass(frozen=True)
class NativeForm:
    """The parts that a class has, and how its folders on the hub describe them."""

    tower: str  # model_type of the one tower
    merger: str  # kind of the one projector
    text: str  # model_type of the language model, as a plain one
    width: str  # key of the tower's config.json for the numbers in a token
    inside: str = ""  # model_type of `text_config`; "" = the language model's keys stand at the top
    videos: str = "Qwen2VLVideoProcessor"
    interleaved: bool = False  # the axes of positions take turns, as in Qwen3-VL
    around: tuple[str, str] = AROUND  # tokens around a picture
    layers: str = "merger."  # what stands before the names of the projector's layers in the tower's
    ids: tuple[str, ...] = ("image", "video", "vision_start", "vision_end")  # tokens whose numbers stand in config.json


_QWEN3: Any = {"width": "out_hidden_size", "videos": "Qwen3VLVideoProcessor", "interleaved": True}
FORMS = {
    "Qwen2VLForConditionalGeneration": ("qwen2_vl", NativeForm("qwen2_vl_vision", "qwen2_vl_merger", "qwen2", "hidden_size")),
    "Qwen2_5_VLForConditionalGeneration": (
        "qwen2_5_vl",
        NativeForm("qwen2_5_vl_vision", "qwen2_5_vl_merger", "qwen2", "out_hidden_size"),
    ),
    "Qwen3VLForConditionalGeneration": (
        "qwen3_vl",
        NativeForm("qwen3_vl_vision", "qwen3_vl_merger", "qwen3", inside="qwen3_vl_text", **_QWEN3),
    ),
    "Qwen3VLMoeForConditionalGeneration": (
        "qwen3_vl_moe",
        NativeForm("qwen3_vl_moe_vision", "qwen3_vl_merger", "qwen3_moe", inside="qwen3_vl_moe_text", **_QWEN3),
    ),
    glm.CLASS: (
        "glm4v",
        NativeForm(
            *(glm.TOWER, "glm4v_merger", GLM, "out_hidden_size", "glm4v_text"),
            around=glm.AROUND,
            ids=tuple(glm.TOKENS),
            layers="",
        ),
    ),
}
"""model_type and parts of each class by its name."""


def native_problems(card: ModelCard, facts: MediaFacts, form: NativeForm) -> Iterator[str]:
    """Yield what a class cannot express of a run."""
    vision, projector = card.model.vision, card.model.vision_projector
    assert vision is not None and projector is not None
    tower, text = card.hugging_face["vision"], card.hugging_face["llm"]
    if tower["model_type"] != form.tower:
        yield f"model.vision.path: {tower['model_type']!r} is not {form.tower}, the one tower of this class"
        return
    yield from layer_problems(card, NATIVE_TOWERS[form.tower].depth)
    if tower.get("spatial_merge_size", MERGE) != MERGE:
        yield f"model.vision.path: spatial_merge_size = {tower['spatial_merge_size']} in config.json; {MERGE} x {MERGE} are joined"
    yield from _text_problems(text, form)
    if facts.around_pictures != form.around:
        yield (
            f"neither the chat template nor data.media_wrap writes {list(form.around)} around pictures, by which this class finds "
            f"them; train with data.media_wrap = {list(form.around)}"
        )
    if parts := [name for name in ("audio", "audio_projector", "state_head") if name in card.model.parts()]:
        yield f"[model.{'], [model.'.join(parts)}]: this class does not hear; --for safetensors writes each part's file"


def layer_problems(card: ModelCard, depth: str) -> Iterator[str]:
    """Yield a tower whose last block is not read. `depth`: key of its config.json with the number of blocks."""
    vision, total = card.model.vision, card.hugging_face["vision"][depth]
    assert vision is not None
    if (built := num_blocks(vision.layer, total)) != total:
        yield (
            f"model.vision.layer = {vision.layer}: this class reads its tower's last block, and the run read block {built} of "
            f"{total}; --for safetensors writes each part's file"
        )


def _text_problems(text: Json, form: NativeForm) -> Iterator[str]:
    if text["model_type"] != form.text:
        yield f"model.llm.path: {text['model_type']!r} is not {form.text}, the one language model of this class"
    elif not text.get(SECTIONS):
        yield f"model.llm.path: its positions have one axis, and those of this class three ({SECTIONS} in config.json)"
    elif bool(text.get(INTERLEAVED)) != form.interleaved:
        yield f"model.llm.path: {INTERLEAVED} = {text.get(INTERLEAVED)} in config.json, and {form.interleaved} in this class"
    hidden, wide = text["hidden_size"], text.get("moe_intermediate_size")
    if form.text == "qwen3_moe" and hidden in (wide, 2 * (wide or 0)):
        yield (
            f"model.llm.path: hidden_size = {hidden} and moe_intermediate_size = {wide}: a matrix of each expert is square, and "
            "transformers tells by the shape alone whether it lies on its side, as this class's files hold it; --for safetensors "
            "writes each part's file"
        )
    if form.text not in OWN_HEADS and text.get("head_dim", _head(text)) != _head(text):
        yield f"model.llm.path: head_dim = {text['head_dim']} in config.json; this class shares hidden_size among its heads"
    if form.text == GLM and not text.get("attention_bias", True):
        yield "model.llm.path: attention_bias = false in config.json; this class has biases of queries, keys and values"


def _head(text: Json) -> int:
    return int(text["hidden_size"] // text["num_attention_heads"])


def native_config(card: ModelCard, model: MultimodalLM, facts: MediaFacts, form: NativeForm) -> Json:
    """Return the class's own keys of config.json."""
    vision = {**card.hugging_face["vision"], form.width: model.llm.get_input_embeddings().weight.shape[1]}
    vision["model_type"] = form.tower.removesuffix("_vision")  # as older versions know it, and later ones still read it
    if vision.get("rope_parameters") == FILLED_IN:
        del vision["rope_parameters"]
    return {"vision_config": vision, **{f"{name}_token_id": facts.ids[name] for name in form.ids}}


def native_text(text: Json, form: NativeForm) -> Json:
    """Return config.json of a language model as it stands in the class's: at its top, or in `text_config`."""
    rope = {**text["rope_parameters"], SECTIONS: text[SECTIONS]}
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    found = {key: value for key, value in text.items() if key not in NAMED_OTHERWISE}
    if form.text == GLM:
        found = {key: value for key, value in found.items() if key not in FIXED}
        found["partial_rotary_factor"] = rope.pop("partial_rotary_factor", HALF)
    if form.inside:
        scaling = {"rope_type": kind, **rope, **({INTERLEAVED: True} if form.interleaved else {})}
        return {"text_config": {**found, "model_type": form.inside, "rope_theta": theta, "rope_scaling": scaling}}
    return {**found, "rope_theta": theta, "rope_scaling": {"type": "mrope" if kind == "default" else kind, **rope}}


def lying_experts(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Return tensors with the fused matrices of experts (E, a, b) as (E, b, a), which is how Qwen3-VL's files hold them."""
    return {name: _lying(entry) if name.endswith(FUSED) else entry for name, entry in entries.items()}


def _lying(entry: Entry) -> Entry:
    experts, high, wide = entry.shape
    return Entry(entry.dtype, (experts, wide, high), partial(_turned, entry))


def _turned(entry: Entry) -> Tensor | None:
    rows = entry.value()
    return None if rows is None else rows.transpose(1, 2).contiguous()


def native_pixels(spec: NativeSpec, facts: MediaFacts) -> Json:
    """Return the class of an image processor, and the keys by which it sizes and cuts pictures."""
    least, most = facts.pixels
    if spec.reader:  # it counts a picture in every frame of its patches
        return {"image_processor_type": f"{spec.reader}ImageProcessor", **_cut(spec, least * spec.frames, most * spec.frames)}
    return {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": least, "max_pixels": most, **_cut(spec, least, most)}


def native_clips(spec: NativeSpec, facts: MediaFacts, form: NativeForm) -> Json:
    """Return the keys of the class's processor of videos by which it sizes and cuts frames."""
    capped = {"cap_pixels_per_frame": True, "max_video_tokens": spec.video_tokens} if spec.video_tokens else {}
    kind = f"{spec.reader}VideoProcessor" if spec.reader else form.videos
    return {"video_processor_type": kind, **_cut(spec, *facts.clip_pixels), **capped}


def _cut(spec: NativeSpec, least: int, most: int) -> Json:
    return {
        "size": {"shortest_edge": least, "longest_edge": most},
        "patch_size": spec.patch,
        "temporal_patch_size": spec.frames,
        "merge_size": spec.multiple,
    }
