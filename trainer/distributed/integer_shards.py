"""FSDP2 of torch 2.11 makes every shard a parameter with a gradient before it takes the gradient away: codes cannot have one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def integers_without_gradient() -> Iterator[None]:
    """Make parameters of integers, inside the context, without a gradient whatever their maker asks for."""
    original = vars(nn.Parameter)["__new__"]

    def new(cls: type[nn.Parameter], data: torch.Tensor | None = None, requires_grad: bool = True) -> object:
        can_learn = data is None or data.is_floating_point() or data.is_complex()
        return original(cls, data, requires_grad and can_learn)

    nn.Parameter.__new__ = new  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Parameter.__new__ = original  # type: ignore[method-assign]
