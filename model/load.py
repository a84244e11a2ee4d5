"""Loading a trained model for use: from a final/ folder or a checkpoint."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from model.build import DTYPES, assemble, resolve_dtype
from model.card import ModelCard, read_card
from model.config import QuantizeConfig
from model.errors import ConfigError
from model.files.tensor_files import Tensors
from model.multimodal import MultimodalLM
from model.weights.bases import base_layers
from model.weights.materialise import find_values, materialise, resolve_value
from model.weights.origins import run_layers, saved_tensors


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    merge_lora: bool = True,
    base: dict[str, str] | None = None,
) -> MultimodalLM:
    """Load the model of a final/ folder or checkpoint-N, in eval mode and without gradients.

    `merge_lora`: adapters are merged into their weights in float32, then rounded to `dtype` once; weights that were quantised in
    training are dequantised in float32. Without it the model is stored as it was trained. `base` gives new paths of bases that
    moved: {"llm": path, "vision": path, "init_from": path}. Raises `ConfigError` when something is missing or changed.
    """
    folder, device = Path(path), torch.device(device)
    saved = with_moved_bases(read_card(folder), base or {})
    target = dtype_of(dtype, saved, device)
    card = card_to_build(saved, merge_lora)
    model = assemble(card, target)
    layers = [*run_layers(folder, card, model, "load_model", "quick", saved), *base_layers(card, model)]
    model.requires_grad_(False)
    materialise(model, layers, frozen_dtype=target, device=device)
    model.trainable_parts = frozenset()
    return model.train(False)


def dtype_of(dtype: str | torch.dtype | None, card: ModelCard, device: torch.device) -> torch.dtype:
    """Return the requested dtype, else the one the model was trained to compute in."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r} is not {' | '.join(DTYPES)}")
    return DTYPES[dtype or resolve_dtype(card.model.dtype, device)]


def check_loadable(folder: Path) -> None:
    """Check that every parameter of the model that `folder` is about to hold has a value of the right shape in some origin.

    Called before proof.json is written. Only names and shapes are read from `folder`. Raises `ConfigError`.
    """
    card = card_to_build(read_card(folder), merge_lora=False)
    model = assemble(card, torch.float32)
    find_values(model, [*run_layers(folder, card, model, "final", "being_written"), *base_layers(card, model)])


def card_without_init_from(folder: Path, card: ModelCard) -> ModelCard:
    """Return `card` without `init_from` if `folder`, being written, holds every tensor that came from that run, which may then be
    deleted; else return `card` unchanged.
    """
    if not card.model.init_from:
        return card
    model = assemble(card, torch.float32)
    layers = run_layers(Path(card.model.init_from), card, model, "model.init_from", "quick")
    given = {name for layer in layers for name in (*layer.tensors, *layer.adapters, *layer.stored)}
    return (
        card
        if given - set(saved_tensors(folder, proof="being_written"))
        else replace(card, model=replace(card.model, init_from=""))
    )


def inherited_tensors(card: ModelCard, loaded: Collection[str]) -> Tensors:
    """Return the current values of tensors that come from the run named by model.init_from and that are not in `loaded`.

    With these tensors, a final/ folder needs no earlier run. No tensor is read yet.
    """
    path, model = Path(card.model.init_from), assemble(card, torch.float32)
    layers = run_layers(path, card, model, "model.init_from", "quick")
    given = {name for layer in layers for name in (*layer.tensors, *layer.adapters, *layer.stored)}
    layers += base_layers(replace(card, bases=read_card(path).bases), model)
    values = {name: resolve_value(name, layers) for name in sorted(given - set(loaded))}
    return {name: rows for name, rows in values.items() if rows is not None}


def card_to_build(card: ModelCard, merge_lora: bool) -> ModelCard:
    """Return the card of the structure to build: without adapters and without quantisation when adapters are merged.

    New token rows are always merged into their matrix.
    """
    merged = ("lora", "new_tokens") if merge_lora else ("new_tokens",)
    parts = {n: replace(part, tune="frozen") for n, part in card.model.parts().items() if part.tune in merged}  # type: ignore[arg-type]
    card = replace(card, model=replace(card.model, **parts))  # type: ignore[arg-type]
    return replace(card, quantize=QuantizeConfig()) if merge_lora else card


def with_moved_bases(card: ModelCard, base: dict[str, str]) -> ModelCard:
    model = card.model
    for name, path in base.items():
        if name == "init_from":
            model = replace(model, init_from=path)
        elif name in card.hugging_face:
            model = replace(model, **{name: replace(getattr(model, name), path=path)})
        else:
            raise ConfigError(f"base: {name!r} is not one of {', '.join([*card.hugging_face, 'init_from'])}")
    return replace(card, model=model)
