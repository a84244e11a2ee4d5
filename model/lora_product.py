"""The product of a linear layer with a low-rank adapter, as one autograd function for each layer and one for each input.

Layers that read the same input share one dropout mask, and sum their gradients with respect to that input in place, in the matrix
products themselves. The mask is not kept for backward: the state of the random generator before the draw is, and the mask is drawn
again from it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class InputGradient:
    """Gradients with respect to one input (N, in) and to its dropped-out copy, each summed over the layers during one backward."""

    def __init__(self) -> None:
        self._backward = -1
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, grad: Tensor, matrix: Tensor) -> None:
        """Add grad (N, out) @ matrix (out, in) to the sum `name`. Sums that another backward left unread are dropped."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward, self._sums = backward, {}
        if name in self._sums:
            self._sums[name].addmm_(grad, matrix)
        else:
            self._sums[name] = grad @ matrix

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the sums of this backward for the input and for its dropped-out copy, and forget them."""
        sums, self._sums = self._sums, {}
        if torch._C._current_graph_task_id() != self._backward:
            return None, None
        return sums.get("input"), sums.get("dropped")


@dataclass(frozen=True)
class ReadInput:
    """An input as its readers share it: after dropout, not yet scaled by 1 / (1 - rate), and the sum of their gradients."""

    dropped: Tensor
    rate: float
    gradient: InputGradient


class SharedInputs:
    """The last input that the adapted layers of one module have read: all that read the same tensor get the same mask.

    It is held only as long as that tensor lives.
    """

    def __init__(self) -> None:
        self._tensor: weakref.ref[Tensor] | None = None
        self._key: tuple[float, int, bool] | None = None
        self._read: ReadInput | None = None
        self._readers: set[int] = set()
        self._traced: tuple[Tensor, float, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInputs:
        return SharedInputs()

    def read(self, x: Tensor, rate: float, reader: object) -> ReadInput:
        """Return `x` (..., in) after dropout with probability `rate`. The first reader draws the mask, from the default generator.

        A reader that reads the same tensor again gets another mask.
        """
        key = (rate, 0 if x.is_inference() else x._version, torch.is_grad_enabled())
        known = self._tensor is not None and self._tensor() is x and self._key == key and id(reader) not in self._readers
        if self._read is None or not known:
            gradient = InputGradient()
            dropped: Tensor = _Dropped.apply(x, rate, gradient) if rate or x.requires_grad else x
            self._tensor, self._key, self._readers = weakref.ref(x, self._forget), key, set()
            self._read = ReadInput(dropped, rate, gradient)
        self._readers.add(id(reader))
        return self._read

    def _forget(self, tensor: weakref.ref[Tensor]) -> None:
        if tensor is self._tensor:
            self._read = None

    def traced(self, x: Tensor, rate: float) -> Tensor:
        """Return `x` (..., in) after dropout, not yet scaled, as `read` does: in a form that a compiler can trace.

        Whoever traces ends with `end_trace`, so that nothing of one forward is there when the next one begins.
        """
        if not rate:
            return x
        if self._traced is None or self._traced[0] is not x or self._traced[1] != rate:
            state = torch.ops.multimodal_lora.draw_state(x, rate)
            self._traced = (x, rate, torch.where(torch.ops.multimodal_lora.mask_of(x, rate, state), x, x.new_zeros(())))
        return self._traced[2]

    def end_trace(self) -> None:
        """Forget what `traced` has read."""
        self._traced = None


@dataclass(frozen=True)
class Matrix:
    """A matrix (out, in) in its stored form: `tensors`, of which `dense(*tensors, dtype)` makes the matrix."""

    tensors: tuple[Tensor | None, ...]
    dense: Callable[..., Tensor]


@dataclass(frozen=True)
class LoraPair:
    """An adapter scale * lora_b @ lora_a of a layer: lora_a (r, in), lora_b (out, r)."""

    lora_a: Tensor
    lora_b: Tensor
    scale: float


def adapted_product(x: Tensor, read: ReadInput, matrix: Matrix, bias: Tensor | None, adapter: LoraPair) -> Tensor:
    """Compute W x + b + scale * B A dropout(x) for x (..., in), whose shared form is `read`: (..., out)."""
    scale = adapter.scale / (1 - read.rate)  # the dropped-out input is not scaled: one rounding and one pass less
    how = (scale, read.rate, read.gradient, matrix.dense)  # not `read`: backward is not to hold more than what it saves
    found: Tensor = _Adapted.apply(read.dropped, x.detach(), bias, adapter.lora_a, adapter.lora_b, how, *matrix.tensors)
    return found


class _Dropped(torch.autograd.Function):
    """Dropout without scaling: x (..., in) -> x * mask. Backward returns what the layers that read it have summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: float, gradient: InputGradient) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradient, ctx.rate, ctx.shape, ctx.state = gradient, rate, x.shape, None
        if not rate:
            return x.detach()
        ctx.state = random_state(x.device)
        return torch.where(keep_mask(x.shape, rate, x.device), x, 0)  # a product would widen the mask on the CPU

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found, of_dropped = ctx.gradient.take()
        if of_dropped is not None:
            found.addcmul_(of_dropped, keep_mask(found.shape, ctx.rate, found.device, ctx.state))
        return None if found is None else found.view(ctx.shape), None, None


class _Adapted(torch.autograd.Function):
    """The product of one layer. It returns no gradient for its input, but adds it to what `_Dropped` returns."""

    @staticmethod
    def forward(ctx: Any, dropped: Tensor, x: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        lora_a, lora_b, (ctx.scale, ctx.rate, ctx.gradient, ctx.dense), *stored = rest
        low = F.linear(_rows(dropped), lora_a)
        out = torch.ops.multimodal_lora.adapted(_rows(x), ctx.dense(*stored, x.dtype), bias, low, lora_b, ctx.scale)
        trained = x if stored[0].requires_grad else None
        ctx.save_for_backward(dropped, low, lora_a, lora_b, trained, *stored)
        return out.view(*x.shape[:-1], len(lora_b)).detach()  # not a view to autograd: callers may write to it

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dropped, low, lora_a, lora_b, x, *stored = ctx.saved_tensors
        of_input, _, of_bias, of_a, of_b, *_ = ctx.needs_input_grad
        grad = _rows(grads[0])
        grad_low = _scaled_product(grad, lora_b, ctx.scale)
        if of_input:
            ctx.gradient.add("input", grad, ctx.dense(*stored, grad.dtype))
            ctx.gradient.add("dropped" if ctx.rate else "input", grad_low, lora_a)
        return (
            None,
            None,
            grad.sum(0) if of_bias else None,
            grad_low.t() @ _rows(dropped) if of_a else None,
            _scaled_product(grad.t(), low, ctx.scale) if of_b else None,
            None,
            None if x is None else grad.t() @ _rows(x),
            *(None,) * (len(stored) - 1),
        )


_OPERATORS = torch.library.Library("multimodal_lora", "DEF")
_OPERATORS.define(
    "draw_state(Tensor x, float rate) -> Tensor", tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag)
)
_OPERATORS.define("mask_of(Tensor x, float rate, Tensor state) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_OPERATORS.define("adapted(Tensor x, Tensor weight, Tensor? bias, Tensor low, Tensor lora_b, float scale) -> Tensor")


@torch.library.impl(_OPERATORS, "adapted", "CompositeExplicitAutograd")
def _adapted(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Compute W x + b + scale * B low, of x (N, in) and low (N, r), in one result.

    An operator of its own, because selective recomputation keeps results of operators, and must not keep one that the next one
    writes to.
    """
    return F.linear(x, weight, bias).addmm_(low, lora_b.t(), alpha=scale)


@torch.library.impl(_OPERATORS, "draw_state", "CompositeExplicitAutograd")
def _draw_state(x: Tensor, rate: float) -> Tensor:
    """Return the state of the generator, and draw a mask for `x` (..., in) from it as the eager layer does."""
    state = random_state(x.device)
    if state is None:
        return _fake_state(x, rate)
    keep_mask(x.shape, rate, x.device)  # the generator moves on by as much
    return state


@torch.library.impl(_OPERATORS, "mask_of", "CompositeExplicitAutograd")
def _mask_of(x: Tensor, rate: float, state: Tensor) -> Tensor:
    if x.device.type == "meta":
        return _fake_mask(x, rate, state)
    return keep_mask(x.shape, rate, x.device, state)


@torch.library.register_fake("multimodal_lora::draw_state", lib=_OPERATORS)
def _fake_state(x: Tensor, rate: float) -> Tensor:
    return torch.empty(16 if x.device.type == "cuda" else 5056, dtype=torch.uint8, device="cpu")


@torch.library.register_fake("multimodal_lora::mask_of", lib=_OPERATORS)
def _fake_mask(x: Tensor, rate: float, state: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bool, device=x.device)


def _rows(x: Tensor) -> Tensor:
    """View x (..., n) as rows (N, n)."""
    return x.reshape(-1, x.shape[-1])


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute scale * a @ b in one operation."""
    return torch.addmm(a.new_empty(1, 1), a, b, beta=0, alpha=scale)


def random_state(device: torch.device) -> Tensor | None:
    """Return the state of the device's default generator, without a host sync; None on meta, where nothing is drawn."""
    return None if device.type == "meta" else default_generator(device).get_state()


def default_generator(device: torch.device) -> torch.Generator:
    """Return the generator that dropout on `device`, a CPU or a GPU, draws from."""
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


def keep_mask(shape: torch.Size, rate: float, device: torch.device, state: Tensor | None = None) -> Tensor:
    """Draw which elements dropout with probability `rate` keeps, bool. With `state`, repeat the draw that was made from it."""
    generator = None
    if state is not None:
        generator = torch.Generator(device)
        generator.set_state(state)
    return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - rate, generator=generator)
