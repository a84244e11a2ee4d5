"""Export of the language model alone, as a Hugging Face folder for its own class."""

from __future__ import annotations

from pathlib import Path

import torch

from model.build import assemble
from model.card import ModelCard
from model.exports.hf_text import sizes_of
from model.exports.hf_weights import model_entries, write_weights
from model.files.tensor_files import dump_json
from model.llm.multi_axis_rope import INTERLEAVED, SECTIONS
from model.lora import is_adapter
from model.multimodal import MultimodalLM
from model.published.table import find_layout
from model.weights.origins import run_layers


def inherited_parts(folder: Path, card: ModelCard) -> set[str]:
    """Return the parts in which an earlier run trained or merged a weight; an adapter of this run does not fit their plain base."""
    below = run_layers(folder, card, assemble(card, torch.float32), "SOURCE")[1:]
    names = {name for layer in below for name in (*layer.tensors, *layer.adapters, *layer.stored)}
    merged = {"llm"} if card.model.llm.adapter else set()
    return merged | {name.partition(".")[0] for name in names if not is_adapter(name)}


def why_own_base(folder: Path, card: ModelCard, opened: str = "") -> str:
    """Return why an adapter of this run needs a base beside it; "" where the run's own base is opened as a language model.

    `opened`: the beginning of the names of the layouts that the adapter's reader opens as a language model too.
    """
    if "llm" in inherited_parts(folder, card):
        return "an earlier run trained the language model"
    found = find_layout("model.llm.path", card.model.llm.path, card.model.cache_dir)
    if found is None or (opened and found[0].name.startswith(opened)):
        return ""
    return f"{card.model.llm.path} is more than a language model: {found[0].name}"


def has_axes(card: ModelCard) -> bool:
    """Tell whether the language model has positions of three axes."""
    return bool(card.hugging_face["llm"].get(SECTIONS))


def write_llm(model: MultimodalLM, folder: Path, card: ModelCard) -> None:
    """Write config.json, model*.safetensors and generation_config.json of the language model of `model`, without its adapters.

    Matrices that are stored quantised are written dequantised, as the model computes with them. Positions of three axes are equal
    for text alone, and the class has one.
    """
    found = {name.removeprefix("llm."): entry for name, entry in model_entries(model) if name.startswith("llm.")}
    write_weights(folder, found)
    config, dtype, _ = sizes_of(card, model)
    config = {key: value for key, value in config.items() if key not in (SECTIONS, INTERLEAVED)}
    (folder / "config.json").write_text(dump_json({**config, "dtype": dtype}))
    stops = {"eos_token_id": list(card.stop_ids), "pad_token_id": card.pad_id}
    (folder / "generation_config.json").write_text(dump_json(stops))
