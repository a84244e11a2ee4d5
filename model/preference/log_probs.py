"""Log-probabilities of tokens, in chunks so that the full logits never exist, with gradients that differ from token to token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.loss import HeadOptions, NewRows, add_product, cross_entropy_chunk


def token_log_probs(rows: Tensor, weight: Tensor, targets: Tensor, options: HeadOptions = HeadOptions()) -> Tensor:  # noqa: B008
    """Compute the log-probability (R,) float32 of each of targets (R,) after hidden rows (R, D), for a head of weight (V, D)."""
    new_rows = None if options.new is None else options.new.rows
    found: Tensor = _TokenLogProbs.apply(rows, weight, new_rows, targets, options)
    return found


class _TokenLogProbs(torch.autograd.Function):
    """`token_log_probs`, as `model.loss.ChunkedLoss` but for a gradient per row.

    Of a frozen head, each row's gradient is made in forward and scaled in backward. The gradient of a head that learns sums rows by
    factors that only backward knows: logits are computed again there.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, new_rows: Tensor | None, targets: Tensor, options: HeadOptions) -> Tensor:
        ctx.options, again = options, ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        rows = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] and not again else None
        new = _new_rows(options, new_rows)
        for part in _parts(hidden, options):
            loss, p = cross_entropy_chunk(hidden[part], weight, new, targets[part, None], options.change)
            rows[part] = -loss
            if d_hidden is not None:
                d_hidden[part] = _to_hidden(-p, weight, new)
            del p  # or it would live beside the logits of the next chunk
        ctx.save_for_backward(d_hidden, *((hidden, weight, new_rows, targets) if again else ()))
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, *saved = ctx.saved_tensors
        if not saved:
            return (None if d_hidden is None else d_hidden * grads[0][:, None].to(d_hidden.dtype)), None, None, None, None
        hidden, weight, new_rows, targets = saved
        new, options = _new_rows(ctx.options, new_rows), ctx.options
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        d_new = torch.zeros_like(new.rows, dtype=torch.float32) if new is not None else None
        for part in _parts(hidden, options):
            h = hidden[part]
            _, p = cross_entropy_chunk(h, weight, new, targets[part, None], options.change)
            p *= -grads[0][part, None].to(p.dtype)
            p_new = None if new is None else new.taken_out(p)
            d_hidden[part] = p @ weight if new is None or p_new is None else torch.addmm(p @ weight, p_new, new.rows)
            if d_weight is not None:
                add_product(d_weight, p, h)
            if d_new is not None and p_new is not None:
                add_product(d_new, p_new, h)
            del p
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_new is None else d_new.to(weight.dtype),
            None,
            None,
        )


def _new_rows(options: HeadOptions, rows: Tensor | None) -> NewRows | None:
    return None if rows is None or options.new is None else NewRows(options.new.ids, rows)


def _parts(hidden: Tensor, options: HeadOptions) -> list[slice]:
    size = options.chunk_of(hidden.shape[0])
    return [slice(start, start + size) for start in range(0, hidden.shape[0], size)]


def _to_hidden(p: Tensor, weight: Tensor, new: NewRows | None) -> Tensor:
    """Return the gradient (s, D) of hidden rows for that of their products p (s, V), which is changed."""
    if new is None:
        return p @ weight
    p_new = new.taken_out(p)
    return torch.addmm(p @ weight, p_new, new.rows)
