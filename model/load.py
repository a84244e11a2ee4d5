"""A trained model for use: from a final/ folder or a checkpoint."""

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
from model.weights.materialise import find_values, materialise, resolve
from model.weights.origins import run_layers, saved_tensors


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    merge_lora: bool = True,
    base: dict[str, str] | None = None,
) -> MultimodalLM:
    """The model of a final/ folder or checkpoint-N, in eval mode and without gradients.

    `merge_lora`: adapters are merged into their weights in float32, then rounded to `dtype` once; weights that were trained on
    quantised are what they were then, read back in float32. Without it the model is stored as it was trained. `base` names
    bases that moved: {"llm": path, "vision": path, "init_from": path}. ConfigError when something is missing or changed.
    """
    folder, device = Path(path), torch.device(device)
    saved = rebased(read_card(folder), base or {})
    target = dtype_of(dtype, saved, device)
    card = for_use(saved, merge_lora)
    model = assemble(card, target)
    layers = [*run_layers(folder, card, model, "load_model", "quick", saved), *base_layers(card, model)]
    model.requires_grad_(False)
    materialise(model, layers, frozen_dtype=target, device=device)
    model.trainable_parts = frozenset()
    return model.eval()  # type: ignore[return-value]


def dtype_of(dtype: str | torch.dtype | None, card: ModelCard, device: torch.device) -> torch.dtype:
    """What was asked for, else what the model was trained to compute in."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r} is not {' | '.join(DTYPES)}")
    return DTYPES[dtype or resolve_dtype(card.model.dtype, device)]


def check_loadable(folder: Path) -> None:
    """Every parameter of the model that `folder` is about to hold has a value of the right shape somewhere.

    Called before proof.json is written. Of `folder` nothing but names and shapes is read.
    """
    card = for_use(read_card(folder), merge_lora=False)
    model = assemble(card, torch.float32)
    find_values(model, [*run_layers(folder, card, model, "final", "being_written"), *base_layers(card, model)])


def settled(folder: Path, card: ModelCard) -> ModelCard:
    """`card` without the run it was started from, if `folder`, being written, holds all that came from there: it may go then."""
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


def inherited_tensors(card: ModelCard, held: Collection[str]) -> Tensors:
    """Values, as they are now, of what the run named by model.init_from gave and `held` does not hold: with them a final/ needs
    no earlier run. No tensor has been read.
    """
    path, model = Path(card.model.init_from), assemble(card, torch.float32)
    layers = run_layers(path, card, model, "model.init_from", "quick")
    given = {name for layer in layers for name in (*layer.tensors, *layer.adapters, *layer.stored)}
    layers += base_layers(replace(card, bases=read_card(path).bases), model)
    values = {name: resolve(name, layers) for name in sorted(given - set(held))}
    return {name: rows for name, rows in values.items() if rows is not None}


def for_use(card: ModelCard, merge_lora: bool) -> ModelCard:
    """The card whose structure is built: without adapters when they are merged, and without codes to merge them into.

    New rows never stand beside their matrix.
    """
    merged = ("lora", "new_tokens") if merge_lora else ("new_tokens",)
    parts = {n: replace(part, tune="frozen") for n, part in card.model.parts().items() if part.tune in merged}  # type: ignore[arg-type]
    card = replace(card, model=replace(card.model, **parts))  # type: ignore[arg-type]
    return replace(card, quantize=QuantizeConfig()) if merge_lora else card


def rebased(card: ModelCard, base: dict[str, str]) -> ModelCard:
    model = card.model
    for name, path in base.items():
        if name == "init_from":
            model = replace(model, init_from=path)
        elif name in card.hugging_face:
            model = replace(model, **{name: replace(getattr(model, name), path=path)})
        else:
            raise ConfigError(f"base: {name!r} is not one of {', '.join([*card.hugging_face, 'init_from'])}")
    return replace(card, model=model)
