"""The tensors that a run trained, from its final/ or any checkpoint, by export file; a tensor is read only when it is written."""

from __future__ import annotations

from pathlib import Path

import torch

from model.build import assemble
from model.card import ModelCard
from model.errors import ConfigError
from model.files.manifest import check_sizes
from model.files.tensor_files import Entry, LazyTensor, Tensors, read_safetensors, tensor_digests, write_safetensors
from model.llm.new_tokens import FILE as NEW_ROWS
from model.llm.new_tokens import is_new_rows
from model.load import card_to_build
from model.weights.materialise import resolve_value
from model.weights.origins import of_adapter, run_layers, saved_tensors
from model.weights.peft_adapter import OURS

PROJECTOR = "vision_projector"
PROJECTORS = (PROJECTOR, "audio_projector")


def trained_files(folder: Path, card: ModelCard) -> dict[str, Tensors]:
    """Return the tensors trained beside the language model's own weights, by file name, with keys as in final/. No tensor is read.

    Only the file sizes of a checkpoint are checked: comparing checksums would read all other files as well.
    """
    files: dict[str, Tensors] = {}
    for name, rows in saved_tensors(folder, check_sizes).items():
        part, _, inner = name.partition(".")
        if is_new_rows(name):
            files.setdefault(NEW_ROWS, {})[name] = rows
        elif of_adapter(name, card):
            files.setdefault(OURS, {})[name] = rows
        elif part != "llm":
            files.setdefault(f"{part}.safetensors", {})[inner] = rows
    for part in PROJECTORS:
        if part in card.model.parts() and (f"{part}.safetensors" not in files or not _whole(card, part)):
            inherited = projector(folder, card, part)
            files |= {f"{part}.safetensors": inherited} if inherited else {}
    return files


def projector(folder: Path, card: ModelCard, part: str = PROJECTOR) -> Tensors:
    """Return the projector `part` at the end of a run, keys relative to it, trained by this run or by an earlier one."""
    found = saved_tensors(folder, check_sizes)
    own = {n.removeprefix(f"{part}."): rows for n, rows in found.items() if n.startswith(f"{part}.")}
    if own and _whole(card, part):
        return own
    card = card_to_build(card, merge_lora=True)
    model = assemble(card, torch.float32)
    layers = run_layers(folder, card, model, "SOURCE")
    values = {name: resolve_value(f"{part}.{name}", layers) for name, _ in model.get_submodule(part).named_parameters()}
    return {name: rows for name, rows in values.items() if rows is not None}


def _whole(card: ModelCard, part: str) -> bool:
    """Tell whether a checkpoint with tensors of a projector holds all of it, not its prompts alone."""
    return card.model.parts()[part].tune == "full"


def changed_parts(folder: Path, card: ModelCard) -> set[str]:
    """Return the parts with a weight that is not the base's: some run trained it, or merged an adapter into it."""
    card = card_to_build(card, merge_lora=True)
    layers = run_layers(folder, card, assemble(card, torch.float32), "SOURCE")
    return {name.partition(".")[0] for layer in layers for name in (*layer.tensors, *layer.adapters, *layer.stored)}


def adapter_tensors(folder: Path, card: ModelCard) -> Tensors:
    """Return the language model's adapter under our full names, biases that learned with it included. Raises `ConfigError` when
    there is none, or when other parts have adapters too.
    """
    if others := sorted(card.lora_parts - {"llm"}):
        raise ConfigError(
            f"model.{others[-1]}.tune = 'lora': a PEFT folder of the language model has no place for its adapters; "
            "merge them with `python -m tools.merge_lora`, or export with --for hf"
        )
    if "llm" not in card.lora_parts:
        raise ConfigError(f"model.llm.tune = {card.model.llm.tune!r}: the run has no LoRA adapter to export")
    return {name: rows for name, rows in saved_tensors(folder, check_sizes).items() if of_adapter(name, card)}


def write_file(path: Path, tensors: Tensors) -> None:
    """Write tensors one by one in their stored types, reopen the file and compare. Raises `OSError` where they differ."""
    entries = {name: Entry(_dtype(rows), rows.shape, rows.all) for name, rows in tensors.items()}
    with path.open("wb") as out:
        written = write_safetensors(out, entries)
    if dict(tensor_digests(path)) != written or read_safetensors(path).keys() != tensors.keys():
        raise OSError(f"{path}: what was read back is not what was written")


def _dtype(rows: LazyTensor) -> torch.dtype:
    return rows.read(0, 1).dtype  # one row suffices: files hold no tensor without rows
