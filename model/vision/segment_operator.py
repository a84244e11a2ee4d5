"""Attention inside segments of packed patches by torch's kernels of one segment, and the same as one operator of compiled blocks.

A compiler would unroll the loop over segments, and compile again for every other number of pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_by_runs(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float | None, dropout: float = 0.0
) -> Tensor:
    """Compute attention inside each segment, in both directions: query, key and value (1, H, P, D) -> (1, P, H, D).

    One call computes a run of segments of equal length.
    """
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    parts = []
    # Split, not sliced: the gradient of a slice is as large as the whole, with zeros around.
    for (length, count), *run in zip(runs, *(tensor[0].split(sizes, dim=1) for tensor in (query, key, value))):
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in run)  # (segments, H, length, D)
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        parts.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None]


def attend_in_graph(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float | None) -> Tensor:
    """Compute `attend_by_runs` where a compiler traces it; backward computes the attention again.

    `lengths` (segments,): int64 on the CPU, so that no device is waited for.
    """
    found: Tensor = _Attend.apply(query, key, value, lengths, scale)
    return found


class _Saved(Protocol):
    """The context of a call, which keeps tensors and the scale for backward."""

    saved_tensors: tuple[Tensor, ...]
    scale: float | None

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Saved, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float | None) -> Tensor:
        ctx.save_for_backward(query, key, value, lengths)
        ctx.scale = scale
        found: Tensor = torch.ops.multimodal_patches.segments(query, key, value, lengths, scale)
        return found

    @staticmethod
    def backward(ctx: _Saved, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*torch.ops.multimodal_patches.segments_backward(grads[0], *ctx.saved_tensors, ctx.scale), None, None)


_OPERATORS = torch.library.Library("multimodal_patches", "DEF")
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor lengths, float? scale"
_OPERATORS.define(f"segments({_INPUTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_OPERATORS.define(f"segments_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(_OPERATORS, "segments", "CompositeExplicitAutograd")
def _segments(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float | None) -> Tensor:
    """Raises ValueError if the lengths do not add up: patches would attend across pictures."""
    sizes = lengths.tolist()
    if sum(sizes) != query.shape[2]:
        raise ValueError(f"segments of {sizes} patches do not describe a query of shape {tuple(query.shape)}")
    return attend_by_runs(query, key, value, sizes, scale)


@torch.library.impl(_OPERATORS, "segments_backward", "CompositeExplicitAutograd")
def _segments_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float | None
) -> tuple[Tensor, ...]:
    # The dispatcher has left automatic differentiation when it calls an operator.
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        return torch.autograd.grad(attend_by_runs(inputs[0], inputs[1], inputs[2], lengths.tolist(), scale), inputs, grad)


@torch.library.register_fake("multimodal_patches::segments", lib=_OPERATORS)
def _fake_segments(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float | None) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@torch.library.register_fake("multimodal_patches::segments_backward", lib=_OPERATORS)
def _fake_segments_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))
