"""Computing in a narrower dtype than that of the masters, for models without FSDP: each module casts its own parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.distributed.compiled_blocks import is_compiled
from trainer.distributed.compute_copies import ComputeCopies
from trainer.distributed.host_masters import HostMasters


@dataclass(frozen=True)
class Cast:
    """How modules get their parameters in the dtype of computation: cast where they are used, or from copies."""

    dtype: torch.dtype
    copies: ComputeCopies | None = None

    def __call__(self, parameter: torch.Tensor) -> torch.Tensor:
        if self.copies is not None and parameter in self.copies:
            return self.copies.used(parameter)
        return parameter.to(self.dtype)


def cast_for_compute(
    model: nn.Module,
    dtype: torch.dtype,
    *,
    copies: bool = False,
    read_by_root: Iterable[nn.Parameter] = (),
    offload_from: torch.device | None = None,
) -> None:
    """Make every module compute with its own parameters in `dtype`, for models without FSDP.

    The float32 masters stay, and names do not change. `copies`: trained parameters are cast once per update, not in each forward;
    those in `read_by_root` too, which the forward of `model` reads by itself. `offload_from`: the masters are on the host, and the
    copies on this device, even where they have the same dtype.
    """
    away = offload_from is not None
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or not p.is_floating_point():  # codes of a quantised matrix are not cast
                continue
            if p.dtype != dtype or (away and p.requires_grad):
                owners.setdefault(p, []).append((module, name))
    kept: ComputeCopies | None = ComputeCopies(model, owners, dtype) if copies and owners and not away else None
    cast = Cast(dtype, kept if offload_from is None else HostMasters(model, owners, dtype, offload_from))
    for group in _cast_together(model, {module for pairs in owners.values() for module, _ in pairs}):
        group.caller.forward = _cast_inside(group.modules, group.caller.forward, cast)
    if shared := {p: pairs for p, pairs in owners.items() if len(pairs) > 1 or away or (copies and p in {*read_by_root})}:
        model.forward = functools.partial(_cast_shared, shared, model.forward, cast)


class CastGroup(NamedTuple):
    """Modules whose own parameters are cast when `caller` is called."""

    caller: nn.Module
    modules: tuple[nn.Module, ...]


def _cast_together(model: nn.Module, own: set[nn.Module]) -> Iterator[CastGroup]:
    """Yield the modules `own` by where they are cast: each by itself, those in a compiled block before its graph.

    A cast in each layer of a compiled block would make every block another graph.
    """
    compiled = [block for block in model.modules() if is_compiled(block)]
    inside = {module for block in compiled for module in block.modules()}
    yield from (CastGroup(module, (module,)) for module in own - inside)
    for block in compiled:
        if group := tuple(module for module in block.modules() if module in own):
            yield CastGroup(block, group)


def _cast_inside(modules: tuple[nn.Module, ...], forward: Callable[..., Any], cast: Cast) -> Callable[..., Any]:
    """Wrap `forward` so that the own parameters of `modules` are cast.

    A recomputed block is cast inside `checkpoint`, because backward runs what is inside a second time.
    """
    if isinstance(forward, functools.partial) and forward.func is checkpoint:
        inner = functools.partial(_cast_forward, modules, forward.args[0], cast)
        return functools.partial(checkpoint, inner, **forward.keywords)
    return functools.partial(_cast_forward, modules, forward, cast)


def _cast_shared(
    shared: dict[nn.Parameter, list[tuple[nn.Module, str]]],
    forward: Callable[..., Any],
    cast: Cast,
    *args: object,
    **kwargs: object,
) -> Any:
    """Run `forward` with every tied matrix cast once for all modules that use it.

    Its gradients then add up in the dtype of computation, as they do under FSDP2.
    """
    try:
        for p, pairs in shared.items():
            found = cast(p)
            for module, name in pairs:
                set_tensor(module, name, found)
        return forward(*args, **kwargs)
    finally:
        for p, pairs in shared.items():
            for module, name in pairs:
                module._parameters[name] = p


def set_tensor(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Let `module` compute with `value` in place of its parameter `name`: a plain tensor, with the parameter in its graph."""
    parameters: dict[str, torch.Tensor | None] = vars(module)["_parameters"]
    parameters[name] = value


def _cast_forward(modules: tuple[nn.Module, ...], forward: Callable[..., Any], cast: Cast, *args: object, **kwargs: object) -> Any:
    masters = [(module, dict(module._parameters)) for module in modules]
    if isinstance(modules[0], nn.Linear | nn.Conv1d | nn.Conv2d):
        # Callers may have prepared the input in the dtype of the masters, as CLIP's embeddings do.
        args = tuple(a.to(cast.dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
    try:
        for module, owned in masters:
            for name, p in owned.items():
                if p is not None and p.is_floating_point():
                    set_tensor(module, name, cast(p))
        return forward(*args, **kwargs)
    finally:
        for module, owned in masters:
            module._parameters.update(owned)
