"""Gemma 3 as a class of transformers: what it has, as the folders on the hub write it."""

from __future__ import annotations

from collections.abc import Iterator

from model.card import ModelCard
from model.exports.hf_native import layer_problems
from model.exports.hf_problems import audio_problems
from model.exports.media_facts import MediaFacts
from model.files.untrusted import Json
from model.llm.picture_attention import TWO_WAY
from model.media_spec import ImageSpec, image_spec, view_tokens
from model.multimodal import MultimodalLM
from model.vision.grid_projector import GEMMA_EPSILON

PROJECTOR_NAMES = (("", "multi_modal_projector."),)
TOWER_NAME = "vision_tower.vision_model."
SIGLIP, TEXT = "siglip_vision_model", "gemma3_text"


def gemma_problems(card: ModelCard, facts: MediaFacts) -> Iterator[str]:
    """Yield what the class cannot express of a run."""
    vision, tower, text = card.model.vision, card.hugging_face["vision"], card.hugging_face["llm"]
    assert vision is not None
    if (kind := tower["model_type"]) != SIGLIP:
        yield f"model.vision.path: {kind!r} is not {SIGLIP}, the one tower of this class"
        return
    yield from layer_problems(card, "num_hidden_layers")
    if not vision.final_norm:
        yield "model.vision.final_norm = false: this class reads its tower behind its last norm"
    if (found := tower.get("layer_norm_eps", GEMMA_EPSILON)) != GEMMA_EPSILON:
        yield f"model.vision.path: layer_norm_eps = {found}, by which this class norms pooled rows too; here by {GEMMA_EPSILON}"
    if (kind := text["model_type"]) != TEXT:
        yield f"model.llm.path: {kind!r} is not {TEXT}, the one language model of this class"
    if (way := card.model.llm.image_attention) != TWO_WAY:
        yield f"model.llm.image_attention = {way!r}: in this class tokens of one picture see each other in both directions"
    if vision.scales:
        yield f"model.vision.scales = {list(vision.scales)}: this class sees one size"
    if facts.fit != "square":
        yield f"data.image_fit = {facts.fit!r}: its processor distorts pictures to a square ('square')"
    before, behind = facts.around
    if not (before.startswith("\n\n") and behind.endswith("\n\n") and before.strip() in facts.ids and behind.strip() in facts.ids):
        yield (
            f"data.media_wrap = {list(facts.wrap)}: its processor writes two line breaks and a token before a picture, a token and "
            r"two line breaks behind it, as ['\n\n<start_of_image>', '<end_of_image>\n\n']"
        )
    yield from audio_problems(card)


def gemma_config(card: ModelCard, model: MultimodalLM, facts: MediaFacts) -> Json:
    """Return the class's own keys of config.json."""
    spec = image_spec(card.specs)
    before, behind = facts.around
    return {
        "vision_config": {**card.hugging_face["vision"], "image_size": spec.size, "vision_use_head": False},
        "mm_tokens_per_image": view_tokens(spec),
        "boi_token_index": facts.ids[before.strip()],
        "eoi_token_index": facts.ids[behind.strip()],
        "image_token_index": facts.ids["image"],
    }


def gemma_reader(spec: ImageSpec) -> tuple[Json, Json]:
    """Return the keys of the processor, and those of its image processor, by which pictures are counted and sized."""
    tokens = {"image_seq_length": view_tokens(spec)}
    sides = {"height": spec.size, "width": spec.size}
    return tokens, {"image_processor_type": "Gemma3ImageProcessor", "size": sides, "do_pan_and_scan": None, **tokens}


def gemma_tokens(facts: MediaFacts) -> dict[str, str]:
    """Return the tokens that the processor looks up by name in its tokenizer."""
    before, behind = facts.around
    return {"boi_token": before.strip(), "eoi_token": behind.strip(), "image_token": facts.tokens["image"]}
