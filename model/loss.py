"""Cross entropy of the supervised rows alone, without ever holding their full logits."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from model.batch import Batch
from model.logit_scaling import UNCHANGED, LogitChange

CHUNK = 2048
"""Supervised rows whose logits exist at one time."""


class Term(NamedTuple):
    """One term of the loss of a micro-batch; the trainer divides sums by the counts of the whole step."""

    sum: Tensor  # () float32, with graph
    addends: Tensor  # (S,) float32, what was summed, without graph
    ratios: Mapping[str, Tensor] = MappingProxyType({})  # what the log shows beside: (2,) sum and count by name, without graph

    @property
    def num_addends(self) -> int:
        return self.addends.shape[0]


class NewRows(NamedTuple):
    """Rows of the head that stand elsewhere than in its matrix (V, D)."""

    ids: Tensor  # (n,) int64, which rows
    rows: Tensor  # (n, D)

    def onto(self, products: Tensor, hidden: Tensor) -> Tensor:
        """products (s, V) of hidden (s, D), in place."""
        return products.index_copy_(1, self.ids, hidden @ self.rows.T)

    def taken_out(self, grad: Tensor) -> Tensor:
        """Columns (s, n) of a gradient (s, V), which are zero in it afterwards: the matrix has no part in them."""
        taken = grad.index_select(1, self.ids)
        grad.index_fill_(1, self.ids, 0.0)
        return taken


class LossTerm(Protocol):
    """A term beside that of the text. Over a step it is the sum of its terms, over its counts, times the coefficient."""

    coefficient: float

    def count(self, batch: Batch) -> Tensor | float:
        """What the sum of `term` is divided by, once all of a step are added: known before the forward, without a host sync."""

    def term(self, hidden: Tensor, batch: Batch) -> Term:
        """Of the decoder's output (B, T, D)."""


class ChunkedLoss(torch.autograd.Function):
    """Summed cross entropy of change(hidden (S, D) @ weight.T (V, D)) against targets (S,) -> sum (), rows (S,).

    `new_rows` (n, D) take the place of rows `new_ids` (n,) of `weight`, which is neither copied nor changed.
    Gradients are made in forward, chunk by chunk: no logits survive, nothing is recomputed, and a sharded head is not
    gathered again in backward. With S = 0 the sum is 0 and so are all gradients. No double backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        change: LogitChange,
        new_rows: Tensor | None,
        new_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        new = None if new_rows is None or new_ids is None else NewRows(new_ids, new_rows)
        rows = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        d_new = torch.zeros_like(new.rows, dtype=torch.float32) if new is not None else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            h, target = hidden[part], targets[part, None]
            products = h @ weight.T if new is None else new.onto(h @ weight.T, h)
            logits = change(products.float())
            log_z = logits.logsumexp(-1, keepdim=True)
            rows[part] = (log_z - logits.gather(1, target)).squeeze(1)
            if not any(ctx.needs_input_grad):
                continue
            p = (logits - log_z).exp_().scatter_add_(1, target, torch.full_like(log_z, -1.0))
            p = change.gradient(logits, p).to(weight.dtype)
            p_new = None if new is None else new.taken_out(p)
            if d_hidden is not None:
                d_hidden[part] = p @ weight if p_new is None else torch.addmm(p @ weight, p_new, new_rows)  # type: ignore[arg-type]
            if d_weight is not None:
                d_weight += (p.T @ h).float()
            if d_new is not None:
                d_new += (p_new.T @ h).float()  # type: ignore[union-attr]
        ctx.save_for_backward(d_hidden, d_weight, d_new)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(rows)
        return rows.sum(), rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_hidden, d_weight, d_new = ctx.saved_tensors
        hidden = None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype)
        weight, new = (None if d is None else (d * grad).to(ctx.weight_dtype) for d in (d_weight, d_new))
        return hidden, weight, None, None, None, new, None


def text_term(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    supervised: Tensor,
    chunk: int = CHUNK,
    *,
    change: LogitChange = UNCHANGED,
    new: NewRows | None = None,
) -> Term:
    """hidden (B, T, D), weight (V, D), labels (B, T), supervised (S,) flat positions -> the text term."""
    rows = hidden.flatten(0, 1).index_select(0, supervised)
    targets = labels.flatten().index_select(0, supervised)
    new_rows, new_ids = (None, None) if new is None else (new.rows, new.ids)
    return Term(*ChunkedLoss.apply(rows, weight, targets, chunk, change, new_rows, new_ids))
