"""Experts of a mixture: one matrix each in the files of most families, fused into 3-D parameters in memory."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch import Tensor, nn

from model.errors import ConfigError
from model.files.tensor_files import LazyTensor, Tensors

PIECE = re.compile(r"(.+)\.experts\.(\d+)\.(\w+)\.weight")
FUSED = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""What stands in a row of each fused parameter, one below the other, by the names of Qwen's and of Mixtral's files."""
MOVED = (".block_sparse_moe.", ".mlp.")
"""What Mixtral's files call a block's mixture, and its name in memory."""


def fused(tensors: Tensors, own: Collection[str] = ()) -> Tensors:
    """The same tensors by their names in memory: row e of `...experts.gate_up_proj` (E, 2 I, D) and `...experts.down_proj`
    (E, D, I) is what the files hold of expert e, read when it is needed, so a rank reads the experts of its own shard alone.

    `own`: names in memory; where some are like Mixtral's files, as Granite's, those of the files are not replaced. Files that hold
    fused parameters, and those of other models, come out as they are. ConfigError when a piece is missing.
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
    """Expert after expert, the pieces of each one below the other."""
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
    """Names of the 3-D parameters of `module` that hold experts: neither LoRA nor quantisation of linear layers reaches them."""
    return [name for name, parameter in module.named_parameters() if parameter.dim() == 3 and ".experts." in f".{name}"]
