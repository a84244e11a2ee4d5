"""Names of an adapter's tensors in PEFT's files, and here: of a bare language model, or of a model of several parts."""

from __future__ import annotations

import re

from model.lora import SUFFIXES

PREFIX = "base_model.model."
INSIDE: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(model\.)?language_model\.(?=(model|transformer)\.)"), "llm."),
    (re.compile(r"(model\.)?language_model\."), "llm.{decoder}."),
    (re.compile(r"(model\.)?vision_tower\.(vision_tower\.)?(vision_model\.)?"), "vision.tower."),
    (re.compile(r"(model\.)?audio_tower\."), "audio.tower."),
)
"""Beginnings of names in a model of several parts, in transformers 4.x and 5.x and in LLaVA, and what the part is called here."""

ELSEWHERE = re.compile(r"(model\.)?(text_model|thinker|vision_model|visual)\.")
"""Beginnings of names in models of several parts whose layers are not those of a part here."""
PROJECTORS = ("multi_modal_projector", "mm_projector", "mlp1")
"""Names of the projector in models of several parts."""


def is_inside(name: str) -> bool:
    """Tell whether PEFT's name of a tensor is that of a layer inside a model of several parts."""
    return any(pattern.match(name.removeprefix(PREFIX)) for pattern in (*(pattern for pattern, _ in INSIDE), ELSEWHERE))


def our_name(name: str, decoder: str = "model") -> str:
    """Return our full name of a tensor that PEFT calls `name`. `decoder`: name of the decoder in the language model's class."""
    plain = name.removeprefix(PREFIX)
    for suffix in SUFFIXES:
        plain = plain.removesuffix(".weight") if plain.endswith(f"{suffix}.weight") else plain
    path, _, kind = plain.rpartition(".")
    for pattern, new in INSIDE:
        if match := pattern.match(path):
            return f"{new.format(decoder=decoder)}{path[match.end() :].removesuffix('.base_layer')}.{kind}"
    return f"llm.{path.removesuffix('.base_layer')}.{kind}"


def module_path(name: str) -> str:
    """Return the path of the adapted module that a tensor belongs to, as PEFT's selectors see it."""
    plain = name.removeprefix(PREFIX).removesuffix(".weight")
    return plain.rpartition(".")[0].removesuffix(".base_layer")


def is_saved_projector(name: str) -> bool:
    """Tell whether PEFT's name of a tensor is that of a projector that was saved whole beside an adapter."""
    return any(f".{word}." in f".{name}" for word in PROJECTORS)
