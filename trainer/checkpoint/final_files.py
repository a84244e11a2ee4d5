"""Content of final/, by file name: tensors with the hook that gathers each of them when the writer reaches it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from model.build import DTYPES
from model.card import ModelCard
from model.files.tensor_files import SHARD_BYTES, Entry, split_by_size
from model.llm.new_tokens import FILE as NEW_ROWS
from model.llm.new_tokens import is_new_rows
from model.load import inherited_tensors
from model.lora import is_adapter
from model.multimodal import MultimodalLM
from model.weights.peft_adapter import OURS
from trainer.distributed.gather import gather_hooks
from trainer.distributed.world import World

Files = list[tuple[str, dict[str, Entry]]]


def final_files(model: MultimodalLM, card: ModelCard, world: World, alone: bool) -> Files:
    """Return all weight files of final/. No tensor is read yet.

    `alone`: include the tensors that come from the run named by model.init_from.
    """
    files = list(weight_files_of(model, card))
    return with_inherited(files, card, world) if alone and card.model.init_from else files


def weight_files_of(model: MultimodalLM, card: ModelCard) -> Iterator[tuple[str, dict[str, Entry]]]:
    """Yield each file name and its tensors: base weights rounded once to the model's dtype, all others in float32."""
    for name, part in card.model.parts().items():
        is_ours = name.endswith("_projector") or name == "state_head"
        tensors = dict(model.get_submodule(name).named_parameters())
        if part.tune == "positions":
            tensors = {inner: p for inner, p in tensors.items() if p.requires_grad}
        # Projectors and the state head are small and in no base model: they are written even if they were not trained.
        if part.tune in ("full", "positions") or is_ours:
            dtype = DTYPES[card.model.dtype] if part.tune == "full" and not is_ours else torch.float32
            yield from split_files(name, _entries(tensors, dtype))
    adapters = {
        name: p
        for name, p in model.named_parameters()
        if is_adapter(name) or (p.requires_grad and name.partition(".")[0] in card.lora_parts)
    }
    if rows := {name: p for name, p in model.named_parameters() if is_new_rows(name)}:
        yield NEW_ROWS, _entries(rows, torch.float32)
    if adapters:
        yield OURS, _entries(adapters, torch.float32)


def with_inherited(files: Files, card: ModelCard, world: World) -> Files:
    """Return `files` with the tensors that earlier runs trained or merged and this run did not change.

    They are read from the files of those runs, not from the live model, which may have rounded them.
    """
    held = {name if file in (OURS, NEW_ROWS) else f"{part_of(file)}.{name}" for file, entries in files for name in entries}
    added: dict[str, dict[str, Entry]] = {}
    for name, rows in inherited_tensors(card, held).items():
        part, _, inner = name.partition(".")
        # A quantised matrix is packed again from this file: it must hold exactly the values it was packed from.
        rounds = part in card.hugging_face and card.quantize.bits == 16
        value = rows.all if world.is_main else lambda: None  # rank 0 reads it from a file by itself
        added.setdefault(part, {})[inner] = Entry(DTYPES[card.model.dtype] if rounds else torch.float32, rows.shape, value)
    for part, entries in added.items():
        own = {name: entry for file, group in files if part_of(file) == part for name, entry in group.items()}
        files = [item for item in files if part_of(item[0]) != part] + list(split_files(part, {**own, **entries}))
    return files


def part_of(file: str) -> str:
    """Return the part of the model that a weight file belongs to."""
    return Path(file).stem.partition("-")[0]


def split_files(part: str, entries: dict[str, Entry]) -> Iterator[tuple[str, dict[str, Entry]]]:
    """Yield the weights of a part as one file, or as several when they exceed SHARD_BYTES."""
    groups = [group for group in split_by_size(entries, SHARD_BYTES) if group]
    for i, group in enumerate(groups, 1):
        suffix = "" if len(groups) == 1 else f"-{i:05d}-of-{len(groups):05d}"
        yield f"{part}{suffix}.safetensors", group


def _entries(tensors: dict[str, nn.Parameter], dtype: torch.dtype) -> dict[str, Entry]:
    """Return an entry for each tensor, with the hook that gathers it on rank 0 when the writer reaches it."""
    hooks = gather_hooks(tensors)
    return {name: Entry(dtype, tuple(t.shape), hooks[name]) for name, t in tensors.items()}
