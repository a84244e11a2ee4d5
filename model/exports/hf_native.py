"""Classes of transformers that read pictures at their own size: what each has, as the folders on the hub write it.

Qwen2-VL and Qwen2.5-VL have the keys of their language model at the top of config.json there, with rotary positions under their
older names: every version of transformers and vLLM reads that form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from model.card import ModelCard
from model.exports.media_facts import MediaFacts
from model.files.untrusted import Json
from model.llm.multi_axis_rope import INTERLEAVED, SECTIONS
from model.media_spec import NativeSpec
from model.multimodal import MultimodalLM
from model.published.transformers_qwen_vl import AROUND
from model.vision.merger import MERGE
from model.vision.native_kinds import NATIVE_TOWERS
from model.vision.tower_kinds import num_blocks

FILLED_IN = {"rope_type": "axial", "rope_theta": 10_000.0}
"""Rotary positions of towers as transformers fills them in; its older versions know no kind of this name."""


@dataclass(frozen=True)
class NativeForm:
    """The parts that a class has, and how its folders on the hub describe them."""

    tower: str  # model_type of the one tower
    merger: str  # kind of the one projector
    text: str  # model_type of the language model, as a plain one
    width: str  # key of the tower's config.json for the numbers in a token
    interleaved: bool = False  # the axes of positions take turns


def native_problems(card: ModelCard, facts: MediaFacts, form: NativeForm) -> Iterator[str]:
    """Yield what a class cannot express of a run."""
    vision, projector = card.model.vision, card.model.vision_projector
    assert vision is not None and projector is not None
    tower, text = card.hugging_face["vision"], card.hugging_face["llm"]
    if tower["model_type"] != form.tower:
        yield f"model.vision.path: {tower['model_type']!r} is not {form.tower}, the one tower of this class"
        return
    total = tower[NATIVE_TOWERS[form.tower].depth]
    if (built := num_blocks(vision.layer, total)) != total:
        yield (
            f"model.vision.layer = {vision.layer}: this class reads its tower's last block, and the run read block {built} of "
            f"{total}; --for safetensors writes each part's file"
        )
    if tower.get("spatial_merge_size", MERGE) != MERGE:
        yield f"model.vision.path: spatial_merge_size = {tower['spatial_merge_size']} in config.json, and {MERGE} x {MERGE} are joined"
    yield from _text_problems(text, form)
    if facts.around_pictures != AROUND:
        yield (
            f"neither the chat template nor data.media_wrap writes {list(AROUND)} around pictures, by which this class finds them; "
            f"train with data.media_wrap = {list(AROUND)}"
        )
    if parts := [name for name in ("audio", "audio_projector", "state_head") if name in card.model.parts()]:
        yield f"[model.{'], [model.'.join(parts)}]: this class does not hear; --for safetensors writes each part's file"


def _text_problems(text: Json, form: NativeForm) -> Iterator[str]:
    rope = text.get("rope_parameters") or {}
    if text["model_type"] != form.text:
        yield f"model.llm.path: {text['model_type']!r} is not {form.text}, the one language model of this class"
    elif not rope.get(SECTIONS):
        yield f"model.llm.path: its positions have one axis, and those of this class three ({SECTIONS} in config.json)"
    elif bool(rope.get(INTERLEAVED)) != form.interleaved:
        yield f"model.llm.path: {INTERLEAVED} = {rope.get(INTERLEAVED)} in config.json, and {form.interleaved} in this class"
    if text.get("head_dim", _head(text)) != _head(text):
        yield f"model.llm.path: head_dim = {text['head_dim']} in config.json; this class shares hidden_size among its heads"


def _head(text: Json) -> int:
    return int(text["hidden_size"] // text["num_attention_heads"])


def native_config(card: ModelCard, model: MultimodalLM, facts: MediaFacts, form: NativeForm) -> Json:
    """Return the class's own keys of config.json."""
    vision = {**card.hugging_face["vision"], form.width: model.llm.get_input_embeddings().weight.shape[1]}
    if vision.get("rope_parameters") == FILLED_IN:
        del vision["rope_parameters"]
    names = ("image", "video", "vision_start", "vision_end")
    return {"vision_config": vision, **{f"{name}_token_id": facts.ids[name] for name in names}}


def older_text(text: Json) -> Json:
    """Return config.json of a language model as it stands at the top of the folders on the hub."""
    rope = {key: value for key, value in text["rope_parameters"].items() if key != INTERLEAVED}
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type", "default")
    found = {key: value for key, value in text.items() if key not in ("rope_parameters", "model_type", "architectures")}
    return {**found, "rope_theta": theta, "rope_scaling": {"type": "mrope" if kind == "default" else kind, **rope}}


def native_pixels(spec: NativeSpec, facts: MediaFacts) -> Json:
    """Return the keys of an image processor by which it sizes and cuts pictures."""
    least, most = facts.pixels
    return {
        "min_pixels": least,
        "max_pixels": most,
        "size": {"shortest_edge": least, "longest_edge": most},
        "patch_size": spec.patch,
        "temporal_patch_size": spec.frames,
        "merge_size": spec.multiple,
    }
