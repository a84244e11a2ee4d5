"""First values of new parameters: seeded by name, so that they are the same on every rank, sharded or not."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from model.files import Rows, Tensors
from model.llm import Vocabulary


def seed_of(*words: object) -> int:
    """A 63-bit seed that depends on every word."""
    text = "\0".join(map(str, words)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def initial_tensors(part: str, module: nn.Module, seed: int) -> Tensors:
    """Values for the linear layers of a new part, as `nn.Linear` draws them (uniform, bound 1 / sqrt(in))."""
    found: Tensors = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            for kind, parameter in layer.named_parameters(recurse=False):
                full = ".".join(filter(None, (part, name, kind)))
                found[full] = uniform(full, tuple(parameter.shape), 1 / math.sqrt(layer.in_features), seed)
    return found


def initial_adapter(path: str, lora_a: Tensor, lora_b: Tensor, seed: int) -> Tensors:
    """A as PEFT draws it (kaiming uniform, a = sqrt 5), B zero: the adapted layer starts equal to the base."""
    shape_a, shape_b = tuple(lora_a.shape), tuple(lora_b.shape)
    name = f"{path}.lora_A"
    return {
        name: uniform(name, shape_a, 1 / math.sqrt(shape_a[1]), seed),
        f"{path}.lora_B": Rows(shape_b, lambda a, b: torch.zeros(b - a, *shape_b[1:])),
    }


def uniform(name: str, shape: tuple[int, ...], bound: float, seed: int) -> Rows:
    def read(start: int, stop: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(seed, name))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)[start:stop]

    return Rows(shape, read)


def grown(base: Rows, num_rows: int, vocabulary: Vocabulary, new_ids: tuple[int, ...]) -> Rows:
    """A vocabulary matrix (rows, D) with `num_rows` rows: those of `new_ids` and those the base has not are the mean of
    the rows of known tokens. No row of a token that the base model knows is touched.
    """
    known = min(vocabulary.num_known or base.shape[0], base.shape[0])
    cached: list[Tensor] = []

    def mean() -> Tensor:
        if not cached:
            total = torch.zeros(base.shape[1], dtype=torch.float64)
            for start in range(0, known, 8192):  # in pieces: the matrix may be larger than what a rank should hold
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

    return Rows((num_rows, *base.shape[1:]), read)
