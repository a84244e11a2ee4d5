"""Names of tensors in the folders of transformers: those of the hub (4.x) and those of 5.x, which differ in their prefixes."""

from __future__ import annotations

from collections.abc import Callable

from model.files.hub import hugging_face_config
from model.published.layout import Json, PartView, Published

LLM_NAMES = (
    (r"language_model\.(?=model\.|transformer\.|lm_head\.)", ""),
    (r"model\.language_model\.", ""),  # without the prefix of the decoder, which the reader of the language model adds
    (r"(?=lm_head\.)", ""),
)
TOWER_NAMES = ((r"(model\.)?vision_tower\.(vision_model\.)?", ""),)
NEWLINE = (r"(model\.)?(?=image_newline$)", "")


def text_config(source: Published) -> Json:
    """Return config.json of the language model. Whether its head is tied is what transformers' class of the whole model says."""
    found = dict(source.config.get("text_config") or {})
    if not found:
        raise source.refused("config.json has no text_config")
    found.setdefault("model_type", "llama")  # older folders of LLaVA leave it out
    whole = hugging_face_config(source.setting, source.config)
    found["tie_word_embeddings"] = bool(whole.tie_word_embeddings)
    if "quantization_config" in source.config:
        found.setdefault("quantization_config", source.config["quantization_config"])
    return found


def vision_config(source: Published) -> Json:
    """Return config.json of the vision tower."""
    found = dict(source.config.get("vision_config") or {})
    if not found:
        raise source.refused("config.json has no vision_config")
    found.setdefault("model_type", "clip_vision_model")
    return found


LLM = PartView(LLM_NAMES, text_config)
TOWER = PartView(TOWER_NAMES, vision_config)


def projector_view(*layers: tuple[str, str], newline: bool = False) -> PartView:
    """Return the view of a projector whose layers have these names in the files and here."""
    names = tuple((rf"(model\.)?multi_modal_projector\.{old}\.", f"{new}.") for old, new in layers)
    return PartView((*names, NEWLINE) if newline else names)


def is_class(*names: str) -> Callable[[Published], bool]:
    """Return a test of config.json for these classes of transformers."""
    return lambda source: any(name in names for name in source.config.get("architectures") or ())
