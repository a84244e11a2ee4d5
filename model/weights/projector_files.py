"""Projectors that the configuration names by their own `path`: in our format, or in LLaVA's."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

from torch import nn

from model.card import ModelCard
from model.config import ModelConfig
from model.errors import ConfigError
from model.files.quantised_base import is_coded
from model.files.tensor_files import Tensors, read_weights
from model.files.untrusted import listed, shown
from model.projector import LLAVA_NEWLINE, LLAVA_PROJECTOR, LLAVA_TRAINED, OWN_ROWS
from model.weights.materialise import Layer

LLAVA_BESIDE = {
    "embed_tokens": "rows of the vocabulary, trained with mm_use_im_start_end",
    "lm_head": "the head of the language model",
    "vision_tower": "a vision tower that was trained; as a Hugging Face folder it can be model.vision.path",
    "vision_resampler": "a resampler of LLaVA-NeXT",
    "audio_": "parts that hear",
    "lora_": "an adapter, which lora.path reads",
}
"""Tensors that LLaVA and its derivatives write beside a projector, by a part of their names."""


def projector_layers(config: ModelConfig, model: nn.Module, loaded: Collection[str], inherited: Collection[str]) -> list[Layer]:
    """Return layers for projectors that have a `path`, except those in `loaded`. Raises `ConfigError` for one in `inherited`."""
    layers = []
    for part, projector in (("vision_projector", config.vision_projector), ("audio_projector", config.audio_projector)):
        if projector is None or not projector.path or _holds(loaded, part):
            continue
        if _holds(inherited, part):
            raise ConfigError(f"model.{part}.path and model.init_from both hold the projector: name one of them")
        layers.append(
            Layer(
                projector.path, partial(whole_projector, Path(projector.path), part, model.get_submodule(part)), prefix=f"{part}."
            )
        )
    return layers


def check_llavas_parts(card: ModelCard) -> None:
    """Refuse an adapter of LLaVA without the projector that LLaVA wrote beside it: with another projector it is useless."""
    projector, beside = card.model.vision_projector, Path(card.lora.path) / LLAVA_TRAINED
    if projector is not None and not projector.path and not card.model.init_from and beside.is_file():
        raise ConfigError(
            f"lora.path = {card.lora.path!r} holds {LLAVA_TRAINED} as well, with the projector that was trained beside it: "
            f"name that as model.vision_projector.path = {str(beside)!r}"
        )


def _holds(names: Collection[str], part: str) -> bool:
    return any(name.startswith(f"{part}.") for name in names)


def whole_projector(path: Path, part: str, module: nn.Module) -> Tensors:
    """Return the tensors of the projector for `module`. Raises `ConfigError` unless they are exactly its parameters.

    Parameters in OWN_ROWS may be missing and then start new: LLaVA-NeXT's first stage has no line break, and prompts may be added.
    """
    found, wanted = projector_tensors(path, part), {f"{part}.{name}" for name, _ in module.named_parameters()}
    new = {f"{part}.{name}" for name in OWN_ROWS}
    if foreign := sorted({*found} - wanted):
        hint = ": set model.vision_projector.newline = true" if foreign == [f"{part}.{LLAVA_NEWLINE}"] else ""
        raise ConfigError(f"model.{part}.path = {str(path)!r} holds {listed(foreign)}, which this kind of projector has not{hint}")
    if missing := sorted(wanted - {*found} - new):
        raise ConfigError(f"model.{part}.path = {str(path)!r} lacks {listed(missing)}: it is a projector of another kind")
    return found


def projector_tensors(path: Path, part: str) -> Tensors:
    """Read a projector file: ours (keys `0.weight`), or LLaVA's mm_projector.bin (keys `model.mm_projector.0.weight`).

    In either format every tensor is read, or a `ConfigError` names the tensor that is not.
    """
    file = path / f"{part}.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"model.{part}.path = {str(path)!r} " + (f"holds no {file.name}" if path.is_dir() else "does not exist"))
    stored = read_weights(file)
    if not stored:
        raise ConfigError(f"model.{part}.path = {str(path)!r} holds no tensor")
    if coded := [name for name, rows in stored.items() if is_coded(rows.dtype)]:
        raise ConfigError(
            f"model.{part}.path = {str(path)!r}: {shown(coded[0])} is {stored[coded[0]].dtype}: codes are no weights; save the "
            "projector in bfloat16, float16 or float32"
        )
    if part == "vision_projector" and any(LLAVA_PROJECTOR in name for name in stored):
        return _llava_projector(stored, path, part)
    return {f"{part}.{name}": rows for name, rows in stored.items()}


def _llava_projector(stored: Tensors, path: Path, part: str) -> Tensors:
    """Return the projector from a file with LLaVA's names. Raises `ConfigError` for tensors of other parts."""
    found: Tensors = {}
    beside = []
    for name, rows in stored.items():
        if LLAVA_PROJECTOR in name:
            inner = name.partition(LLAVA_PROJECTOR)[2]
        elif name.rpartition(".")[2] == LLAVA_NEWLINE:
            inner = LLAVA_NEWLINE
        else:
            beside.append(name)
            continue
        if f"{part}.{inner}" in found:
            raise ConfigError(f"model.{part}.path = {str(path)!r} holds two tensors for {inner}, one of them as {shown(name)}")
        found[f"{part}.{inner}"] = rows
    if beside:
        known = [why for word, why in LLAVA_BESIDE.items() if any(word in name for name in beside)]
        raise ConfigError(
            f"model.{part}.path = {str(path)!r} holds {len(beside)} tensors beside the projector, as {shown(beside[0])}, which "
            f"would be dropped{': ' + '; '.join(known) if known else ''}. To start from the projector alone, save those with "
            f"{LLAVA_PROJECTOR!r} in their names to a file of their own"
        )
    return found
