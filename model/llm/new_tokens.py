"""Trainable rows of added tokens beside frozen vocabulary matrices (as LLaVA tunes im_start and im_end).

The rows are a parameter of their own next to the matrix, so optimizer, checkpoint and gradient hold only these rows. In the forward
pass they replace the matrix's rows without a copy of the matrix; saved rows are merged when a model is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.errors import ConfigError
from model.llm.interface import CausalLM
from model.loss import NewRows

SUFFIX = ".new_rows"
FILE = "new_tokens.safetensors"


def add_new_rows(llm: CausalLM, ids: tuple[int, ...]) -> None:
    """Add rows (n, D) on meta to the embedding and the head of `llm`, for the tokens `ids`, which ascend.

    Tied matrices share one parameter. Raises `ConfigError` when `ids` is empty or does not ascend.
    """
    if not ids or list(ids) != sorted(set(ids)):
        raise ConfigError(f"model.llm.tune = 'new_tokens': ids {list(ids)} of the tokens that learn are none, or do not ascend")
    embedding, head = llm.get_input_embeddings(), llm.get_output_embeddings()
    rows = nn.Parameter(torch.empty(len(ids), embedding.embedding_dim, device="meta"))
    own = rows if head.weight is embedding.weight else nn.Parameter(torch.empty_like(rows))
    _attach(embedding, rows, ids, functools.partial(_embed, embedding, embedding.forward))
    _attach(head, own, ids, functools.partial(_project, head, head.forward))


def _attach(module: nn.Module, rows: nn.Parameter, ids: tuple[int, ...], forward: Callable[[Tensor], Tensor]) -> None:
    module.register_parameter("new_rows", rows)
    module.register_buffer("new_ids", torch.tensor(ids), persistent=False)
    module.forward = forward


def _embed(embedding: nn.Embedding, forward: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """Embed ids (B, T) -> (B, T, D), with the rows of new tokens from `new_rows`. No host sync."""
    new_ids = embedding.get_buffer("new_ids")
    place = torch.searchsorted(new_ids, ids).clamp_(max=new_ids.shape[0] - 1)
    is_new = new_ids[place] == ids
    known = forward(ids)
    # The embedding's own forward, which may scale, runs on `new_rows`; its padding index is a row of the large matrix.
    weight, padding = embedding._parameters["weight"], embedding.padding_idx
    try:
        embedding._parameters["weight"], embedding.padding_idx = embedding._parameters["new_rows"], None
        new = forward(place)
    finally:
        embedding._parameters["weight"], embedding.padding_idx = weight, padding
    return torch.where(is_new[..., None], new.to(known.dtype), known)


def _new_rows(module: nn.Module) -> Tensor:
    """Return the new rows (n, D): a parameter, or the plain tensor that it is cast to in a forward (`cast_for_compute`)."""
    rows = module._parameters["new_rows"]
    assert rows is not None
    return rows


def _project(head: nn.Linear, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Multiply hidden (..., D) by the head with its new rows -> (..., V), for generation; the loss uses `new_head_rows`."""
    new = F.linear(hidden, _new_rows(head).to(hidden.dtype))
    return forward(hidden).index_copy(-1, head.get_buffer("new_ids"), new)


def new_head_rows(llm: CausalLM, dtype: torch.dtype) -> NewRows | None:
    """Return the rows that the loss uses in place of the head's own; None when the model has no new rows."""
    head = llm.get_output_embeddings()
    return NewRows(head.get_buffer("new_ids"), _new_rows(head).to(dtype)) if "new_rows" in head._parameters else None


def is_new_rows(name: str) -> bool:
    """Tell whether a parameter's full name is that of new rows."""
    return name.endswith(SUFFIX)
