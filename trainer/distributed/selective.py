"""Selective recomputation: the results of products and of attention pass from the forward of a block to its backward, the rest is
computed again.

Not all products pass: not one that is only added to what the block returns, which no backward reads; nor those that cost least per
byte, as many as `FLOPS_AGAIN` allows. Of a decoder these are the product behind attention, whose sum the next norm reads, and the
queries; the inner products of its MLP hold most of the bytes and of the FLOPs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from enum import Enum, auto

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

PRODUCTS = {"mm", "addmm", "adapted", "_grouped_mm"}
"""Products of weights."""
KEPT_OPERATORS = PRODUCTS | {
    *("_varlen_attn", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
    *("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu"),
}
"""Operators whose results are kept: products of weights, and attention in one kernel."""
ADDS = {"add", "view", "_unsafe_view", "reshape", "t", "transpose", "detach", "alias", "_to_copy"}
"""Operators whose backward reads none of their inputs."""
FLOPS_AGAIN = 0.05
"""Share of the FLOPs of products, forward and backward, that backward may compute again to keep less."""
WORTH = 0.02
"""Share of a block's kept bytes below which a result is not worth computing again."""


class State(Enum):
    """Use of a result of forward in backward."""

    KEPT = auto()
    AGAIN = auto()  # backward computes it again
    UNREAD = auto()  # backward needs neither it nor its product
    TAKEN = auto()  # backward has had it


class Result:
    """One result of an operator of `KEPT_OPERATORS` in forward, and its use in backward."""

    def __init__(self, operator: torch._ops.OpOverload, args: tuple[object, ...], found: object) -> None:
        self.operator, self.state = operator, State.KEPT
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):  # the same count of writes
            self.values: object = tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, found)
        tensors = [value for value in tree_leaves(self.values) if isinstance(value, Tensor)]
        self.versions = [tensor._version for tensor in tensors]
        self.num_bytes = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        self.shape, self.dtype = tensors[0].shape, tensors[0].dtype
        self.flops, self.key = 0, -1
        if operator.overloadpacket.__name__ in PRODUCTS:
            self.flops, self.key = 2 * tensors[0].numel() * inner_width(operator, args), storage_key(tensors[0])

    def drop(self, state: State) -> None:
        """Let go of the values, which backward does not read, or computes again."""
        self.state, self.values = state, None

    def take(self) -> object:
        """Return the values, once. Raises RuntimeError where somebody wrote to them, or for a second backward."""
        if self.state == State.TAKEN:
            raise RuntimeError(f"backward runs a second time through a selectively recomputed block: {self.operator} is gone")
        found, self.values, self.state = self.values, None, State.TAKEN
        if [value._version for value in tree_leaves(found) if isinstance(value, Tensor)] != self.versions:
            raise RuntimeError(f"the result of {self.operator}, which is kept for backward, was mutated after it: write to a copy")
        return found


def inner_width(operator: torch._ops.OpOverload, args: tuple[object, ...]) -> int:
    """Return how many products are summed for each number that a product returns."""
    name = operator.overloadpacket.__name__
    read = [arg for arg in args if isinstance(arg, Tensor)]
    if name == "adapted":  # of the weight, and of the adapter: x (N, in), weight, ..., low (N, r), lora_b
        return int(read[0].shape[-1] + read[-2].shape[-1])
    return int(read[1 if name == "addmm" else 0].shape[-1])


def storage_key(tensor: Tensor) -> int:
    """Return the address that identifies the storage of a tensor as long as it lives."""
    return int(tensor.untyped_storage()._cdata)


class Allowance:
    """FLOPs that may be computed again: every block adds its share and spends what it can, the next one has the rest."""

    def __init__(self) -> None:
        self.left = 0.0

    def spend(self, results: list[Result]) -> None:
        """Drop results of one block that backward is to compute again: first those that cost the fewest FLOPs per byte."""
        self.left += FLOPS_AGAIN * 2 * sum(result.flops for result in results)  # backward costs as much as forward, or more
        kept = [result for result in results if result.state == State.KEPT]
        least = WORTH * sum(result.num_bytes for result in kept)
        for result in sorted(kept, key=lambda result: (result.flops / max(1, result.num_bytes), -result.num_bytes)):
            if 0 < result.flops <= self.left and result.num_bytes >= least:
                self.left -= result.flops
                result.drop(State.AGAIN)


class Recording(TorchDispatchMode):
    """Keeps results during the forward of one block, and drops at its end what is not worth it."""

    def __init__(self, results: list[Result], allowance: Allowance) -> None:
        super().__init__()
        self.results, self.allowance = results, allowance
        self._read: set[int] = set()  # storages that backward reads, or that something before it reads
        self._added: set[int] = set()  # storages that only sums have read, since the last operator that is none

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self._added.update(storage_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if name not in ADDS:
            self._read |= self._added
            self._added.clear()
        if name in KEPT_OPERATORS:
            self.results.append(Result(func, args, found))
            self._read.discard(self.results[-1].key)  # of a freed tensor, at whose address this one now is
        return found

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        super().__exit__(kind, error, trace)
        if kind is None:
            for result in self.results:
                if result.flops and result.key not in self._read:
                    result.drop(State.UNREAD)
            self.allowance.spend(self.results)


class Replaying(TorchDispatchMode):
    """Takes the kept results of a forward in place of computing them, while backward runs that forward again."""

    def __init__(self, results: list[Result]) -> None:
        super().__init__()
        self.results, self._next = results, 0

    def __enter__(self) -> Replaying:
        self._next = 0
        super().__enter__()
        return self

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        name = func.overloadpacket.__name__
        if name not in KEPT_OPERATORS:
            return func(*args, **(kwargs or {}))
        result = self.results[self._next] if self._next < len(self.results) else None
        self._next += 1
        if result is None or result.operator is not func:
            known = "no further product" if result is None else str(result.operator)
            raise RuntimeError(f"recomputation ran {func} where forward ran {known}: the block depends on what has changed")
        if result.state == State.AGAIN:
            return func(*args, **(kwargs or {}))
        if result.state == State.UNREAD:  # no memory; if backward did read it, the gradient would be no number
            assert isinstance(args[0], Tensor)
            return args[0].new_full((), math.nan, dtype=result.dtype).expand(result.shape)
        return result.take()


def contexts(allowance: Allowance, begins: bool) -> tuple[Recording, Replaying]:
    """Return the contexts of one forward of a block and of its recomputation. `begins`: it is the first block of its part."""
    if begins:
        allowance.left = 0.0
    results: list[Result] = []
    return Recording(results, allowance), Replaying(results)


def recompute_selectively(blocks: Iterable[nn.Module]) -> None:
    """Make backward recompute blocks, which are called in this order, all but their products and attention."""
    allowance = Allowance()
    for index, block in enumerate(blocks):
        made = functools.partial(contexts, allowance, index == 0)
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, context_fn=made)
