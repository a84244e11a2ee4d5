"""Rows of added tokens that learn, beside vocabulary matrices that stay as they are (LLaVA's tune of im_start and im_end).

The rows are a parameter of their own next to the matrix, so an optimizer, a checkpoint and a gradient hold nothing else.
In use they take the place of the matrix's rows without a copy of it; saved, they are merged wherever a model is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ConfigError
from model.files.tensor_files import Rows, Tensors
from model.loss import NewRows
from model.weights.materialise import Layer, resolve

SUFFIX = ".new_rows"
FILE = "new_tokens.safetensors"


def add_new_rows(llm: nn.Module, ids: tuple[int, ...]) -> None:
    """Give the embedding and the head of `llm` rows (n, D) of their own, on meta, for tokens `ids`, which ascend.

    Tied matrices get one parameter, as they are one. ConfigError without ids.
    """
    if not ids or list(ids) != sorted(set(ids)):
        raise ConfigError(f"model.llm.tune = 'new_tokens': ids {list(ids)} of the tokens that learn are none, or do not ascend")
    embedding, head = llm.get_input_embeddings(), llm.get_output_embeddings()  # type: ignore[operator]
    rows = nn.Parameter(torch.empty(len(ids), embedding.embedding_dim, device="meta"))
    own = rows if head.weight is embedding.weight else nn.Parameter(torch.empty_like(rows))
    for module, parameter, forward in ((embedding, rows, _embed), (head, own, _project)):
        module.register_parameter("new_rows", parameter)
        module.register_buffer("new_ids", torch.tensor(ids), persistent=False)
        module.forward = functools.partial(forward, module, module.forward)


def _embed(embedding: Any, forward: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """ids (B, T) -> (B, T, D), rows of new tokens from `new_rows`. No host sync."""
    place = torch.searchsorted(embedding.new_ids, ids).clamp_(max=embedding.new_ids.shape[0] - 1)
    is_new = embedding.new_ids[place] == ids
    known = forward(ids)
    # The embedding's own code, which may scale, on another matrix; its padding index means a row of the large one.
    weight, padding = embedding._parameters["weight"], embedding.padding_idx
    try:
        embedding._parameters["weight"], embedding.padding_idx = embedding.new_rows, None
        new = forward(place)
    finally:
        embedding._parameters["weight"], embedding.padding_idx = weight, padding
    return torch.where(is_new[..., None], new.to(known.dtype), known)


def _project(head: Any, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Products (..., V) of hidden (..., D), as generation asks for them; the loss takes the rows by themselves."""
    return forward(hidden).index_copy(-1, head.new_ids, F.linear(hidden, head.new_rows.to(hidden.dtype)))


def new_head_rows(llm: nn.Module, dtype: torch.dtype) -> NewRows | None:
    """Rows that the loss uses in place of the head's own; None unless the model has some."""
    head: Any = llm.get_output_embeddings()  # type: ignore[operator]
    rows = getattr(head, "new_rows", None)
    return None if rows is None else NewRows(head.new_ids, rows.to(dtype))


def is_new_rows(name: str) -> bool:
    """Whether a parameter's full name is that of new rows."""
    return name.endswith(SUFFIX)


@dataclass(frozen=True)
class RowPatch:
    """Rows to be put into the vocabulary matrix below them."""

    ids: tuple[int, ...]
    rows: Rows

    def onto(self, weight: Rows) -> Rows:
        """The matrix with its rows `ids` replaced; a sharded load reads its own rows only."""

        def read(start: int, stop: int) -> Tensor:
            found = weight.read(start, stop)
            inside = [(i, token - start) for i, token in enumerate(self.ids) if start <= token < stop]
            if inside:
                found = found.float().clone()  # what was read may be a view of a file
                sources, places = zip(*inside)
                found[list(places)] = self.rows.all()[list(sources)].float()
            return found

        return Rows(weight.shape, read)


def row_patches(tensors: Tensors, ids: tuple[int, ...], origin: str) -> dict[str, RowPatch]:
    """Patches by the full name of the matrix they belong to. ConfigError when there are not as many rows as ids."""
    found = {}
    for name, rows in tensors.items():
        if is_new_rows(name):
            if rows.shape[0] != len(ids):
                raise ConfigError(f"{origin}: {name} has {rows.shape[0]} rows for the {len(ids)} tokens of its model.json")
            found[name.removesuffix(SUFFIX) + ".weight"] = RowPatch(ids, rows)
    return found


def first_rows(model: nn.Module, ids: tuple[int, ...], layers: list[Layer]) -> Tensors:
    """Where new rows start: at what `layers` have in the matrix, which for a token nobody knows is the mean of the known ones."""
    found: Tensors = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        matrix = resolve(name.removesuffix(SUFFIX) + ".weight", layers) if is_new_rows(name) else None
        if matrix is not None:
            found[name] = Rows(tuple(parameter.shape), functools.partial(_rows_of, matrix, ids))
    return found


def _rows_of(matrix: Rows, ids: tuple[int, ...], start: int, stop: int) -> Tensor:
    # A late rank may hold no row at all.
    return torch.cat([matrix.read(0, 0).float(), *(matrix.read(i, i + 1).float() for i in ids[start:stop])])
