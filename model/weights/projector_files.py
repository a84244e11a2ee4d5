"""Files of the parts that have a `path` and no base, projectors and the state head: in our format, or in that of others."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from torch import nn

from model.errors import ConfigError
from model.files.hub import HUB_ID, WEIGHT_NAMES
from model.files.quantised_base import is_coded
from model.files.tensor_files import Tensors, read_weights
from model.files.untrusted import listed, shown
from model.projector import LLAVA_NEWLINE, LLAVA_PROJECTOR, LLAVA_TRAINED, OWN_ROWS
from model.published.table import find_layout, part_tensors
from model.weights.adapter_names import PROJECTORS, is_saved_projector
from model.weights.peft_adapter import CONFIG, PEFT_SUFFIXES, PICKLED, WEIGHTS

LLAVA_FILES = ("mm_projector.bin", "mm_projector.safetensors", LLAVA_TRAINED, LLAVA_TRAINED.replace(".bin", ".safetensors"))
"""Files of LLaVA that hold a projector, in the order in which they are looked for in a folder."""
PLAIN = {"linear_1": "0", "linear_2": "2"}
SHUFFLED = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}
"""Layers of a projector in transformers, and their names here: of LLaVA, and of InternVL, which has a norm in front."""
POOLER = (("conv_pool.", "0."), ("proj.1.", "2."))
"""Names of the layers of LLaVA-NeXT's `pooler`, and their names here."""
LLAVA_BESIDE = {
    "embed_tokens": "rows of the vocabulary, trained with mm_use_im_start_end",
    "lm_head": "the head of the language model",
    "vision_tower": "a vision tower that was trained; as a Hugging Face folder it can be model.vision.path",
    "vision_resampler": "a resampler of LLaVA-NeXT",
    "audio_": "parts that hear",
    "lora_": "an adapter, which lora.path reads",
}
"""Tensors that LLaVA and its derivatives write beside a projector, by a part of their names."""


def whole_projector(path: Path, part: str, module: nn.Module, cache_dir: str = "", elsewhere: Collection[str] = ()) -> Tensors:
    """Return the tensors of the part for `module`. Raises `ConfigError` unless they are exactly its parameters.

    Parameters in OWN_ROWS may be missing and then start new: LLaVA-NeXT's first stage has no line break, and prompts may be added.
    `elsewhere`: words in the names of tensors that another part reads out of the same file.
    """
    found, wanted = projector_tensors(path, part, cache_dir, elsewhere), {f"{part}.{name}" for name, _ in module.named_parameters()}
    found = _as_built(found, wanted, part)
    new = {f"{part}.{name}" for name in OWN_ROWS}
    if foreign := sorted({*found} - wanted):
        hint = ": set model.vision_projector.newline = true" if foreign == [f"{part}.{LLAVA_NEWLINE}"] else ""
        raise ConfigError(f"model.{part}.path = {str(path)!r} holds {listed(foreign)}, which this kind of projector has not{hint}")
    if missing := sorted(wanted - {*found} - new):
        raise ConfigError(f"model.{part}.path = {str(path)!r} lacks {listed(missing)}: it is a projector of another kind")
    return found


def _as_built(found: Tensors, wanted: Collection[str], part: str) -> Tensors:
    """Return the tensors of a single matrix as this model has it: with or without the number of a layer in front."""
    single, numbered = {f"{part}.weight", f"{part}.bias"}, {f"{part}.0.weight", f"{part}.0.bias"}
    if single <= {*wanted} and numbered <= {*found}:
        return {name.replace(f"{part}.0.", f"{part}."): rows for name, rows in found.items()}
    if numbered <= {*wanted} and single <= {*found}:
        return {name.replace(f"{part}.", f"{part}.0.") if name in single else name: rows for name, rows in found.items()}
    return found


def projector_tensors(path: Path, part: str, cache_dir: str = "", elsewhere: Collection[str] = ()) -> Tensors:
    """Read a part: from our file (keys `0.weight`), one of LLaVA's (`model.mm_projector.0.weight`), the modules that PEFT saved
    beside an adapter, or a published model that holds the part.

    In every format each tensor is read, or a `ConfigError` names the tensor that is not. `elsewhere`: as in `whole_projector`.
    """
    file = stored_file(path, part)
    if file is None:
        inside = _inside(path, part, cache_dir)
        return {f"{part}.{name}": rows for name, rows in inside.items()}
    stored = read_weights(file)
    if not stored:
        raise ConfigError(f"model.{part}.path = {str(path)!r} holds no tensor")
    if coded := [name for name, rows in stored.items() if is_coded(rows.dtype)]:
        raise ConfigError(
            f"model.{part}.path = {str(path)!r}: {shown(coded[0])} is {stored[coded[0]].dtype}: codes are no weights; save the "
            "projector in bfloat16, float16 or float32"
        )
    if part == "vision_projector" and any(LLAVA_PROJECTOR in name for name in stored):
        stored = {name: rows for name, rows in stored.items() if not any(word in name for word in elsewhere)}
        return _llava_projector(stored, path, part)
    return {f"{part}.{name}": rows for name, rows in stored.items()}


def stored_file(path: Path, part: str) -> Path | None:
    """Return the file of a part that `path` names or holds; None when it names a folder of another kind, or a hub id."""
    if path.is_file():
        return path
    # Folders of whole models may hold the projector of the first stage as well, which is not the model's.
    llavas = LLAVA_FILES if part == "vision_projector" and not any((path / name).is_file() for name in WEIGHT_NAMES) else ()
    names = (f"{part}.safetensors", *llavas)
    return next((path / name for name in names if (path / name).is_file()), None)


def _inside(path: Path, part: str, cache_dir: str) -> Tensors:
    """Return the tensors of a part, by its own names, out of an adapter's folder or a published model. Raises `ConfigError`."""
    setting = f"model.{part}.path"
    if saved := read_saved_projector(path):
        return saved
    is_id = HUB_ID.fullmatch(str(path)) is not None and path.suffix not in (".safetensors", ".bin")
    if not path.is_dir() and not is_id:
        raise ConfigError(f"{setting} = {str(path)!r} does not exist")
    if find_layout(setting, str(path), cache_dir) is None:
        raise ConfigError(f"{setting} = {str(path)!r} holds no {part}.safetensors, and is no published model that is read here")
    return part_tensors(setting, part, str(path), cache_dir)


def read_saved_projector(folder: Path) -> Tensors:
    """Return the projector that PEFT saved whole beside an adapter (modules_to_save), by the names it has here; {} without one."""
    file = next((folder / name for name in (WEIGHTS, PICKLED) if (folder / name).is_file()), None)
    if file is None or not (folder / CONFIG).is_file():
        return {}
    saved = {
        name: rows for name, rows in read_weights(file).items() if is_saved_projector(name) and not name.endswith(PEFT_SUFFIXES)
    }
    layers = SHUFFLED if any(".layer_norm." in name for name in saved) else PLAIN
    found = {}
    for name, rows in saved.items():
        inner = re.split("|".join(rf"\b{word}\." for word in PROJECTORS), name)[-1]
        layer, _, kind = inner.rpartition(".")
        found[f"{layers.get(layer, layer)}.{kind}" if layer else kind] = rows
    return found


def _llava_projector(stored: Tensors, path: Path, part: str) -> Tensors:
    """Return the projector from a file with LLaVA's names. Raises `ConfigError` for tensors of other parts."""
    found: Tensors = {}
    beside = []
    for name, rows in stored.items():
        if LLAVA_PROJECTOR in name:
            inner = name.partition(LLAVA_PROJECTOR)[2]
            for old, new in POOLER:
                inner = new + inner.removeprefix(old) if inner.startswith(old) else inner
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
