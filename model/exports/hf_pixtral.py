"""Classes of transformers with Pixtral's tower: what each has, as the folders on the hub write it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from model.card import ModelCard
from model.exports.hf_native import layer_problems
from model.exports.hf_problems import audio_problems
from model.exports.media_facts import MediaFacts
from model.files.untrusted import Json
from model.media_spec import ImageSpec, NativeSpec, image_spec
from model.multimodal import MultimodalLM
from model.vision.merger import MERGE

TOWER, PROCESSOR, MISTRAL_MERGER = "pixtral", "PixtralProcessor", "mistral3_merger"
MERGER_NAMES = (
    ("norm.", "multi_modal_projector.norm."),
    ("merging_layer.", "multi_modal_projector.patch_merger.merging_layer."),
    ("linear_", "multi_modal_projector.linear_"),
)
OF_LLAVA: Json = {"image_seq_length": 1, "multimodal_projector_bias": True, "vision_feature_select_strategy": "full"}
OF_MISTRAL: Json = {"spatial_merge_size": MERGE, "multimodal_projector_bias": False}
"""Keys of config.json that are the same for every model of a class."""


@dataclass(frozen=True)
class PixtralForm:
    """The projector that a class has, and the keys of config.json that follow from it."""

    kind: str
    own: Json
    epsilon: float | None = None  # of the language model's norms, by which the class's projector norms too; None: it has none


def pixtral_problems(card: ModelCard, facts: MediaFacts, form: PixtralForm) -> Iterator[str]:
    """Yield what a class cannot express of a run."""
    vision, projector, spec = card.model.vision, card.model.vision_projector, image_spec(card.specs)
    assert vision is not None and projector is not None
    if (kind := card.hugging_face["vision"]["model_type"]) != TOWER:
        yield f"model.vision.path: {kind!r} is not {TOWER}, the one tower of this class"
        return
    if projector.kind != form.kind:
        yield f"model.vision_projector.kind = {projector.kind!r}: with {TOWER}, transformers has 'mlp2x_gelu' or {MISTRAL_MERGER!r}"
    yield from layer_problems(card, "num_hidden_layers")
    if not isinstance(spec, NativeSpec) or not spec.line_ends:
        yield (
            f"model.vision.line_ends = []: {PROCESSOR} writes a token behind each line of a picture and another behind the last, "
            "on which this model was not trained; train with line_ends = ['[IMG_BREAK]', '[IMG_END]']"
        )
    found = card.hugging_face["llm"].get("rms_norm_eps")
    if form.epsilon is not None and found != form.epsilon:
        yield f"model.llm.path: rms_norm_eps = {found}, by which this class norms pictures too; training did by {form.epsilon}"
    yield from audio_problems(card)


def pixtral_config(card: ModelCard, model: MultimodalLM, facts: MediaFacts, form: PixtralForm) -> Json:
    """Return the class's own keys of config.json."""
    vision = dict(card.hugging_face["vision"])
    if rope := vision.pop("rope_parameters", None):
        vision["rope_theta"] = rope["rope_theta"]  # older versions know no kind of rotary positions by name
    common = {"image_token_index": facts.ids["image"], "projector_hidden_act": "gelu", "vision_feature_layer": -1}
    return {"vision_config": vision, **common, **form.own}


def pixtral_reader(spec: ImageSpec, facts: MediaFacts) -> tuple[Json, Json]:
    """Return the keys of the processor, and those of its image processor by which pictures are sized."""
    assert isinstance(spec, NativeSpec)
    behind_line, behind_last = spec.line_ends
    own = {
        "patch_size": spec.patch,
        "spatial_merge_size": spec.shrink,
        "image_token": facts.tokens["image"],
        "image_break_token": behind_line,
        "image_end_token": behind_last,
    }
    sides = {"patch_size": {"height": spec.patch, "width": spec.patch}, "size": {"longest_edge": facts.longest}}
    return own, {"image_processor_type": "PixtralImageProcessor", **sides}
