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

from model.llm.cpu_kernel import attend_backward, attend_with_sums, sums_dtype, takes_cpu_kernel


def attend_by_runs(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float | None, dropout: float = 0.0
) -> Tensor:
    """Compute attention inside each segment, in both directions: query, key and value (1, H, P, D) -> (1, P, H, D).

    One call computes a run of segments of equal length.
    """
    parts = []
    for q, k, v in zip(*(_runs(tensor, lengths) for tensor in (query, key, value)), strict=True):
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        parts.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None]


def _runs(tensor: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Cut a tensor (1, H, P, ...) into one of (segments, H, length, ...) for each run of segments of equal length."""
    runs = [(len(list(run)), length) for length, run in groupby(lengths)]
    # Split, not sliced: the gradient of a slice is as large as the whole, with zeros around.
    pieces = tensor[0].split([count * length for count, length in runs], dim=1)
    return [piece.unflatten(1, run).transpose(0, 1) for piece, run in zip(pieces, runs, strict=True)]


def _joined(runs: Sequence[Tensor]) -> Tensor:
    """Put together what `_runs` cut."""
    return torch.cat([run.transpose(0, 1).flatten(1, 2) for run in runs], 1)[None]


def attend_in_graph(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float | None) -> Tensor:
    """Compute `attend_by_runs` where a compiler traces it.

    Backward computes the attention again where no kernel returns what it needs.
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
        found: Tensor
        found, sums = torch.ops.multimodal_patches.segments(query, key, value, lengths, scale)
        ctx.save_for_backward(query, key, value, lengths, found, sums)
        ctx.scale = scale
        return found

    @staticmethod
    def backward(ctx: _Saved, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*torch.ops.multimodal_patches.segments_backward(grads[0], *ctx.saved_tensors, ctx.scale), None, None)


_OPERATORS = torch.library.Library("multimodal_patches", "DEF")
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor lengths, float? scale"
_OF_BACKWARD = _INPUTS.replace("lengths,", "lengths, Tensor found, Tensor sums,")
_OPERATORS.define(f"segments({_INPUTS}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_OPERATORS.define(
    f"segments_backward(Tensor grad, {_OF_BACKWARD}) -> (Tensor, Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,)
)


@torch.library.impl(_OPERATORS, "segments", "CompositeExplicitAutograd")
def _segments(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Raises ValueError if the lengths do not add up: patches would attend across pictures."""
    sizes = lengths.tolist()
    if sum(sizes) != query.shape[2]:
        raise ValueError(f"segments of {sizes} patches do not describe a query of shape {tuple(query.shape)}")
    if not takes_cpu_kernel(query, value):
        return attend_by_runs(query, key, value, sizes, scale), query.new_empty(*query.shape[:2], 0, dtype=sums_dtype(query))
    runs = zip(*(_runs(tensor, sizes) for tensor in (query, key, value)), strict=True)
    found, sums = zip(*(attend_with_sums(q, k, v, False, scale) for q, k, v in runs), strict=True)
    return torch.cat([part.flatten(0, 1) for part in found])[None], _joined(sums)


@torch.library.impl(_OPERATORS, "segments_backward", "CompositeExplicitAutograd")
def _segments_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    found: Tensor,
    sums: Tensor,
    scale: float | None,
) -> tuple[Tensor, ...]:
    sizes, inputs = lengths.tolist(), (query, key, value)
    if not sums.shape[2]:
        # The dispatcher has left automatic differentiation when it calls an operator.
        with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            return torch.autograd.grad(attend_by_runs(leaves[0], leaves[1], leaves[2], sizes, scale), leaves, grad)
    results = (_runs(tensor.transpose(1, 2), sizes) for tensor in (grad, found))
    of_result, result = ([run.transpose(1, 2) for run in runs] for runs in results)  # (segments, length, H, D)
    parts = zip(of_result, zip(*(_runs(tensor, sizes) for tensor in inputs), strict=True), result, _runs(sums, sizes), strict=True)
    pieces = [attend_backward(g, (q, k, v), r, s, False, scale) for g, (q, k, v), r, s in parts]
    return tuple(_joined(of_input) for of_input in zip(*pieces, strict=True))


@torch.library.register_fake("multimodal_patches::segments", lib=_OPERATORS)
def _fake_segments(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    num_sums = query.shape[2] if takes_cpu_kernel(query, value) else 0
    found = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    return found, query.new_empty(*query.shape[:2], num_sums, dtype=sums_dtype(query))


@torch.library.register_fake("multimodal_patches::segments_backward", lib=_OPERATORS)
def _fake_segments_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))
