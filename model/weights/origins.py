"""Origins of a model's weights, newest first: earlier runs, named adapters and projectors, bases, initial values."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from model.card import ModelCard, read_card
from model.config import QuantizeConfig
from model.errors import ConfigError
from model.files.manifest import NAME as MANIFEST
from model.files.manifest import UnsoundCheckpoint, verify
from model.files.proof import Check, check_proof
from model.files.shards import weight_tensors
from model.files.tensor_files import Tensors, read_weights
from model.llm.new_tokens import FILE as NEW_ROWS
from model.llm.new_tokens import is_new_rows
from model.llm.quantized_linear import matrices
from model.lora import adapted, is_adapter
from model.multimodal import MultimodalLM
from model.published.table import find_layout
from model.weights.bases import base_layers, resize_vocabulary
from model.weights.compatibility import check_same_bases, continued_parts
from model.weights.initial_values import initial_adapter, initial_tensors
from model.weights.materialise import Layer, adapter_pairs
from model.weights.new_token_rows import first_rows, row_patches
from model.weights.part_layers import check_parts_beside, part_layers, trained_layers
from model.weights.peft_adapter import local_adapter, read_adapter


def weight_layers(card: ModelCard, model: MultimodalLM, seed: int) -> list[Layer]:
    """Return the origins of a new run's weights: init_from, `path` of parts and `lora.path`, bases, initial values."""
    given = configured_layers(card, model)
    # An earlier run's weights are valid only on the bases it was trained on.
    bases = read_card(Path(card.model.init_from)).bases if card.model.init_from else card.bases
    layers = [*given, *base_layers(replace(card, bases=bases), model)]
    new = Layer("new", lambda: new_tensors(card, model, seed) | first_rows(model, card.vocabulary.tuned_ids, layers))
    return [*layers, new]


def configured_layers(card: ModelCard, model: MultimodalLM, loaded: Collection[str] = (), proof: Check = "full") -> list[Layer]:
    """Return the origins that the configuration names beside the bases, except for parts that are in `loaded` already.

    Raises `ConfigError` when two origins hold the same part.
    """
    layers, config = [], card.model
    if config.init_from:
        layers += run_layers(Path(config.init_from), card, model, "model.init_from", proof)
    # Check conflicts against the named run only; its own bases are opened lazily.
    inherited = {name for layer in layers[:2] for name in layer.tensors}
    layers += [*part_layers(card, model, loaded, inherited), *trained_layers(card, model, inherited)]
    if card.lora.path and not any(map(is_adapter, loaded)):
        if any(map(is_adapter, inherited)):
            raise ConfigError("lora.path and model.init_from both hold adapters: name one of them")
        check_parts_beside(card)
        path = local_adapter("lora.path", card.lora.path, card.model.cache_dir)
        layers.append(Layer(card.lora.path, lambda: configured_adapter(path, card, model)))
    return layers


def configured_adapter(path: Path, card: ModelCard, model: MultimodalLM) -> Tensors:
    """Read the adapter that lora.path names, which stands at `path`. Raises `ConfigError` when it does not belong to the model."""
    parts = {name: model.get_submodule(name) for name in sorted(card.lora_parts)}
    inside = find_layout("model.llm.path", card.model.llm.path, card.model.cache_dir) is not None
    return read_adapter(path, card.lora, parts, inside)


def run_layers(
    folder: Path, card: ModelCard, model: MultimodalLM, setting: str, proof: Check = "full", saved: ModelCard | None = None
) -> list[Layer]:
    """Return the layers of a final/ folder or checkpoint and of everything it builds on, except the bases of `card`.

    Each final/ is checked by its `proof`. Adapters are kept in parts that `card` tunes by LoRA and merged in float32 elsewhere;
    rows of new tokens are always merged. `saved`: the folder's own card, with the paths of moved folders corrected.
    """
    saved = saved or read_card(folder)
    check_same_bases(saved, card, folder, setting)
    parts = continued_parts(saved, card, folder)
    tensors = saved_tensors(folder, proof=proof)
    merged = {name for name in tensors if is_adapter(name) and name.partition(".")[0] not in parts}
    pairs = adapter_pairs({name: tensors[name] for name in merged}, saved.lora.scale)
    stored = stored_matrices(saved, card, model, pairs)
    patches = row_patches(tensors, saved.vocabulary.tuned_ids, str(folder))
    kept = {name: rows for name, rows in tensors.items() if name not in merged and not is_new_rows(name)}
    below: Check = "quick" if proof == "being_written" else proof
    # An adapter must be in a newer layer than its weight, and a final/ may hold both.
    own_adapters = {name: rows for name, rows in kept.items() if of_adapter(name, saved)}
    own = Layer(str(folder), lambda: own_adapters, {**pairs, **patches}, stored=stored)
    weights = Layer(
        str(folder), lambda: resize_vocabulary({n: rows for n, rows in kept.items() if n not in own_adapters}, card, saved, model)
    )
    return [own, weights, *map(without_adapters, configured_layers(saved, model, tensors, below))]


def of_adapter(name: str, card: ModelCard) -> bool:
    """Tell whether LoRA trains a tensor: an adapter, or a bias beside it."""
    learns_bias = name.endswith(".bias") and card.lora.bias != "none"
    return name.partition(".")[0] in card.lora_parts and (is_adapter(name) or learns_bias)


def without_adapters(layer: Layer) -> Layer:
    """Return a layer below a run without adapters: the run holds or has merged them, and new adapters must not find them."""
    return replace(layer, open=lambda: {name: rows for name, rows in layer.tensors.items() if not is_adapter(name)})


def stored_matrices(saved: ModelCard, card: ModelCard, model: MultimodalLM, merged: Collection[str]) -> dict[str, QuantizeConfig]:
    """Return the matrices that an earlier run used quantised, and that must keep their dequantised values in this model.

    A matrix that is quantised in the same way now, with no adapter `merged` into it, is packed from the same values instead.
    """
    if saved.quantize.bits == 16:
        return {}
    names = [f"llm.{path}.weight" for path, _ in matrices(model.llm)]
    return {name: saved.quantize for name in names if name in merged or saved.quantize != card.quantize}


def saved_tensors(folder: Path, check: Callable[[Path], object] = verify, proof: Check = "full") -> Tensors:
    """Return the tensors of a final/ or checkpoint by full name. `check` verifies a checkpoint, `proof` says how a final/ is
    checked.
    """
    if (folder / MANIFEST).exists():
        try:
            check(folder)
        except UnsoundCheckpoint as error:
            raise ConfigError(f"{folder} is damaged: {error}") from error
        return weight_tensors(folder)
    check_proof(folder, proof)
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = path.stem.partition("-")[0]
        prefix = "" if part == "lora" or path.name == NEW_ROWS else f"{part}."
        found |= {prefix + name: rows for name, rows in read_weights(path).items()}
    return found


def new_tensors(card: ModelCard, model: MultimodalLM, seed: int) -> Tensors:
    """Return initial values of parameters that no file holds: projectors and a state head that are trained, and adapters."""
    found: Tensors = {}
    for part in ("vision_projector", "audio_projector"):
        projector = card.model.parts().get(part)
        if projector is not None and projector.tune != "frozen":
            new = initial_tensors(part, model.get_submodule(part), seed)
            # With tune = "prompts" only prompts are new: the projector must have been trained, and comes from a file.
            found |= {name: rows for name, rows in new.items() if projector.tune == "full" or name == f"{part}.extra"}
    head = card.model.state_head
    if head is not None and head.tune != "frozen":
        found |= initial_tensors("state_head", model.get_submodule("state_head"), seed)
    for path, layer in adapted(model):
        found |= initial_adapter(path, layer.lora_A, layer.lora_B, seed)
    return found
