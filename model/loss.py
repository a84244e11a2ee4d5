"""Cross entropy of the supervised rows, computed in chunks so that the full logits never exist."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from model.batch import Batch
from model.llm.interface import UNCHANGED, LogitChange

LEAST_ROWS, MOST_ROWS = 128, 2048
"""Bounds of the supervised rows whose logits exist at one time."""
PARTS = 8
"""Parts in which supervised rows are taken, within the bounds, and in which a bfloat16 head's gradient is added up and rounded."""


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

    chunk: int | None = None  # supervised rows at a time; None: an eighth of them, in bounds
    change: LogitChange = UNCHANGED  # what the model does to its logits
    new: NewRows | None = None  # rows that take the place of those of the head's matrix

    def chunk_of(self, num_rows: int) -> int:
        """Return how many of `num_rows` supervised rows are computed at a time.

        Few enough that the logits take fewer bytes than any operator that keeps them all, and enough for products to be efficient.
        """
        return self.chunk or min(max(-(-num_rows // PARTS), LEAST_ROWS), MOST_ROWS)


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
        ctx: Any, hidden: Tensor, weight: Tensor, new_rows: Tensor | None, targets: Tensor, options: HeadOptions
    ) -> tuple[Tensor, Tensor]:
        chunk, change = options.chunk_of(hidden.shape[0]), options.change
        new = None if new_rows is None or options.new is None else NewRows(options.new.ids, new_rows)
        rows = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        d_new = torch.zeros_like(new.rows, dtype=torch.float32) if new is not None else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            h = hidden[part]
            rows[part], p = cross_entropy_chunk(h, weight, new, targets[part, None], change)
            if not any(ctx.needs_input_grad):
                continue
            p_new = None if new is None else new.taken_out(p)
            if d_hidden is not None:
                d_hidden[part] = p @ weight if new is None or p_new is None else torch.addmm(p @ weight, p_new, new.rows)
            if d_weight is not None:
                add_product(d_weight, p, h)
            if d_new is not None and p_new is not None:
                add_product(d_new, p_new, h)
            del p  # or it would live beside the logits of the next chunk
        ctx.save_for_backward(d_hidden, d_weight, d_new)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(rows)
        return rows.sum(), rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        d_hidden, d_weight, d_new = ctx.saved_tensors
        hidden = None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype)
        weight, new = (None if d is None else _scaled(d, grad, ctx.weight_dtype) for d in (d_weight, d_new))
        return hidden, weight, new, None, None


def cross_entropy_chunk(
    h: Tensor, weight: Tensor, new: NewRows | None, target: Tensor, change: LogitChange
) -> tuple[Tensor, Tensor]:
    """Return the cross entropy (s,) float32 of rows h (s, D) against target (s, 1), and its gradient (s, V) of the products, in the
    type of `weight`.

    The softmax is computed in float32 and in place: at most one float32 matrix (s, V) and one of the weight's type are alive.
    """
    products = h @ weight.T if new is None else new.onto(h @ weight.T, h)
    logits = change(products.float())
    kept = logits if change.cap is None else logits.clone()  # the gradient of a cap needs the logits themselves
    del products
    highest = kept.amax(-1, keepdim=True)
    of_target = kept.gather(1, target)
    total = kept.sub_(highest).exp_().sum(-1, keepdim=True)
    loss = total.log() + (highest - of_target)
    p = kept.div_(total).scatter_add_(1, target, torch.full_like(total, -1.0))
    return loss.squeeze(1), change.gradient(logits, p).to(weight.dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left.T @ right, (s, a) and (s, b), to total (a, b) float32 in place, without a float32 copy of the whole product."""
    if left.dtype == total.dtype:
        total.addmm_(left.T, right)
        return
    size = max(1, -(-total.shape[0] // PARTS))
    for rows, columns in zip(total.split(size), left.split(size, 1)):
        rows += columns.T @ right


def _scaled(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return total (a, b) float32 times `factor` () in `dtype`, without a second float32 copy of it."""
    if total.dtype == dtype:
        return total * factor
    scaled = torch.empty_like(total, dtype=dtype)
    size = max(1, -(-total.shape[0] // PARTS))
    for source, rows in zip(total.split(size), scaled.split(size)):
        rows.copy_(source * factor)
    return scaled


def text_term(hidden: Tensor, weight: Tensor, labels: Tensor, supervised: Tensor, options: HeadOptions = HeadOptions()) -> Term:
    """Compute the text term from hidden (B, T, D), weight (V, D), labels (B, T) and supervised (S,) flat positions, ascending.

    `hidden` may hold the supervised rows alone, (1, S, D): as many rows as there are supervised positions are these.
    """
    rows = hidden.flatten(0, 1)
    if len(rows) != len(supervised):
        rows = rows.index_select(0, supervised)
    targets = labels.flatten().index_select(0, supervised)
    new_rows = None if options.new is None else options.new.rows
    return Term(*ChunkedLoss.apply(rows, weight, new_rows, targets, options))
