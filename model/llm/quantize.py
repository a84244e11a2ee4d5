"""The language model's frozen matrices in 4 or 8 bits: pack them from files, multiply by them, dequantise them (QLoRA: Dettmers et
al. 2023; LLM.int8(): Dettmers et al. 2022).

Codes and scales equal those of bitsandbytes bit for bit; its classes are not used, because FSDP2 cannot shard their parameters.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import QuantizeConfig
from model.errors import ConfigError
from model.files.tensor_files import LazyTensor

BLOCK, NESTED = 64, 256
"""Weights that share a scale; scales that share a scale of their own where `double` is set."""
PIECE = 1 << 16
"""Blocks that are packed at a time: 16 MiB in float32."""


@cache
def functional() -> Any:
    """Return bitsandbytes' module of functions. Raises `ConfigError` where bitsandbytes is not installed."""
    # On import, bitsandbytes logs advice to install a package that would download code.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional as found
    except ImportError as error:
        raise ConfigError(f"[quantize] needs bitsandbytes ({error}): pip install -e '.[quantize]'") from error
    return found


@dataclass(frozen=True)
class Packed:
    """The stored form of a quantised matrix (out, in), or some rows of that form.

    4 bits: a row per block of 64 weights in reading order: codes (blocks, 32), two weights per byte, and scales (blocks, 4), the
    bytes of a float32. With `double`: scales (blocks, 1); every 256 of them share one of `nested` (blocks / 256,) float32, and all
    share `offset` (). 8 bits: a row per output: codes (out, in), scales (out, 4).
    """

    codes: Tensor
    scales: Tensor
    nested: Tensor | None = None
    offset: Tensor | None = None


def layout(shape: tuple[int, int], config: QuantizeConfig) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Return the shapes of the codes and of the scales of a matrix (out, in), and the length of `nested`, 0 for none."""
    if config.bits == 8:
        return shape, (shape[0], 4), 0
    blocks = -(-math.prod(shape) // BLOCK)
    return (blocks, BLOCK // 2), (blocks, 1 if config.double else 4), -(-blocks // NESTED) if config.double else 0


def pack(rows: LazyTensor, config: QuantizeConfig, first: int, last: int) -> Packed:
    """Pack stored rows [first, last) of the matrix `rows`, on the CPU, so that the result does not depend on the target device.

    The values in the files are packed, whatever the compute type. A few MiB of the matrix are in memory at a time.
    """
    if config.bits == 8:
        codes, absmax = _packed_rows(rows, first, last)
        return Packed(codes, _as_bytes(absmax))
    codes, absmax = _packed_blocks(rows, config, first, last)
    if not config.double:
        return Packed(codes, _as_bytes(absmax))
    absmax = _largest(rows)
    offset = absmax.mean()
    scales, nested = _nest(absmax, offset)
    return Packed(codes, scales[first:last].unsqueeze(1), nested, offset)


def dense(packed: Packed, shape: tuple[int, int], config: QuantizeConfig, dtype: torch.dtype) -> Tensor:
    """Dequantise `packed` to the matrix (out, in), computed in float32 and rounded to `dtype` once. No host sync."""
    if config.bits == 8:
        return _dense_rows(packed.codes, packed.scales.view(torch.float32).flatten(), dtype)
    if packed.nested is None or packed.offset is None:
        absmax = packed.scales.view(torch.float32).flatten()
    else:
        absmax = _unnest(packed.scales.flatten(), packed.nested, packed.offset)
    return _dense_blocks(packed.codes, absmax, config.type, dtype)[: math.prod(shape)].view(shape)


def dequantised(rows: LazyTensor, config: QuantizeConfig) -> LazyTensor:
    """Return the matrix `rows` packed and dequantised in float32: the values that a model with quantised storage computes with."""

    @cache
    def offset() -> Tensor:  # shared by all blocks, so computed once
        return _largest(rows).mean()

    def read(start: int, stop: int) -> Tensor:
        if config.bits == 8:
            return _dense_rows(*_packed_rows(rows, start, stop), torch.float32)
        width, span = rows.shape[1], BLOCK * NESTED
        first = start * width // span * NESTED
        last = min(-(-stop * width // span) * NESTED, layout((rows.shape[0], width), config)[0][0])
        codes, absmax = _packed_blocks(rows, config, first, last)
        if config.double and last > first:
            absmax = _unnest(*_nest(absmax, offset()), offset())
        flat = _dense_blocks(codes, absmax, config.type, torch.float32)
        return flat[start * width - first * BLOCK : stop * width - first * BLOCK].view(stop - start, width)

    return LazyTensor(rows.shape, read)


def product(x: Tensor, bias: Tensor | None, packed: Packed, shape: tuple[int, int], config: QuantizeConfig) -> Tensor:
    """Multiply x (..., in) by the matrix (out, in), and add `bias`, all in the type of x. Backward dequantises the matrix again."""
    result: Tensor = _Product.apply(x, bias, packed.codes, packed.scales, packed.nested, packed.offset, shape, config)
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *stored: Any) -> Tensor:
        *tensors, ctx.shape, ctx.config = stored
        ctx.save_for_backward(*tensors)
        return F.linear(x, dense(Packed(*tensors), ctx.shape, ctx.config, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, (of_x, of_bias) = grads[0], ctx.needs_input_grad[:2]
        grad_x = grad @ dense(Packed(*ctx.saved_tensors), ctx.shape, ctx.config, grad.dtype) if of_x else None
        return grad_x, grad.flatten(0, -2).sum(0) if of_bias else None, *(None,) * 6


def _packed_rows(rows: LazyTensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Pack rows in 8 bits: return codes (n, in) and the largest magnitude of each row (n,) float32."""
    codes = torch.empty(last - first, rows.shape[1], dtype=torch.uint8)
    absmax = torch.empty(last - first)
    for a, b in _spans(first, last, max(1, PIECE * BLOCK // rows.shape[1])):
        values = rows.read(a, b).half()  # as in bitsandbytes, whose kernels take only float16
        found, absmax[a - first : b - first], _ = functional().int8_vectorwise_quant(values)
        found[absmax[a - first : b - first] == 0] = 0  # the kernel computed 0 / 0
        codes[a - first : b - first] = found.view(torch.uint8)
    return codes, absmax


def _dense_rows(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.view(torch.int8).to(dtype).mul_(absmax.unsqueeze(1).mul(1.0 / 127.0))


def _packed_blocks(rows: LazyTensor, config: QuantizeConfig, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Pack blocks [first, last) in 4 bits: return codes (n, 32) and the largest magnitude of each block (n,) float32."""
    codes = torch.zeros(last - first, BLOCK // 2, dtype=torch.uint8)
    absmax = torch.empty(last - first)
    for a, b in _spans(first, last, PIECE):
        found, state = functional().quantize_4bit(_values(rows, a, b), blocksize=BLOCK, quant_type=config.type)
        # The last block of a matrix may be short: its missing codes stay 0.
        codes[a - first : b - first].view(-1)[: found.numel()] = found.flatten()
        absmax[a - first : b - first] = state.absmax
    return codes, absmax


def _dense_blocks(codes: Tensor, absmax: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Dequantise 4-bit codes to a flat tensor: 64 weights for each row of `codes`."""
    if not len(codes):
        return torch.empty(0, dtype=dtype, device=codes.device)
    # One row per block: in a matrix whose rows begin inside a block, the AVX-512 kernel of bitsandbytes 0.50 takes wrong scales.
    shape = torch.Size((len(codes), BLOCK))
    state = functional().QuantState(absmax=absmax, shape=shape, blocksize=BLOCK, quant_type=kind, dtype=dtype)
    found: Tensor = functional().dequantize_4bit(codes.reshape(-1, 1), state)
    return found.view(-1)


def _largest(rows: LazyTensor) -> Tensor:
    """Return the largest magnitude in each block of the matrix, (blocks,) float32."""
    blocks = -(-math.prod(rows.shape) // BLOCK)
    found = torch.empty(blocks)
    for a, b in _spans(0, blocks, PIECE):
        values = _values(rows, a, b).abs()
        found[a:b] = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK).amax(1)
    return found


def _nest(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Store scales in a byte each. Return these bytes and the scales of each NESTED of them."""
    scales, state = functional().quantize_blockwise(absmax - offset, blocksize=NESTED)
    return scales, state.absmax


def _unnest(scales: Tensor, nested: Tensor, offset: Tensor) -> Tensor:
    levels = _levels(scales.device)
    found: Tensor = functional().dequantize_blockwise(scales, absmax=nested, code=levels, blocksize=NESTED)
    return found + offset


@cache
def _levels(device: torch.device) -> Tensor:
    """Return the values of the 256 nested scale codes. They are cached on the device: copying them there would wait for it."""
    levels: Tensor = functional().create_dynamic_map()
    return levels.to(device)


def _values(rows: LazyTensor, first: int, last: int) -> Tensor:
    """Read the weights of blocks [first, last), flat, float32; the last block of a matrix may be short."""
    width = rows.shape[1]
    start, stop = first * BLOCK, min(last * BLOCK, math.prod(rows.shape))
    top = start // width
    return rows.read(top, -(-stop // width)).float().flatten()[start - top * width : stop - top * width]


def _spans(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, length):
        yield first, min(first + length, stop)


def _as_bytes(absmax: Tensor) -> Tensor:
    """View scales as bytes, (n, 4) uint8: FSDP2 would cast float32 to its compute type."""
    return absmax.unsqueeze(1).view(torch.uint8)
