"""Checkpoint tensors in pieces: one safetensors file per rank, and a JSON that says which rows each piece is.

Any number of ranks, under any strategy, may have written them; a tensor is put together from whatever pieces overlap.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.files import Entry, Rows, Tensors, dump_json, read_safetensors, write_safetensors
from model.manifest import UnsoundCheckpoint
from model.weights import local_range

WEIGHTS = "weights/"
"""Prefix of the trained parameters among a checkpoint's tensors; the optimizer's are called exp_avg/ and exp_avg_sq/."""


@dataclass(frozen=True)
class Piece:
    """Rows [first, first + rows.shape[0]) of a tensor."""

    first: int
    rows: Rows
    shape: tuple[int, ...]  # of the whole tensor


def write_shard(folder: Path, rank: int, world_size: int, tensors: dict[str, Tensor]) -> None:
    """Write this rank's rows of `tensors` (plain or sharded) as rank-RRRRR-of-WWWWW.safetensors and .json."""
    stem = f"rank-{rank:05d}-of-{world_size:05d}"
    entries, layout = {}, {}
    for name, tensor in tensors.items():
        first, stop = local_range(tensor)
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if tensor.dim() and first == stop:
            continue
        layout[name] = {"first": first, "shape": list(tensor.shape)}
        entries[name] = Entry(local.dtype, tuple(local.shape), lambda local=local: local)  # type: ignore[misc]
    with (folder / f"{stem}.safetensors").open("wb") as out:
        write_safetensors(out, entries)
    (folder / f"{stem}.json").write_text(dump_json(layout))


def checkpoint_tensors(folder: Path) -> Tensors:
    """Every tensor of a checkpoint by its name in the files, whole again; UnsoundCheckpoint when rows are missing."""
    pieces: dict[str, list[Piece]] = {}
    for path in sorted(folder.glob("rank-*.json")):
        file = read_safetensors(path.with_suffix(".safetensors"))
        for name, facts in json.loads(path.read_text()).items():
            pieces.setdefault(name, []).append(Piece(facts["first"], file[name], tuple(facts["shape"])))
    return {name: _joined(folder, name, parts) for name, parts in pieces.items()}


def weight_tensors(folder: Path) -> Tensors:
    """The trained parameters of a checkpoint by full name."""
    return {n.removeprefix(WEIGHTS): rows for n, rows in checkpoint_tensors(folder).items() if n.startswith(WEIGHTS)}


def _joined(folder: Path, name: str, parts: list[Piece]) -> Rows:
    parts = sorted(parts, key=lambda piece: piece.first)
    shape, end = parts[0].shape, 0
    for piece in parts:
        if piece.first != end or piece.shape != shape:
            raise UnsoundCheckpoint(f"{folder}: the pieces of {name} do not fit together at row {end}")
        end += piece.rows.shape[0] if shape else 1
    if shape and end != shape[0]:
        raise UnsoundCheckpoint(f"{folder}: rows {end} to {shape[0]} of {name} are missing")

    def read(start: int, stop: int) -> Tensor:
        if not shape:
            return parts[0].rows.all()
        found = [
            piece.rows.read(max(start - piece.first, 0), min(stop - piece.first, piece.rows.shape[0]))
            for piece in parts
            if piece.first < stop and start < piece.first + piece.rows.shape[0]
        ]
        return torch.cat(found) if found else torch.empty(0, *shape[1:])

    return Rows(shape, read)
