"""Projectors that the configuration names by their own `path`: ours, or LLaVA's."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

from torch import nn

from model.config import ConfigError, ModelConfig
from model.files import Rows, Tensors, read_weights
from model.weights import Layer

LLAVA_PROJECTOR, LLAVA_NEWLINE = "mm_projector.", "image_newline"
OWN_ROWS = ("extra", LLAVA_NEWLINE)
"""What a projector may hold beside its layers: prompts, the line break."""


def projector_layers(config: ModelConfig, model: nn.Module, held: Collection[str], claimed: Collection[str]) -> list[Layer]:
    """What the `path` of each projector names, but for one that is `held`. ConfigError for one that is `claimed` already."""
    layers = []
    for part, projector in (("vision_projector", config.vision_projector), ("audio_projector", config.audio_projector)):
        if projector is None or not projector.path or _holds(held, part):
            continue
        if _holds(claimed, part):
            raise ConfigError(f"model.{part}.path and model.init_from both hold the projector: name one of them")
        layers.append(
            Layer(
                projector.path, partial(whole_projector, Path(projector.path), part, model.get_submodule(part)), prefix=f"{part}."
            )
        )
    return layers


def _holds(names: Collection[str], part: str) -> bool:
    return any(name.startswith(f"{part}.") for name in names)


def whole_projector(path: Path, part: str, module: nn.Module) -> Tensors:
    """The tensors of a projector that is to be `module`; ConfigError unless they are its own.

    Rows of its own may be missing, which are then new: LLaVA-NeXT's first stage keeps no line break, and prompts may come later.
    """
    found, wanted = projector_tensors(path, part), {f"{part}.{name}" for name, _ in module.named_parameters()}
    new = {f"{part}.{name}" for name in OWN_ROWS}
    if foreign := sorted({*found} - wanted):
        hint = ": set model.vision_projector.newline = true" if foreign == [f"{part}.{LLAVA_NEWLINE}"] else ""
        raise ConfigError(f"model.{part}.path = {str(path)!r} holds {foreign}, which this kind of projector has not{hint}")
    if missing := sorted(wanted - {*found} - new):
        raise ConfigError(f"model.{part}.path = {str(path)!r} lacks {missing}: it is a projector of another kind")
    return found


def projector_tensors(path: Path, part: str) -> Tensors:
    """A projector by itself: ours (keys `0.weight`), or LLaVA's mm_projector.bin (keys `model.mm_projector.0.weight`)."""
    file = path / f"{part}.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"model.{part}.path = {str(path)!r} " + (f"holds no {file.name}" if path.is_dir() else "does not exist"))
    llavas = LLAVA_PROJECTOR if part == "vision_projector" else ""
    found: dict[str, Rows] = {}
    for name, rows in read_weights(file).items():
        if llavas and llavas in name:
            found[f"{part}.{name.partition(llavas)[2]}"] = rows
        elif llavas and name.rpartition(".")[2] == LLAVA_NEWLINE:
            found[f"{part}.{LLAVA_NEWLINE}"] = rows
        elif file.suffix == ".safetensors":
            found[f"{part}.{name}"] = rows
    if not found:
        wanted = f": no key has {llavas!r}" if llavas else ": it is no .safetensors file with tensors"
        raise ConfigError(f"model.{part}.path = {str(path)!r} holds no projector{wanted}")
    return found
