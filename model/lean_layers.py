"""Norms, gated products, an activation and rotation by position, each as one autograd function in place of transformers' chain.

Forward does the same operations in the same order: its result is the same to the bit. Backward is one formula, and computes again
what lies between input and output: of a norm its input is kept and a number per row, of a gated product its two factors. A compiler
is given the chain itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from types import CellType, FunctionType, SimpleNamespace
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTARY = "apply_rotary_pos_emb"
SLOPE = 1.702  # of quick GELU


class GradContext(Protocol):
    """Interface of autograd's context: tensors that are saved, and inputs that need gradients."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class NormLayer(Protocol):
    """Interface of a norm: its weight and its epsilon."""

    weight: Tensor
    variance_epsilon: float


class GatedLayers(Protocol):
    """Interface of a gated block: its three projections."""

    gate_proj: Callable[[Tensor], Tensor]
    up_proj: Callable[[Tensor], Tensor]
    down_proj: Callable[[Tensor], Tensor]


class _RmsNorm(torch.autograd.Function):
    """x (..., D) float32, weight (D,) float32 -> weight * x / sqrt(mean(x^2) + eps) (..., D)."""

    @staticmethod
    def forward(ctx: GradContext, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares = x * x
        scale = squares.mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale, out=squares).mul_(weight)

    @staticmethod
    def backward(ctx: GradContext, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        part = grad * unit
        of_weight = part.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        mean = part.mul_(weight).mean(-1, keepdim=True)
        of_x = torch.mul(grad, weight, out=part).addcmul_(unit, mean, value=-1).mul_(scale)
        return of_x, of_weight, None


class _Gated(torch.autograd.Function):
    """gate and up (..., D) -> silu(gate) * up (..., D)."""

    @staticmethod
    def forward(ctx: GradContext, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: GradContext, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_up = F.silu(gate).mul_(grad)
        of_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return of_gate, of_up


class _QuickGelu(torch.autograd.Function):
    """x -> x * sigmoid(1.702 x), whose derivative is that of silu at 1.702 x."""

    @staticmethod
    def forward(ctx: GradContext, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (SLOPE * x).sigmoid_().mul_(x)

    @staticmethod
    def backward(ctx: GradContext, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        steep = SLOPE * x
        torch.ops.aten.silu_backward.grad_input(grad, steep, grad_input=steep)
        return steep


class _Rotated(torch.autograd.Function):
    """x (B, H, T, D), cos and sin (B, 1, T, D) -> x with its two halves rotated against each other (B, H, T, D)."""

    @staticmethod
    def forward(ctx: GradContext, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        (first, second), (sin_first, sin_second) = x.chunk(2, -1), sin.chunk(2, -1)
        found = x * cos
        left, right = found.chunk(2, -1)
        left.sub_(second * sin_first)
        right.add_(first * sin_second)
        return found

    @staticmethod
    def backward(ctx: GradContext, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        (first, second), (sin_first, sin_second) = grad.chunk(2, -1), sin.chunk(2, -1)
        found = grad * cos
        left, right = found.chunk(2, -1)
        left.add_(second * sin_second)
        right.sub_(first * sin_first)
        return found, None, None


def normed(module: NormLayer, hidden_states: Tensor) -> Tensor:
    """Compute the RMS norm of hidden_states (..., D) with the weight and the epsilon of `module`."""
    weight, eps = module.weight, module.variance_epsilon
    # In few bits a CPU needs memory for the function that the plan of memory does not count: there it is the chain as well.
    if torch.compiler.is_compiling() or not hidden_states.dtype == weight.dtype == torch.float32:
        wide = hidden_states.to(torch.float32)
        unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * unit.to(hidden_states.dtype)
    found: Tensor = _RmsNorm.apply(hidden_states, weight, eps)
    return found


def gated(module: GatedLayers, x: Tensor) -> Tensor:
    """Compute down(silu(gate(x)) * up(x)) with the projections of `module`."""
    gate, up = module.gate_proj(x), module.up_proj(x)
    product: Tensor = F.silu(gate) * up if torch.compiler.is_compiling() else _Gated.apply(gate, up)
    return module.down_proj(product)


def quick_gelu(module: object, input: Tensor) -> Tensor:
    """Compute input * sigmoid(1.702 * input)."""
    if torch.compiler.is_compiling():
        return input * torch.sigmoid(SLOPE * input)
    found: Tensor = _QuickGelu.apply(input)
    return found


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotate q and k (B, H, T, D) by their positions; cos and sin (B, T, D) are without a graph."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotated.apply(q, cos, sin), _Rotated.apply(k, cos, sin)


def make_lean(model: nn.Module) -> None:
    """Replace the forward of every layer of `model` that computes one of these functions. Names of classes and parameters stay.

    A layer is taken if its class computes, on a probe, the same to the bit.
    """
    made: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}
    for module in model.modules():
        kind, takes_silu = type(module), type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
        if (kind, takes_silu) not in made:
            forward = _forward_for(kind, takes_silu)
            made[kind, takes_silu] = kind if forward is None else with_forward(kind, forward)
        module.__class__ = made[kind, takes_silu]


def _forward_for(kind: type[nn.Module], takes_silu: bool) -> Callable[..., object] | None:
    """Return the forward that takes the place of that of a class of transformers, or None."""
    plain = kind.forward
    if not isinstance(plain, FunctionType) or not plain.__module__.startswith("transformers."):
        return None
    if ROTARY in _innermost(plain).__code__.co_names:
        return _with_rotation(plain)
    if len(inspect.signature(plain).parameters) != 2:
        return None
    if kind.__name__ == "QuickGELUActivation":
        return quick_gelu if _agree(plain, quick_gelu, SimpleNamespace()) else None
    if kind.__name__.endswith("RMSNorm"):
        return normed if _agree(plain, normed, SimpleNamespace(weight=probe_numbers(8) + 1, variance_epsilon=1e-5)) else None
    layers = SimpleNamespace(act_fn=F.silu, gate_proj=lambda x: x * 3, up_proj=lambda x: x + 1, down_proj=lambda x: x * 5)
    return gated if takes_silu and kind.__name__.endswith("MLP") and _agree(plain, gated, layers) else None


def _with_rotation(forward: FunctionType) -> Callable[..., object] | None:
    """Return the forward of an attention with our rotation, where its own computes the same."""
    own = _innermost(forward).__globals__.get(ROTARY)
    q, k, angles = probe_numbers(2, 4, 3, 8), probe_numbers(2, 2, 3, 8), probe_numbers(2, 3, 8)
    if not isinstance(own, FunctionType) or list(inspect.signature(own).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return None
    with suppress(RuntimeError):  # one that rotates a part of a head takes angles of fewer numbers
        own(q, k, angles[..., :4].cos(), angles[..., :4].sin())
        return None
    for dtype in (torch.float32, torch.bfloat16):
        one, other, cos, sin = (t.to(dtype) for t in (q, k, angles.cos(), angles.sin()))
        if not all(map(torch.equal, own(one, other, cos, sin), rotated(one, other, cos, sin))):
            return None
    return _with_name(forward, ROTARY, rotated)


def _innermost(function: FunctionType) -> FunctionType:
    """Return the function that decorators of `function` were put around, as transformers 5.24's of renamed arguments."""
    return cast(FunctionType, inspect.unwrap(function))


def _with_name(function: FunctionType, name: str, value: object) -> FunctionType:
    """Copy a function so that `name` is `value` in it. Its decorators, if it has any, are put around the copy."""
    names, cells, inner = function.__globals__, function.__closure__, getattr(function, "__wrapped__", None)
    if inner is None:
        names = {**names, name: value}
    else:
        copied = _with_name(inner, name, value)
        cells = tuple(CellType(copied) if cell.cell_contents is inner else cell for cell in cells or ())
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    if inner is not None:
        made.__wrapped__ = copied  # type: ignore[attr-defined]
    return made


def _agree(plain: FunctionType, ours: Callable[..., object], module: SimpleNamespace) -> bool:
    """Tell whether two forwards compute the same of a stand-in for a module."""
    for dtype in (torch.float32, torch.bfloat16):
        x = probe_numbers(2, 3, 8).to(dtype)
        if hasattr(module, "weight"):
            module.weight = module.weight.to(dtype)
        try:
            found = plain(module, x)
        except (AttributeError, TypeError):  # it reads more of its module than these functions do
            return False
        expected = ours(module, x)
        if not (isinstance(found, Tensor) and isinstance(expected, Tensor) and torch.equal(found, expected)):
            return False
    return True


def probe_numbers(*shape: int) -> Tensor:
    """Return numbers of no pattern in (-3, 3), without drawing any."""
    size = torch.Size(shape).numel()
    return (torch.arange(size, dtype=torch.float64) * 2.3999632).sin().mul(3).float().view(shape)


def with_forward(kind: type[nn.Module], forward: Callable[..., object]) -> type[nn.Module]:
    """Make a class of modules that is `kind` but for its forward, under the same name."""
    names = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), names)
