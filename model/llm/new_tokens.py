"""Trainable rows of added tokens beside frozen vocabulary matrices (as LLaVA tunes im_start and im_end).

The rows are a parameter of their own next to the matrix, so optimizer, checkpoint and gradient hold only these rows. In the forward
pass they replace the matrix's rows without a copy of the matrix; saved rows are merged when a model is loaded.
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
    """Add rows (n, D) on meta to the embedding and the head of `llm`, for the tokens `ids`, which ascend.

    Tied matrices share one parameter. Raises `ConfigError` when `ids` is empty or does not ascend.
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
    """Embed ids (B, T) -> (B, T, D), with the rows of new tokens from `new_rows`. No host sync."""
    place = torch.searchsorted(embedding.new_ids, ids).clamp_(max=embedding.new_ids.shape[0] - 1)
    is_new = embedding.new_ids[place] == ids
    known = forward(ids)
    # The embedding's own forward, which may scale, runs on `new_rows`; its padding index is a row of the large matrix.
    weight, padding = embedding._parameters["weight"], embedding.padding_idx
    try:
        embedding._parameters["weight"], embedding.padding_idx = embedding.new_rows, None
        new = forward(place)
    finally:
        embedding._parameters["weight"], embedding.padding_idx = weight, padding
    return torch.where(is_new[..., None], new.to(known.dtype), known)


def _project(head: Any, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Multiply hidden (..., D) by the head with its new rows -> (..., V), for generation; the loss uses `new_head_rows`."""
    return forward(hidden).index_copy(-1, head.new_ids, F.linear(hidden, head.new_rows.to(hidden.dtype)))


def new_head_rows(llm: nn.Module, dtype: torch.dtype) -> NewRows | None:
    """Return the rows that the loss uses in place of the head's own; None when the model has no new rows."""
    head: Any = llm.get_output_embeddings()  # type: ignore[operator]
    rows = getattr(head, "new_rows", None)
    return None if rows is None else NewRows(head.new_ids, rows.to(dtype))


def is_new_rows(name: str) -> bool:
    """Tell whether a parameter's full name is that of new rows."""
    return name.endswith(SUFFIX)
