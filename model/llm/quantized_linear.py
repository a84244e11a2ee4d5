"""Linear layers whose matrix is stored in 4 or 8 bits; they replace the linear layers of a frozen language model."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from model.config import QuantizeConfig
from model.errors import ConfigError
from model.llm import quantize
from model.llm.experts import fused_parameters
from model.llm.interface import CausalLM
from model.llm.quantize import Packed, dense, functional, layout, product
from model.lora import LoraLinear
from model.lora_product import Matrix

STORED = (".codes", ".scales")


class Quantised(nn.Linear):
    """A linear layer with `codes` and `scales` in place of its weight (out, in), laid out as `model.llm.quantize.Packed` describes.

    Both are uint8 parameters, which FSDP2 shards like any other and never casts. `nested` and `offset`, on which the scales depend,
    are float32 buffers that every rank holds whole.
    """

    nested: Tensor | None
    offset: Tensor | None

    def store(self, linear: nn.Linear, config: QuantizeConfig) -> None:
        """Set up this layer as the replacement of `linear`; `materialise` fills in the values."""
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.quantize = config
        codes, scales, num_nested = layout(self.shape, config)
        device = linear.weight.device
        self.codes = nn.Parameter(torch.empty(codes, dtype=torch.uint8, device=device), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(scales, dtype=torch.uint8, device=device), requires_grad=False)
        self.register_buffer("nested", torch.zeros(num_nested) if num_nested else None, persistent=False)
        self.register_buffer("offset", torch.zeros(()) if num_nested else None, persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape (out, in) of the matrix."""
        return self.out_features, self.in_features

    @property
    def packed(self) -> Packed:
        return Packed(self.codes, self.scales, self.nested, self.offset)

    def multiply(self, x: Tensor) -> Tensor:
        return product(x, self.bias, self.packed, self.shape, self.quantize)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in) that the layer computes with."""
        return dense(self.packed, self.shape, self.quantize, dtype)


class QuantLinear(Quantised):
    """A linear layer y = W x + b, x (..., in), that dequantises W for each product only."""

    def __init__(self, linear: nn.Linear, config: QuantizeConfig) -> None:
        nn.Module.__init__(self)
        self.store(linear, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x)


class QuantLoraLinear(Quantised, LoraLinear):
    """A layer with a LoRA adapter whose frozen weight is stored quantised: QLoRA."""

    def __init__(self, linear: LoraLinear, config: QuantizeConfig) -> None:
        nn.Module.__init__(self)
        self.store(linear, config)
        self.lora_A, self.lora_B = linear.lora_A, linear.lora_B
        self.scale, self.dropout, self.inputs = linear.scale, linear.dropout, linear.inputs

    def base(self, x: Tensor) -> Tensor:
        return self.multiply(x)

    def stored(self) -> Matrix:
        return Matrix((self.codes, self.scales, self.nested, self.offset), functools.partial(_dense, self.shape, self.quantize))


def _dense(shape: tuple[int, int], config: QuantizeConfig, *stored: Any) -> Tensor:
    """Dequantise a matrix from the tensors of its `Packed` form, and the dtype."""
    *tensors, dtype = stored
    return dense(Packed(*tensors), shape, config, dtype)


def quantise(llm: CausalLM, config: QuantizeConfig) -> None:
    """Replace every linear layer of `llm`, except its head, by one that stores its matrix as `config` says. Embeddings stay
    unchanged.

    Raises `ConfigError` for a mixture of experts, where most matrices would stay unquantised.
    """
    functional()
    if experts := fused_parameters(llm):
        raise ConfigError(
            f"quantize.bits = {config.bits}: {type(llm).__name__} is a mixture of experts: {len(experts)} of its parameters (for "
            f"example {experts[0]}) are no linear layers, and most of the model would stay as it is; use quantize.bits = 16"
        )
    for path, linear in matrices(llm):
        parent, _, name = path.rpartition(".")
        packed = QuantLoraLinear(linear, config) if isinstance(linear, LoraLinear) else QuantLinear(linear, config)
        setattr(llm.get_submodule(parent), name, packed)


def matrices(llm: CausalLM) -> list[tuple[str, nn.Linear]]:
    """Return the linear layers of a language model except its head, by path: those that `quantise` replaces."""
    head = llm.get_output_embeddings()
    return [(path, module) for path, module in llm.named_modules() if isinstance(module, nn.Linear) and module is not head]


def quantised(root: nn.Module) -> Iterator[tuple[str, Quantised]]:
    """Yield the quantised layers with their full paths."""
    for path, module in root.named_modules():
        if isinstance(module, Quantised):
            yield path, module


def num_parameters(root: nn.Module) -> int:
    """Count parameters by their unquantised size; a tied matrix counts once."""
    stored = sum(layer.codes.numel() + layer.scales.numel() for _, layer in quantised(root))
    return sum(p.numel() for p in root.parameters()) - stored + sum(math.prod(layer.shape) for _, layer in quantised(root))


@contextmanager
def without_kernels() -> Iterator[None]:
    """Give quantised layers on meta, inside the context, shapes without values: bitsandbytes computes on real tensors only."""
    original = quantize._dense_blocks

    def shaped(codes: Tensor, absmax: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
        return torch.empty(len(codes) * quantize.BLOCK, dtype=dtype, device=codes.device)

    def unnested(scales: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
        return torch.empty(scales.shape, dtype=torch.float32, device=scales.device)

    nest = quantize._unnest
    quantize._dense_blocks, quantize._unnest = shaped, unnested
    try:
        yield
    finally:
        quantize._dense_blocks, quantize._unnest = original, nest
