"""Attention within segments as one operator, for compiled blocks on devices without a kernel for it.

A compiler would unroll a loop over segments, and compile again for every other number of segments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.llm.cpu_kernel import attend_backward, attend_with_sums, sums_dtype, takes_cpu_kernel
from model.llm.scores import CappedScores, band, capped

Segment = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of one segment: query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D)."""


@dataclass(frozen=True)
class SegmentOptions:
    """How the tokens of a segment attend: numbers alone, as an operator takes them."""

    scale: float
    window: int = 0  # tokens that a token sees, itself included; 0: all before it
    softcap: float = 0.0  # 0: scores are not capped


def options_of(how: tuple[float, ...]) -> SegmentOptions:
    """Return the options for scale, window and cap as the operator takes them."""
    return SegmentOptions(how[0], int(how[1]), how[2])


def _one_segment(options: SegmentOptions) -> Segment:
    """Return the attention of one segment, the same as `causal_attention` computes."""

    def with_cap(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = CappedScores(options.softcap, options.scale, 0.0)
        return capped(query, key, value, band(query, options.window or None), scores)

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups, banded = query.shape[1] // key.shape[1], 0 < options.window < query.shape[2]
        how: dict[str, Any] = {"scale": options.scale, "enable_gqa": groups > 1}
        how |= {"attn_mask": band(query, options.window)} if banded else {"is_causal": query.shape[2] > 1}
        if banded and groups > 1:  # as transformers does: kernels that take a mask take no groups
            key, value, how["enable_gqa"] = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), False
        return F.scaled_dot_product_attention(query, key, value, **how).transpose(1, 2).contiguous()

    return with_cap if options.softcap else plain


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, options: SegmentOptions) -> Tensor:
    """Compute causal attention within segments: query (1, H, T, D), key and value (1, Hkv, T, D) -> (1, T, H, D).

    `lengths` (segments,): int64 on the CPU, so that no device is waited for. Backward computes the attention again where no kernel
    returns what it needs.
    """
    found: Tensor = _Attend.apply(query, key, value, lengths, options.scale, options.window, options.softcap)
    return found


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, *how: float) -> Tensor:
        found: Tensor
        found, sums = torch.ops.multimodal_attention.packed(query, key, value, lengths, *how)
        ctx.save_for_backward(query, key, value, lengths, found, sums)
        ctx.how = how
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.multimodal_attention.packed_backward(grads[0], *ctx.saved_tensors, *ctx.how)
        return (*found, None, None, None, None)


_OPERATORS = torch.library.Library("multimodal_attention", "DEF")
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor lengths, float scale, int window, float softcap"
_OF_BACKWARD = _INPUTS.replace("lengths,", "lengths, Tensor found, Tensor sums,")
_OPERATORS.define(f"packed({_INPUTS}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_OPERATORS.define(f"packed_backward(Tensor grad, {_OF_BACKWARD}) -> (Tensor, Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))


def _num_sums(query: Tensor, value: Tensor, how: tuple[float, ...]) -> int:
    """Return how many sums per head the operator returns for its backward: one of each token, or none."""
    options = options_of(how)
    return query.shape[2] if not options.window and not options.softcap and takes_cpu_kernel(query, value) else 0


@torch.library.impl(_OPERATORS, "packed", "CompositeExplicitAutograd")
def _packed(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, *how: float) -> tuple[Tensor, Tensor]:
    """Raises ValueError if the lengths do not add up: the model would attend across samples."""
    sizes = lengths.tolist()
    if sum(sizes) != query.shape[2]:
        raise ValueError(f"segment lengths {sizes} do not describe a query of shape {tuple(query.shape)}")
    parts = zip(*(tensor.split(sizes, 2) for tensor in (query, key, value)), strict=True)
    if _num_sums(query, value, how):
        found, sums = zip(*(attend_with_sums(q, k, v, True, how[0]) for q, k, v in parts), strict=True)
        return torch.cat(found, 1), torch.cat(sums, 2)
    one = _one_segment(options_of(how))
    return torch.cat([one(q, k, v) for q, k, v in parts], 1), query.new_empty(*query.shape[:2], 0, dtype=sums_dtype(query))


@torch.library.impl(_OPERATORS, "packed_backward", "CompositeExplicitAutograd")
def _packed_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, found: Tensor, sums: Tensor, *how: float
) -> tuple[Tensor, ...]:
    sizes, one = lengths.tolist(), _one_segment(options_of(how))
    inputs = zip(*(tensor.split(sizes, 2) for tensor in (query, key, value)), strict=True)
    pieces: list[tuple[Tensor, ...]] = []
    if sums.shape[2]:
        results = (grad.split(sizes, 1), found.split(sizes, 1), sums.split(sizes, 2))
        for part, of_result, result, sums_of in zip(inputs, *results, strict=True):
            pieces.append(attend_backward(of_result, part, result, sums_of, True, how[0]))
        return tuple(torch.cat(list(of_input), 2) for of_input in zip(*pieces, strict=True))
    # The dispatcher has left automatic differentiation when it calls an operator.
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        for part, of_result in zip(inputs, grad.split(sizes, 1), strict=True):
            leaves = [tensor.detach().requires_grad_() for tensor in part]
            pieces.append(torch.autograd.grad(one(*leaves), leaves, of_result))
    return tuple(torch.cat(list(of_input), 2) for of_input in zip(*pieces, strict=True))


@torch.library.register_fake("multimodal_attention::packed", lib=_OPERATORS)
def _fake_packed(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, *how: float) -> tuple[Tensor, Tensor]:
    found = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    return found, query.new_empty(*query.shape[:2], _num_sums(query, value, how), dtype=sums_dtype(query))


@torch.library.register_fake("multimodal_attention::packed_backward", lib=_OPERATORS)
def _fake_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))
