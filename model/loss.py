"""Cross entropy of the supervised rows alone, without ever holding their full logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 2048
"""Supervised rows whose logits exist at one time."""


class Term(NamedTuple):
    """One term of the loss of a micro-batch; the trainer divides sums by the counts of the whole step."""

    sum: Tensor  # () float32, with graph
    addends: Tensor  # (S,) float32, what was summed, without graph

    @property
    def num_addends(self) -> int:
        return self.addends.shape[0]


class ChunkedLoss(torch.autograd.Function):
    """Summed cross entropy of hidden (S, D) @ weight.T (V, D) against targets (S,) -> sum (), rows (S,).

    Gradients are made in forward, chunk by chunk: no logits survive, nothing is recomputed, and a sharded head is not
    gathered again in backward. With S = 0 the sum is 0 and so are both gradients. No double backward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        rows = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            h, target = hidden[part], targets[part, None]
            logits = (h @ weight.T).float()
            log_z = logits.logsumexp(-1, keepdim=True)
            rows[part] = (log_z - logits.gather(1, target)).squeeze(1)
            if d_hidden is None and d_weight is None:
                continue
            p = (logits - log_z).exp_().scatter_add_(1, target, torch.full_like(log_z, -1.0)).to(weight.dtype)
            if d_hidden is not None:
                d_hidden[part] = p @ weight
            if d_weight is not None:
                d_weight += (p.T @ h).float()
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(rows)
        return rows.sum(), rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_hidden, d_weight = ctx.saved_tensors
        hidden = None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype)
        weight = None if d_weight is None else (d_weight * grad).to(ctx.weight_dtype)
        return hidden, weight, None, None


def text_term(hidden: Tensor, weight: Tensor, labels: Tensor, supervised: Tensor, chunk: int = CHUNK) -> Term:
    """hidden (B, T, D), weight (V, D), labels (B, T), supervised (S,) flat positions -> the text term."""
    rows = hidden.flatten(0, 1).index_select(0, supervised)
    targets = labels.flatten().index_select(0, supervised)
    return Term(*ChunkedLoss.apply(rows, weight, targets, chunk))
