"""Experts of a mixture: separate matrices in the files of most families, fused into 3-D parameters in memory."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch import Tensor, nn

from model.errors import ConfigError
from model.files.tensor_files import LazyTensor, Tensors

PIECE = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.weight")
FUSED = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""Matrices that are stacked in each row of a fused parameter, top to bottom, by the names in Qwen's and in Mixtral's files."""
MOVED = (".block_sparse_moe.", ".mlp.")
"""Name of a block's mixture in Mixtral's files, and in memory."""


def fuse_experts(tensors: Tensors, own: Collection[str] = ()) -> Tensors:
    """Return the tensors by their names in memory, experts fused: row e of `...experts.gate_up_proj` (E, 2 I, D) and of
    `...experts.down_proj` (E, D, I) consists of the matrices of expert e.

    Rows are read on demand, so a rank reads only the experts of its own shard. `own`: names in memory; where some are like those of
    Mixtral's files, as Granite's, the files' names are kept. Fused parameters in the files, and files of other models, are returned
    unchanged. Raises `ConfigError` when a matrix of an expert is missing.
    """
    found: Tensors = {}
    moves = not any(MOVED[0] in name for name in own)
    pieces: dict[str, dict[int, dict[str, LazyTensor]]] = {}
    for name, rows in tensors.items():
        name = name.replace(*MOVED) if moves else name
        if match := PIECE.fullmatch(name):
            block, expert, piece = match.groups()
            pieces.setdefault(block, {}).setdefault(int(expert), {})[piece] = rows
        else:
            found[name] = rows
    for block, experts in pieces.items():
        for parameter, choices in FUSED.items():
            found[f"{block}.experts.{parameter}"] = _stacked(f"{block}.experts", experts, choices)
    return found


def _stacked(where: str, experts: dict[int, dict[str, LazyTensor]], choices: tuple[tuple[str, ...], ...]) -> LazyTensor:
    """Stack the experts along dim 0, and the matrices of each expert along its rows."""
    names = next((names for names in choices if names[0] in experts[min(experts)]), choices[0])
    known = {name for pieces in FUSED.values() for group in pieces if group[0] in experts[min(experts)] for name in group}
    if unknown := [f"{where}.{e}.{name}.weight" for e, pieces in experts.items() for name in pieces if name not in known]:
        raise ConfigError(f"model.llm.path: the files hold {unknown[0]}, which no expert of this model has, and would be lost")
    missing = [f"{where}.{e}.{name}.weight" for e in range(max(experts) + 1) for name in names if name not in experts.get(e, {})]
    if missing:
        raise ConfigError(f"model.llm.path: the files lack {len(missing)} tensors of experts, for example {missing[0]}")
    rows = [[experts[e][name] for name in names] for e in range(len(experts))]
    shapes = {tuple(piece.shape for piece in pieces) for pieces in rows}
    if len(shapes) > 1:
        raise ConfigError(f"model.llm.path: the experts of {where} are not of one shape: {sorted(shapes)}")
    height, width = sum(piece.shape[0] for piece in rows[0]), rows[0][0].shape[1]

    def read(start: int, stop: int) -> Tensor:
        if start == stop:
            return torch.empty(0, height, width)
        return torch.stack([torch.cat([piece.all() for piece in rows[e]]) for e in range(start, stop)])

    return LazyTensor((len(rows), height, width), read)


def fused_parameters(module: nn.Module) -> list[str]:
    """Return the names of the 3-D parameters of `module` that hold experts. LoRA and quantisation change linear layers only, and so
    do not reach these parameters.
    """
    return [name for name, parameter in module.named_parameters() if parameter.dim() == 3 and ".experts." in f".{name}"]
