"""Projectors that the configuration names by their own `path`: ours, or LLaVA's."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

from model.config import ConfigError, ModelConfig
from model.files import Rows, Tensors, read_weights
from model.weights import Layer

LLAVA_PROJECTOR, LLAVA_NEWLINE = "mm_projector.", "image_newline"


def projector_layers(config: ModelConfig, held: Collection[str], claimed: Collection[str]) -> list[Layer]:
    """What the `path` of each projector names, but for one that is `held`. ConfigError for one that is `claimed` already."""
    layers = []
    for part, projector in (("vision_projector", config.vision_projector), ("audio_projector", config.audio_projector)):
        if projector is None or not projector.path or _holds(held, part):
            continue
        if _holds(claimed, part):
            raise ConfigError(f"model.{part}.path and model.init_from both hold the projector: name one of them")
        layers.append(Layer(projector.path, partial(projector_tensors, Path(projector.path), part), prefix=f"{part}."))
    return layers


def _holds(names: Collection[str], part: str) -> bool:
    return any(name.startswith(f"{part}.") for name in names)


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
