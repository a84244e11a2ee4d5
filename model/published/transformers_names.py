"""Names of tensors in the folders of transformers: those of the hub (4.x) and those of 5.x, which differ in their prefixes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig

from model.files.hub import without_code
from model.files.untrusted import Json
from model.published.layout import PartView, Published

LLM_NAMES = (
    (r"language_model\.model\.(?=model\.)", ""),  # as transformers 5.17 saves Qwen2-Audio
    (r"language_model\.(?=model\.|transformer\.|lm_head\.)", ""),
    (r"model\.language_model\.", ""),  # without the prefix of the decoder, which the reader of the language model adds
    (r"(?=lm_head\.)", ""),
)
TOWER_NAMES = ((r"(model\.)?vision_tower\.(vision_model\.)?", ""),)
ENCODER_NAMES = ((r"(model\.)?audio_tower\.", ""),)
NEWLINE = (r"(model\.)?(?=image_newline$)", "")


def llm_part(source: Published) -> Json:
    """Return config.json of the language model. Whether its head is tied is what transformers' class of the whole model says."""
    found = nested_config(source, "text_config") | {
        "tie_word_embeddings": bool(getattr(source.whole, "tie_word_embeddings", False))
    }
    if "quantization_config" in source.config:
        found.setdefault("quantization_config", source.config["quantization_config"])
    return found


def tower_part(source: Published) -> Json:
    """Return config.json of the vision tower."""
    return nested_config(source, "vision_config")


def encoder_part(source: Published) -> Json:
    """Return config.json of the audio encoder."""
    return nested_config(source, "audio_config")


def nested_config(source: Published, key: str) -> Json:
    """Return a part's config.json as it is written, with what transformers' class of the whole model fills in."""
    part: PretrainedConfig = getattr(source.whole, key)
    filled = {name: value for name, value in without_code(part.to_diff_dict()).items() if _is_plain(value) and name != "dtype"}
    return {**filled, "model_type": part.model_type, **(source.config.get(key) or {})}


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | list | dict)


LLM = PartView(LLM_NAMES, llm_part)
TOWER = PartView(TOWER_NAMES, tower_part)
ENCODER = PartView(ENCODER_NAMES, encoder_part)


def projector_view(*layers: tuple[str, str], newline: bool = False) -> PartView:
    """Return the view of a projector whose layers have these names in the files and here."""
    names = tuple((rf"(model\.)?multi_modal_projector\.{old}\.", f"{new}.") for old, new in layers)
    return PartView((*names, NEWLINE) if newline else names)


def is_class(*names: str) -> Callable[[Published], bool]:
    """Return a test of config.json for these classes of transformers."""
    return lambda source: any(name in names for name in source.config.get("architectures") or ())
