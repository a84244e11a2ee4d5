"""Trained rows of added tokens: merged into vocabulary matrices when a model is loaded, and given initial values in a new run."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.errors import ConfigError
from model.files.tensor_files import LazyTensor, Tensors
from model.llm.new_tokens import SUFFIX, is_new_rows
from model.weights.materialise import Layer, resolve_value


@dataclass(frozen=True)
class RowPatch:
    """Rows that replace rows of a vocabulary matrix from an older layer."""

    ids: tuple[int, ...]
    rows: LazyTensor

    def onto(self, weight: LazyTensor) -> LazyTensor:
        """Return the matrix with its rows `ids` replaced; a sharded load reads only its own rows."""

        def read(start: int, stop: int) -> Tensor:
            found = weight.read(start, stop)
            inside = [(i, token - start) for i, token in enumerate(self.ids) if start <= token < stop]
            if inside:
                found = found.float().clone()  # the rows may be a view of a file
                sources, places = zip(*inside)
                found[list(places)] = self.rows.all()[list(sources)].float()
            return found

        return LazyTensor(weight.shape, read)


def row_patches(tensors: Tensors, ids: tuple[int, ...], origin: str) -> dict[str, RowPatch]:
    """Return patches by the full name of their matrix. Raises `ConfigError` when the numbers of rows and of ids differ."""
    found = {}
    for name, rows in tensors.items():
        if is_new_rows(name):
            if rows.shape[0] != len(ids):
                raise ConfigError(f"{origin}: {name} has {rows.shape[0]} rows for the {len(ids)} tokens of its model.json")
            found[name.removesuffix(SUFFIX) + ".weight"] = RowPatch(ids, rows)
    return found


def first_rows(model: nn.Module, ids: tuple[int, ...], layers: list[Layer]) -> Tensors:
    """Return the initial values of new rows: the rows that `layers` have in the matrix.

    For an unknown token, `grow_embedding` makes this row the mean of the known ones.
    """
    found: Tensors = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        matrix = resolve_value(name.removesuffix(SUFFIX) + ".weight", layers) if is_new_rows(name) else None
        if matrix is not None:
            found[name] = LazyTensor(tuple(parameter.shape), functools.partial(_rows_of, matrix, ids))
    return found


def _rows_of(matrix: LazyTensor, ids: tuple[int, ...], start: int, stop: int) -> Tensor:
    # The last ranks may hold no row at all.
    return torch.cat([matrix.read(0, 0).float(), *(matrix.read(i, i + 1).float() for i in ids[start:stop])])
