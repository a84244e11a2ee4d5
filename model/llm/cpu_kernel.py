"""Torch's attention kernel of a CPU with the sums that its backward needs, for operators that autograd does not see into."""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "_scaled_dot_product_flash_attention_for_cpu"


def takes_cpu_kernel(query: Tensor, value: Tensor) -> bool:
    """Tell whether the kernel computes attention without a mask of these inputs."""
    fits = query.device.type == "cpu" and query.is_floating_point() and query.shape[-1] == value.shape[-1]
    return fits and hasattr(torch.ops.aten, NAME) and hasattr(torch.ops.aten, f"{NAME}_backward")


def sums_dtype(query: Tensor) -> torch.dtype:
    """Return the type of the sums: float32, or that of a query in float64."""
    return torch.promote_types(query.dtype, torch.float32)


def attend_with_sums(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """Compute attention: query (B, H, T, D), key and value (B, Hkv, T, D) -> (B, T, H, D), and the sums (B, H, T) of each query.

    The sums are logarithms of the divisors of the softmax, from which backward makes the softmax anew.
    """
    groups = query.shape[1] // key.shape[1]
    found, sums = getattr(torch.ops.aten, NAME)(query, _repeated(key, groups), _repeated(value, groups), 0.0, causal, scale=scale)
    return found.transpose(1, 2), sums


def attend_backward(
    grad: Tensor, inputs: tuple[Tensor, Tensor, Tensor], found: Tensor, sums: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, ...]:
    """Return the gradients of the `inputs` of `attend_with_sums`, for that of its result (B, T, H, D) and the sums."""
    query, key, value = inputs
    groups = query.shape[1] // key.shape[1]
    repeated = _repeated(key, groups), _repeated(value, groups)
    backward = getattr(torch.ops.aten, f"{NAME}_backward")
    of_query, *others = backward(grad.transpose(1, 2), query, *repeated, found.transpose(1, 2), sums, 0.0, causal, scale=scale)
    return (of_query, *(other.unflatten(1, (-1, groups)).sum(2) if groups > 1 else other for other in others))


def _repeated(tensor: Tensor, groups: int) -> Tensor:
    return tensor.repeat_interleave(groups, 1) if groups > 1 else tensor
