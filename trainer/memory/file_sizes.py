"""Sizes of the weight files that a run will write, exact to the byte, computed from the model's structure alone."""

from __future__ import annotations

import torch

from model.card import ModelCard
from model.files.shards import MOMENTS, WEIGHTS
from model.files.tensor_files import Entry
from model.multimodal import MultimodalLM
from trainer.checkpoint.final_files import weight_files_of
from trainer.machine import disk_space
from trainer.machine.disk_space import file_bytes
from trainer.memory.footprint import local_numel


def planned_checkpoint_bytes(model: MultimodalLM, ways: int, num_ranks: int) -> int:
    """Return the bytes of all shards of a checkpoint after the first update.

    `ways`: number of the `num_ranks` ranks that share one copy by rows; 1: every rank has its own.
    """
    return sum(_shard_bytes(model, ways, rank) for rank in range(num_ranks))


def _shard_bytes(model: MultimodalLM, ways: int, rank: int) -> int:
    """Return the bytes of the shard of one rank: of several copies the first is written."""
    entries: dict[str, Entry] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad or rank >= ways:
            continue
        rows = local_numel(p, ways, rank) // max(p.numel() // max(p.shape[0], 1), 1) if p.dim() else 1
        if rows:
            shape = (rows, *p.shape[1:]) if p.dim() else ()
            for kind in (WEIGHTS, *(f"{moment}/" for moment in MOMENTS)):
                entries[kind + name] = Entry(torch.float32, shape, lambda: None)
    return file_bytes(entries)


def planned_final_bytes(model: MultimodalLM, card: ModelCard) -> int:
    """Return the bytes of the weights in final/, without those that an earlier run trained and this one only passes on."""
    return disk_space.final_bytes(weight_files_of(model, card))[0]
