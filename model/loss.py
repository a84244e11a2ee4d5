"""Cross entropy of the supervised rows, computed in chunks so that the full logits never exist."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from model.batch import Batch
from model.llm.interface import UNCHANGED, LogitChange

CHUNK = 2048
"""Supervised rows whose logits exist at one time."""


class Term(NamedTuple):
    """One term of the loss of a micro-batch; the trainer divides sums by the counts of the whole step."""

    sum: Tensor  # () float32, with graph
    addends: Tensor  # (S,) float32, the summands of `sum`, without graph
    ratios: Mapping[str, Tensor] = MappingProxyType({})  # logged quantities by name: (2,) sum and count, without graph

    @property
    def num_addends(self) -> int:
        return self.addends.shape[0]


class NewRows(NamedTuple):
    """Rows of the head that are stored outside its matrix (V, D)."""

    ids: Tensor  # (n,) int64, indices of these rows in the matrix
    rows: Tensor  # (n, D)

    def onto(self, products: Tensor, hidden: Tensor) -> Tensor:
        """Write the new rows' products into products (s, V) of hidden (s, D), in place."""
        return products.index_copy_(1, self.ids, hidden @ self.rows.T)

    def taken_out(self, grad: Tensor) -> Tensor:
        """Return the new rows' columns (s, n) of a gradient (s, V), and set them to zero in it: the matrix has no part in them."""
        taken = grad.index_select(1, self.ids)
        grad.index_fill_(1, self.ids, 0.0)
        return taken


@dataclass(frozen=True)
class HeadOptions:
    """How the head's logits are computed."""

    chunk: int = CHUNK  # supervised rows at a time
    change: LogitChange = UNCHANGED  # what the model does to its logits
    new: NewRows | None = None  # rows that take the place of those of the head's matrix


class LossTerm(Protocol):
    """A loss term beside the text term. Its value over a step is the sum of `term` over the sum of `count`, times `coefficient`."""

    coefficient: float

    def count(self, batch: Batch) -> Tensor | float:
        """Return the batch's share of the divisor of `term`, which a step adds up. Known before the forward, without host sync."""

    def term(self, hidden: Tensor, batch: Batch) -> Term:
        """Compute the term from the decoder's output (B, T, D)."""


class ChunkedLoss(torch.autograd.Function):
    """Summed cross entropy of change(hidden (S, D) @ weight.T (V, D)) against targets (S,) -> sum (), rows (S,).

    `new_rows` (n, D), those of `options.new`, take the place of rows of `weight`, which is neither copied nor changed. They are an
    argument of their own because autograd sees no tensor inside another object. Gradients are computed
    in forward, chunk by chunk: no logits are kept, nothing is recomputed, and a sharded head is not gathered again in backward.
    With S = 0 the sum is 0 and so are all gradients. No double backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        new_rows: Tensor | None,
        targets: Tensor,
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor]:
        chunk, change = options.chunk, options.change
        new = None if new_rows is None or options.new is None else NewRows(options.new.ids, new_rows)
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
                d_hidden[part] = p @ weight if new is None or p_new is None else torch.addmm(p @ weight, p_new, new.rows)
            if d_weight is not None:
                d_weight += (p.T @ h).float()
            if d_new is not None and p_new is not None:
                d_new += (p_new.T @ h).float()
        ctx.save_for_backward(d_hidden, d_weight, d_new)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(rows)
        return rows.sum(), rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        d_hidden, d_weight, d_new = ctx.saved_tensors
        hidden = None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype)
        weight, new = (None if d is None else (d * grad).to(ctx.weight_dtype) for d in (d_weight, d_new))
        return hidden, weight, new, None, None


def text_term(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    supervised: Tensor,
    options: HeadOptions = HeadOptions(),
) -> Term:
    """Compute the text term from hidden (B, T, D), weight (V, D), labels (B, T) and supervised (S,) flat positions."""
    rows = hidden.flatten(0, 1).index_select(0, supervised)
    targets = labels.flatten().index_select(0, supervised)
    new_rows = None if options.new is None else options.new.rows
    return Term(*ChunkedLoss.apply(rows, weight, new_rows, targets, options))
