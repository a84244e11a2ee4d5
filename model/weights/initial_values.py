"""Initial values of new parameters: seeded by name, so that they are the same on every rank, sharded or not."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.files.tensor_files import LazyTensor, Tensors
from model.llm.causal_lm import VocabularyLayout
from model.projector import spreads_of


def seed_of(*words: object) -> int:
    """Return a 63-bit seed that depends on every word."""
    text = "\0".join(map(str, words)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def initial_tensors(part: str, module: nn.Module, seed: int) -> Tensors:
    """Return initial values for every parameter of a new part: matrices, kernels and their biases as torch's own layers draw them
    (uniform, bound 1 / sqrt(fan in)), norms 1 and 0, bare parameters normal with the deviation that their module's `spreads` names.
    """
    found: Tensors = {}
    for path, layer in module.named_modules():
        for kind, parameter in layer.named_parameters(recurse=False):
            full = ".".join(filter(None, (part, path, kind)))
            found[full] = first_value(full, layer, kind, tuple(parameter.shape), seed)
    return found


def first_value(full: str, layer: nn.Module, kind: str, shape: tuple[int, ...], seed: int) -> LazyTensor:
    """Return the initial value of the parameter `kind` of `layer`. `full`: its full name. Raises `TypeError` without a rule."""
    spreads = spreads_of(layer)
    if kind in spreads:  # checked first: a subclass of a plain layer may have an additional parameter
        return normal(full, shape, spreads[kind], seed)
    if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
        return uniform(full, shape, 1 / math.sqrt(math.prod(layer.weight.shape[1:])), seed)
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return constant(shape, 1.0 if kind == "weight" else 0.0)
    raise TypeError(f"{full}: {type(layer).__name__} does not say how its {kind} starts")


def initial_adapter(path: str, lora_a: Tensor, lora_b: Tensor, seed: int) -> Tensors:
    """Return initial values of an adapter: A as PEFT draws it (kaiming uniform, a = sqrt 5), B zero.

    The adapted layer starts equal to the base.
    """
    shape_a, shape_b = tuple(lora_a.shape), tuple(lora_b.shape)
    name = f"{path}.lora_A"
    return {name: uniform(name, shape_a, 1 / math.sqrt(shape_a[1]), seed), f"{path}.lora_B": constant(shape_b, 0.0)}


def constant(shape: tuple[int, ...], value: float) -> LazyTensor:
    return LazyTensor(shape, lambda a, b: torch.full((b - a, *shape[1:]), value))


def uniform(name: str, shape: tuple[int, ...], bound: float, seed: int) -> LazyTensor:
    return _drawn(name, shape, seed, lambda whole, generator: whole.uniform_(-bound, bound, generator=generator))


def normal(name: str, shape: tuple[int, ...], deviation: float, seed: int) -> LazyTensor:
    return _drawn(name, shape, seed, lambda whole, generator: whole.normal_(0.0, deviation, generator=generator))


def _drawn(name: str, shape: tuple[int, ...], seed: int, draw: Callable[[Tensor, torch.Generator], Tensor]) -> LazyTensor:
    """Draw the whole tensor and then take rows of it, so that the values do not depend on which rows a rank reads."""

    def read(start: int, stop: int) -> Tensor:
        return draw(torch.empty(shape), torch.Generator().manual_seed(seed_of(seed, name)))[start:stop]

    return LazyTensor(shape, read)


def grow_embedding(base: LazyTensor, num_rows: int, vocabulary: VocabularyLayout, new_ids: tuple[int, ...]) -> LazyTensor:
    """Grow a vocabulary matrix (rows, D) to `num_rows` rows.

    Rows of `new_ids` and rows beyond the base are the mean of the rows of known tokens; rows of tokens that the base model knows
    stay unchanged.
    """
    known = min(vocabulary.num_known or base.shape[0], base.shape[0])
    cached: list[Tensor] = []

    def mean() -> Tensor:
        if not cached:
            total = torch.zeros(base.shape[1], dtype=torch.float64)
            for start in range(0, known, 8192):  # in pieces: the matrix may be too large to hold whole
                total += base.read(start, min(start + 8192, known)).double().sum(0)
            cached.append((total / known).float())
        return cached[0]

    def read(start: int, stop: int) -> Tensor:
        old = base.read(min(start, base.shape[0]), min(stop, base.shape[0])).float()
        rows = torch.cat([old, mean().expand(stop - start - old.shape[0], -1)])
        for token in new_ids:
            if start <= token < stop:
                rows[token - start] = mean()
        return rows

    return LazyTensor((num_rows, *base.shape[1:]), read)
