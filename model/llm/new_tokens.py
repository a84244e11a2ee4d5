"""Rows of added tokens that learn, beside vocabulary matrices that stay as they are (LLaVA's tune of im_start and im_end).

The rows are a parameter of their own next to the matrix, so an optimizer, a checkpoint and a gradient hold nothing else.
In use they take the place of the matrix's rows without a copy of it; saved, they are merged wherever a model is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.errors import ConfigError
from model.loss import NewRows

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
