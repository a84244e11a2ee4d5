"""Keys of config.json of the classes of transformers that see one size of pictures, or hear."""

from __future__ import annotations

from model.card import ModelCard
from model.exports.hf_problems import INTERN_VIT, REGISTERS
from model.exports.media_facts import MediaFacts
from model.files.untrusted import Json
from model.media_spec import ImageSpec, MediaMeta, image_spec, num_tokens, view_tokens
from model.multimodal import MultimodalLM

BACKBONE = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")
"""Keys that name blocks of a backbone's feature pyramid: they may name blocks that are not built."""


def strategy(spec: ImageSpec) -> str:
    """Return `vision_feature_select_strategy`. `default` always drops row 0, so a tower without CLS needs `full`."""
    return "default" if spec.select == "patch" and spec.num_prefix else "full"


def tower_config(card: ModelCard) -> Json:
    """Return config.json of the whole tower, in transformers' form, for the run's size of views."""
    vision, side = dict(card.hugging_face["vision"]), image_spec(card.specs).size
    vision["image_size"] = [side, side] if isinstance(vision["image_size"], list) else side
    if vision["model_type"] == "siglip_vision_model":
        vision["vision_use_head"] = False
    if vision["model_type"] == INTERN_VIT:
        vision |= {"use_mean_pooling": True, "use_mask_token": False}  # no norm behind the last block, and no row for training
    if vision["model_type"] in ("dinov2", REGISTERS):
        vision = {key: value for key, value in vision.items() if key not in BACKBONE}
    if vision["model_type"] == "dinov2":
        vision["use_mask_token"] = False
    return vision


def feature_layer(card: ModelCard) -> int:
    """Return the place of the hidden state that is read, counted from the last."""
    vision = card.model.vision
    assert vision is not None
    total: int = card.hugging_face["vision"]["num_hidden_layers"]
    return vision.layer if vision.layer < 0 else vision.layer - total - 1


def seeing_config(card: ModelCard) -> Json:
    return {
        "vision_config": tower_config(card),
        "vision_feature_layer": feature_layer(card),
        "vision_feature_select_strategy": strategy(image_spec(card.specs)),
        "projector_hidden_act": "gelu",
    }


def llava_config(card: ModelCard, model: MultimodalLM, facts: MediaFacts) -> Json:
    own = {
        "image_token_index": facts.ids["image"],
        "image_seq_length": view_tokens(image_spec(card.specs)),
        "multimodal_projector_bias": True,
    }
    return seeing_config(card) | own


def next_config(card: ModelCard, model: MultimodalLM, facts: MediaFacts) -> Json:
    return llava_config(card, model, facts) | {"image_grid_pinpoints": facts.pinpoints(image_spec(card.specs).size)}


def onevision_config(card: ModelCard, model: MultimodalLM, facts: MediaFacts) -> Json:
    found = next_config(card, model, facts)
    del found["image_seq_length"]
    return found | {"vision_aspect_ratio": f"anyres_max_{facts.anyres_max}", "video_token_index": facts.ids["video"]}


def intern_config(card: ModelCard, model: MultimodalLM, facts: MediaFacts) -> Json:
    tokens = num_tokens(image_spec(card.specs), MediaMeta())
    own = {"image_token_id": facts.ids["image"], "image_seq_length": tokens, "downsample_ratio": 0.5}
    return seeing_config(card) | own


def hearing_config(card: ModelCard, model: MultimodalLM, facts: MediaFacts) -> Json:
    return {"audio_config": dict(card.hugging_face["audio"]), "audio_token_index": facts.ids["audio"]}
