"""Idefics3 and SmolVLM as classes of transformers: what each has, as the folders on the hub write it."""

from __future__ import annotations

from collections.abc import Iterator

from model.card import ModelCard
from model.exports.hf_native import layer_problems
from model.exports.hf_problems import audio_problems
from model.exports.media_facts import MediaFacts
from model.files.untrusted import Json
from model.media_spec import ImageSpec, image_spec, view_tokens
from model.multimodal import MultimodalLM
from model.vision.projector import SHUFFLES

CONNECTOR_NAMES = (("proj.", "model.connector.modality_projection.proj."),)
DECODER_NAMES = (("model.", "model.text_model."), ("", ""))
TOWER_NAME = "model.vision_model."


def idefics_problems(card: ModelCard, facts: MediaFacts, tower: str) -> Iterator[str]:
    """Yield what a class cannot express of a run. `tower`: model_type of the one tower of the class."""
    vision, found = card.model.vision, card.hugging_face["vision"]
    assert vision is not None
    if (kind := found["model_type"]) != tower:
        yield f"model.vision.path: {kind!r} is not {tower}, the one tower of this class"
        return
    yield from layer_problems(card, "num_hidden_layers")
    if vision.scales:
        yield f"model.vision.scales = {list(vision.scales)}: this class sees one size"
    if facts.fit != "idefics":
        yield f"data.image_fit = {facts.fit!r}: its processor reads pictures as 'idefics' does, and no others"
    yield from audio_problems(card)


def idefics_config(card: ModelCard, model: MultimodalLM, facts: MediaFacts) -> Json:
    """Return the class's own keys of config.json."""
    projector = card.model.vision_projector
    assert projector is not None
    own: Json = {"image_token_id": facts.ids["image"], "scale_factor": SHUFFLES[projector.kind]}
    if (pad := card.hugging_face["llm"].get("pad_token_id")) is not None:
        own["pad_token_id"] = pad
    return {"vision_config": {**card.hugging_face["vision"], "image_size": image_spec(card.specs).size}, **own}


def frame_reader(spec: ImageSpec, facts: MediaFacts) -> Json:
    """Return the keys of SmolVLM's processor of videos by which it chooses and sizes frames."""
    sides = {"size": {"longest_edge": facts.longest}, "max_image_size": {"longest_edge": spec.size}}
    return {"video_processor_type": "SmolVLMVideoProcessor", "do_pad": True, **sides, "video_sampling": frame_sampling(facts)}


def frame_sampling(facts: MediaFacts) -> Json:
    """Return how many frames of a video SmolVLM looks at."""
    fps, most = facts.sampling
    return {"fps": fps, "max_frames": most, "video_size": {"longest_edge": facts.longest}}


def idefics_reader(spec: ImageSpec, facts: MediaFacts, kind: str) -> tuple[Json, Json]:
    """Return the keys of the processor, and those of its image processor, of class `kind`, by which pictures are cut."""
    sides = {"size": {"longest_edge": facts.longest}, "max_image_size": {"longest_edge": spec.size}}
    return {"image_seq_len": view_tokens(spec)}, {
        "image_processor_type": kind,
        "do_image_splitting": facts.cut,
        "do_pad": True,
        **sides,
        **({"video_sampling": frame_sampling(facts)} if kind.startswith("SmolVLM") else {}),  # where older versions look
    }
