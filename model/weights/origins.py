"""Where the weights of a model come from, newest first: earlier runs, adapters and projectors named, bases, new draws."""

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
from model.weights.bases import base_layers, resize_vocabulary
from model.weights.compatibility import check_same_bases, continued_parts
from model.weights.initial_values import initial_adapter, initial_tensors
from model.weights.materialise import Adapter, Layer
from model.weights.new_token_rows import first_rows, row_patches
from model.weights.peft_adapter import read_adapter
from model.weights.projector_files import check_llavas_parts, projector_layers


def weight_layers(card: ModelCard, model: MultimodalLM, seed: int) -> list[Layer]:
    """Origins of a new run's weights: init_from, then what a part's `path` and `lora.path` name, bases, new parts."""
    given = given_layers(card, model)
    # An earlier run's weights mean something only on the very bases it was trained on.
    bases = read_card(Path(card.model.init_from)).bases if card.model.init_from else card.bases
    layers = [*given, *base_layers(replace(card, bases=bases), model)]
    new = Layer("new", lambda: new_tensors(card, model, seed) | first_rows(model, card.vocabulary.tuned_ids, layers))
    return [*layers, new]


def given_layers(card: ModelCard, model: MultimodalLM, held: Collection[str] = (), proof: Check = "full") -> list[Layer]:
    """What the configuration names beside the bases, but for what is `held` already. Two that claim one part are an error."""
    layers, config = [], card.model
    if config.init_from:
        layers += run_layers(Path(config.init_from), card, model, "model.init_from", proof)
    # Only the named run itself is looked into: what lies below it is opened when it is needed.
    claimed = {name for layer in layers[:2] for name in layer.tensors}
    layers += projector_layers(config, model, held, claimed)
    if card.lora.path and not any(map(is_adapter, held)):
        if any(map(is_adapter, claimed)):
            raise ConfigError("lora.path and model.init_from both hold adapters: name one of them")
        check_llavas_parts(card)
        parts = {name: model.get_submodule(name) for name in sorted(card.lora_parts)}
        layers.append(Layer(card.lora.path, lambda: read_adapter(Path(card.lora.path), card.lora, parts)))
    return layers


def run_layers(
    folder: Path, card: ModelCard, model: MultimodalLM, setting: str, proof: Check = "full", saved: ModelCard | None = None
) -> list[Layer]:
    """A final/ folder or checkpoint and everything below it that is no base of `card`; each final/ checked by its `proof`.

    Adapters go on in parts that `card` tunes by LoRA, elsewhere they are merged in float32; rows of new tokens always are.
    `saved`: the folder's own card with paths of what has moved since.
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
    # What stands on a weight must be above it, and a final/ may hold both.
    beside = {name: rows for name, rows in kept.items() if of_adapter(name, saved)}
    own = Layer(str(folder), lambda: beside, {**pairs, **patches}, stored=stored)
    weights = Layer(
        str(folder), lambda: resize_vocabulary({n: rows for n, rows in kept.items() if n not in beside}, card, saved, model)
    )
    return [own, weights, *map(without_adapters, given_layers(saved, model, tensors, below))]


def of_adapter(name: str, card: ModelCard) -> bool:
    """Whether a tensor belongs to what LoRA trains: an adapter, or a bias beside it."""
    learns_bias = name.endswith(".bias") and card.lora.bias != "none"
    return name.partition(".")[0] in card.lora_parts and (is_adapter(name) or learns_bias)


def without_adapters(layer: Layer) -> Layer:
    """An origin below a run, whose adapters that run holds itself or has merged: new ones must not find the old."""
    return replace(layer, open=lambda: {name: rows for name, rows in layer.tensors.items() if not is_adapter(name)})


def stored_matrices(saved: ModelCard, card: ModelCard, model: MultimodalLM, merged: Collection[str]) -> dict[str, QuantizeConfig]:
    """Matrices that an earlier run computed with as quantised, and that are to be now what they were then.

    One that is quantised again in the same way, nothing `merged` into it, is packed from the same values instead.
    """
    if saved.quantize.bits == 16:
        return {}
    names = [f"llm.{path}.weight" for path, _ in matrices(model.llm)]
    return {name: saved.quantize for name in names if name in merged or saved.quantize != card.quantize}


def saved_tensors(folder: Path, check: Callable[[Path], object] = verify, proof: Check = "full") -> Tensors:
    """Tensors of a final/ folder or checkpoint by full name. A checkpoint goes through `check` first, a final/ through `proof`."""
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


def adapter_pairs(tensors: Tensors, scale: float) -> dict[str, Adapter]:
    paths = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    return {f"{p}.weight": Adapter(tensors[f"{p}.lora_A"], tensors[f"{p}.lora_B"], scale) for p in paths}


def new_tensors(card: ModelCard, model: MultimodalLM, seed: int) -> Tensors:
    """First values of what no file holds: projectors and a state head that learn, and adapters."""
    found: Tensors = {}
    for part in ("vision_projector", "audio_projector"):
        projector = card.model.parts().get(part)
        if projector is not None and projector.tune != "frozen":
            new = initial_tensors(part, model.get_submodule(part), seed)
            # Prompts alone: what they stand before must have been trained, and comes from a file.
            found |= {name: rows for name, rows in new.items() if projector.tune == "full" or name == f"{part}.extra"}
    head = card.model.state_head
    if head is not None and head.tune != "frozen":
        found |= initial_tensors("state_head", model.get_submodule("state_head"), seed)
    for path, layer in adapted(model):
        found |= initial_adapter(path, layer.lora_A, layer.lora_B, seed)
    return found
