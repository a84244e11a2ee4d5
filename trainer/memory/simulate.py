"""Simulation of the bytes that a forward and backward hold at one time, without computing.

The real model's code runs on meta tensors, and every storage that an operation allocates is counted until it is freed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Live:
    """Peak bytes of one micro-batch, without parameters, buffers and the batch itself."""

    activations: int  # peak, without gradients of parameters
    with_gradients: int  # peak, with gradients of parameters that appear during backward and stay


def live_bytes(model: nn.Module, forward: Callable[[], Tensor], known: Iterable[Tensor]) -> Live:
    """Measure what `forward()` (-> the loss) and its backward hold on meta. `known` tensors, which exist before, are not counted.

    Attention counts as its fused kernels: what they save is linear in the length. The gradients of parameters are dropped.
    """
    counter = LiveCounter([*model.parameters(), *model.buffers(), *known])
    hooks = [p.register_post_accumulate_grad_hook(counter.take_gradient) for p in model.parameters() if p.requires_grad]
    try:
        with shape_stand_ins(), counter:
            loss = forward()
            if loss.requires_grad:
                loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return Live(counter.peak, counter.peak_with_gradients)


class LiveCounter(TorchDispatchMode):
    """Counts live storages. A gradient is no longer counted as an activation once it is assigned to its parameter."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._seen = {_key(tensor) for tensor in known}
        self._known = known  # kept alive, so that no new storage reuses one of their addresses
        self.live = self._gradients = 0
        self.peak = self.peak_with_gradients = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let blocks be compiled inside the mode; it sees what their graphs run."""
        return True

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._allocated(leaf)
        self.peak = max(self.peak, self.live)
        self.peak_with_gradients = max(self.peak_with_gradients, self.live + self._gradients)
        return found

    def _allocated(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, if it is new, until it is freed."""
        key = _key(tensor)
        if key in self._seen:
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._seen.add(key)
        self.live += size
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def take_gradient(self, parameter: Tensor) -> None:
        """Count the complete gradient of `parameter` apart from the activations, and drop it."""
        if parameter.grad is not None:
            self._gradients += parameter.grad.untyped_storage().nbytes()
        parameter.grad = None


def _key(tensor: Tensor) -> int:
    """Return the address that identifies the storage of a tensor."""
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def shape_stand_ins() -> Iterator[None]:
    """Replace operations that do not run on meta, or wastefully, by stand-ins that save what their kernels save."""

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: object, **__: object) -> Any:
        added = attn_mask if attn_mask is not None and attn_mask.is_floating_point() else None  # made once for several layers
        return _Attention.apply(query, key, value, added)

    def grouped(rows: Tensor, weights: Tensor, *_: object, **__: object) -> Any:
        return _Grouped.apply(rows, weights)

    # The functions are patched by name: a mode would not be active in backward, where blocks are recomputed.
    tensors_to_save = [(F, "scaled_dot_product_attention", attention), (F, "grouped_mm", grouped), (torch, "_grouped_mm", grouped)]
    originals = [(module, name, getattr(module, name)) for module, name, _ in tensors_to_save if hasattr(module, name)]
    for module, name, stand_in in tensors_to_save:
        if hasattr(module, name):
            setattr(module, name, stand_in)
    try:
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


# Operators under the names of the kernels, by which selective recomputation knows what it keeps.
_OPERATORS = torch.library.Library("simulated", "DEF")
_OPERATORS.define("_grouped_mm(Tensor rows, Tensor weights) -> Tensor")
_OPERATORS.define("_scaled_dot_product_flash_attention(Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor)")
# Operators, too: a compiler would see that shapes are all they read, and keep nothing for them.
_OPERATORS.define("grouped_backward(Tensor grad, Tensor[] inputs, bool[] needed) -> Tensor[]")
_OPERATORS.define("attention_backward(Tensor grad, Tensor[] inputs, Tensor found, Tensor sums) -> (Tensor, Tensor, Tensor)")


@torch.library.impl(_OPERATORS, "_grouped_mm", "CompositeExplicitAutograd")
def _shaped_product(rows: Tensor, weights: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[-1])


@torch.library.impl(_OPERATORS, "_scaled_dot_product_flash_attention", "CompositeExplicitAutograd")
def _shaped_attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    # The kernels write (..., T, H, D) and return a transposed view, which the caller need not copy.
    shape = (*query.shape[:-3], query.shape[-2], query.shape[-3], value.shape[-1])
    return query.new_empty(shape).transpose(-2, -3), query.new_empty(query.shape[:-1], dtype=torch.float32)


@torch.library.impl(_OPERATORS, "grouped_backward", "CompositeExplicitAutograd")
def _shaped_product_backward(grad: Tensor, inputs: list[Tensor], needed: list[bool]) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor, is_needed in zip(inputs, needed) if is_needed]


@torch.library.impl(_OPERATORS, "attention_backward", "CompositeExplicitAutograd")
def _shaped_attention_backward(grad: Tensor, inputs: list[Tensor], found: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = inputs
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


class _Grouped(torch.autograd.Function):
    """Grouped matrix product: rows (S, in), each times the weights (E, in, out) of its group -> (S, out). Shapes only."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        product: Tensor = torch.ops.simulated._grouped_mm(rows, weights)
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rows, weights = ctx.saved_tensors
        of_rows, of_weights = ctx.needs_input_grad
        found = torch.ops.simulated.grouped_backward(grads[0], [rows, weights], [of_rows, of_weights])
        return found[0] if of_rows else None, found[-1] if of_weights else None


class _Attention(torch.autograd.Function):
    """Attention: query (..., H, T, D), key and value (..., Hkv, S, D) -> (..., H, T, Dv). Shapes only."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, added: Tensor | None) -> Tensor:
        found: Tensor
        found, sums = torch.ops.simulated._scaled_dot_product_flash_attention(query, key, value)
        ctx.save_for_backward(query, key, value, found, sums, added)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, found, sums, _ = ctx.saved_tensors
        return (*torch.ops.simulated.attention_backward(grads[0], [query, key, value], found, sums), None)
