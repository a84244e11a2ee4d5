"""Checks that an earlier run's weights are valid in a new model: same bases, same features, same adapters."""

from __future__ import annotations

from pathlib import Path

from model.card import ModelCard
from model.errors import ConfigError
from model.files.hub import hugging_face_config
from model.media_spec import spec_to_json
from model.vision.tower import num_blocks

FEATURES = (
    ("vision", "layer"),
    ("vision", "select"),
    ("vision_projector", "kind"),
    ("audio", "window"),
    ("audio_projector", "kind"),
)
"""Settings that decide what features mean: part and key."""


def check_same_bases(saved: ModelCard, card: ModelCard, folder: Path, setting: str) -> None:
    """Refuse an earlier run's weights on other bases than those they were trained on, or with other features."""
    for name in saved.hugging_face:
        if name not in card.hugging_face:
            raise ConfigError(f"{setting} = {str(folder)!r} has the part {name} too: configure [model.{name}] as well")
        if saved.hugging_face[name] != card.hugging_face[name]:
            raise ConfigError(f"{setting} = {str(folder)!r} was trained on another {name} model than model.{name}.path names")
    check_same_features(saved, card, folder, setting)


def check_same_features(saved: ModelCard, card: ModelCard, folder: Path, setting: str) -> None:
    """Refuse features made in another way than in training: projector and language model understand no others."""
    now = _features(card)
    pairs: dict[str, tuple[object, object]] = {key: (then, now[key]) for key, then in _features(saved).items() if then != now[key]}
    if "model.vision.layer" in pairs and _same_layer(saved, card):
        del pairs["model.vision.layer"]
    for modality, spec in saved.specs.items():
        old, new = spec_to_json(spec), spec_to_json(card.specs[modality])
        changed = {k for k in old if old[k] != new[k]} - {"select", "full_window"}  # FEATURES compares both already
        # A run may add prompts before clips, line breaks behind tiles, or a state head; it may not drop those that were learned.
        changed -= {key for key in ("num_prompts", "num_states", "newline") if not old.get(key)}
        pairs |= {f"{modality} {k}": (old[k], new[k]) for k in sorted(changed)}
    if pairs:
        differences = "; ".join(
            f"{key} = {new!r}, but {str(folder)!r} was trained with {old!r}" for key, (old, new) in pairs.items()
        )
        raise ConfigError(f"{setting}: {differences}: use the same values")


def _features(card: ModelCard) -> dict[str, object]:
    """Return the settings that decide what features mean, of the configured parts."""
    parts = card.model.parts()
    return {f"model.{name}.{key}": getattr(parts[name], key) for name, key in FEATURES if name in parts}


def _same_layer(one: ModelCard, other: ModelCard) -> bool:
    """Tell whether two cards read the same layer: layers may be counted from either end."""
    config = hugging_face_config("model.vision.path", one.hugging_face["vision"])
    layers = {card.model.vision.layer for card in (one, other) if card.model.vision is not None}
    total = getattr(config, "num_hidden_layers", 0) or config.depth  # Qwen-VL's towers say depth
    return len({num_blocks(layer, total) for layer in layers}) == 1


LORA_SHAPE = ("rank", "alpha", "rslora", "targets")


def continued_parts(saved: ModelCard, card: ModelCard, folder: Path) -> frozenset[str]:
    """Return the parts whose adapters continue training on the matrices they were trained on.

    All other adapters are merged: those of parts without LoRA now, and those of another shape, on which new adapters start. Raises
    `ConfigError` when the matrices are quantised differently now.
    """
    if any(getattr(saved.lora, key) != getattr(card.lora, key) for key in LORA_SHAPE):
        return frozenset()
    parts = saved.lora_parts & card.lora_parts
    if parts and saved.quantize != card.quantize:
        raise ConfigError(
            f"quantize = {card.quantize}, but the adapter in {folder} was trained with {saved.quantize}: use the same, or merge it "
            "first with tools.merge_lora"
        )
    return parts
