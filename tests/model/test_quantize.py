"""Matrices in 4 and 8 bits: what bitsandbytes' layers compute, to the bit, whoever packs which rows of them."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from model.config import QuantizeConfig
from model.errors import ConfigError
from model.files.tensor_files import LazyTensor, in_memory
from model.llm import quantize
from model.llm.quantize import BLOCK, Packed, dense, dequantised, layout, pack, product

FOUR = [QuantizeConfig(4, kind, double) for kind in ("nf4", "fp4") for double in (True, False)]  # type: ignore[arg-type]
EIGHT = QuantizeConfig(8)
DTYPES = (torch.float32, torch.bfloat16)
RAGGED = (37, 45)
"""Rows of this width begin inside a block, and the last block is short."""


def matrix(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def whole(weight: Tensor, config: QuantizeConfig) -> Packed:
    return pack(in_memory(weight), config, 0, layout(tuple(weight.shape), config)[0][0])  # type: ignore[arg-type]


def theirs(weight: Tensor, bias: Tensor, config: QuantizeConfig) -> nn.Module:
    """bitsandbytes' own layer around the same values."""
    rows, width = weight.shape
    layer: Any
    if config.bits == 8:
        layer = bitsandbytes.nn.Linear8bitLt(width, rows, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(
            width, rows, compute_dtype=bias.dtype, compress_statistics=config.double, quant_type=config.type
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            weight.clone(), requires_grad=False, compress_statistics=config.double, quant_type=config.type, module=layer
        )
    layer.bias = nn.Parameter(bias)
    return layer.to("cpu").train()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [*FOUR, EIGHT], ids=str)
@pytest.mark.parametrize("shape", [(96, 64), (48, 192), (130, 256)])
def test_outputs_and_gradients_are_those_of_bitsandbytes_to_the_bit(
    shape: tuple[int, int], config: QuantizeConfig, dtype: torch.dtype
) -> None:
    weight, bias, x = matrix(shape), matrix((1, shape[0]), 1)[0].to(dtype), matrix((15, shape[1]), 2).to(dtype)
    layer, packed = theirs(weight, bias, config), whole(weight, config)
    expected, found = x.clone().requires_grad_(), x.clone().view(3, 5, -1).requires_grad_()
    y, ours = layer(expected), product(found, bias.clone().requires_grad_(), packed, shape, config)
    assert ours.dtype == dtype and torch.equal(ours.flatten(0, 1), y)
    grad = matrix((15, shape[0]), 3).to(dtype)
    y.backward(grad)
    ours.backward(grad.view_as(ours))
    assert found.grad is not None and torch.equal(found.grad.flatten(0, 1), expected.grad)


def test_a_bias_learns_beside_a_quantised_matrix() -> None:
    weight, bias, x = matrix((6, 64)), matrix((1, 6), 1)[0].requires_grad_(), matrix((5, 64), 2)
    grad = matrix((5, 6), 3)
    product(x, bias, whole(weight, FOUR[0]), (6, 64), FOUR[0]).backward(grad)
    assert torch.equal(bias.grad, grad.sum(0))  # type: ignore[arg-type]


@pytest.mark.parametrize("config", FOUR, ids=str)
def test_blocks_run_on_over_the_ends_of_rows(config: QuantizeConfig) -> None:
    """Against the definition: the level that a code names times the scale of its block of 64, counted through the whole matrix."""
    weight = matrix(RAGGED)
    codes, state = bitsandbytes.functional.quantize_4bit(weight, compress_statistics=config.double, quant_type=config.type)
    packed, n = whole(weight, config), weight.numel()
    assert torch.equal(packed.codes.flatten()[: len(codes)], codes.flatten())
    absmax = state.absmax
    if config.double:
        assert torch.equal(packed.scales.flatten(), state.absmax) and torch.equal(packed.nested, state.state2.absmax)  # type: ignore[arg-type]
        absmax = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    numbers = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten()[:n].long()
    levels = bitsandbytes.functional.get_4bit_type(config.type, device="cpu")
    expected = (levels[numbers] * absmax.repeat_interleave(BLOCK)[:n]).view(RAGGED)
    assert torch.equal(dense(packed, RAGGED, config, torch.float32), expected)


@pytest.mark.parametrize("shape", [RAGGED, (96, 64), (700, 64)])
@pytest.mark.parametrize("config", [*FOUR, EIGHT], ids=str)
def test_rows_packed_apart_are_the_rows_of_the_whole(
    config: QuantizeConfig, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ranks pack their shards, and a merge reads rows; piece by piece or at once."""
    weight = matrix(shape)
    expected = whole(weight, config)
    values = dense(expected, shape, config, torch.float32)
    monkeypatch.setattr(quantize, "PIECE", 3)
    num_rows = layout(shape, config)[0][0]
    assert expected.codes.shape == layout(shape, config)[0] and expected.scales.shape == layout(shape, config)[1]
    bounds = [0, num_rows // 3, num_rows // 2, num_rows, num_rows]
    parts = [pack(in_memory(weight), config, a, b) for a, b in itertools.pairwise(bounds)]
    assert torch.equal(torch.cat([p.codes for p in parts]), expected.codes)
    assert torch.equal(torch.cat([p.scales for p in parts]), expected.scales)
    for part in parts:
        if config.bits == 4 and config.double:
            assert torch.equal(part.nested, expected.nested) and torch.equal(part.offset, expected.offset)  # type: ignore[arg-type]
    read = dequantised(in_memory(weight), config)
    assert read.shape == shape and torch.equal(read.all(), values)
    for first, last in ((0, 1), (1, 7), (shape[0] - 3, shape[0]), (5, 5)):
        assert torch.equal(read.read(first, last), values[first:last])


@pytest.mark.parametrize("config", [FOUR[0], FOUR[1], EIGHT], ids=str)
def test_a_matrix_is_never_held_whole_while_it_is_packed(config: QuantizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "PIECE", 4)
    weight, sizes = matrix((200, 64)), []

    def read(start: int, stop: int) -> Tensor:
        sizes.append((stop - start) * 64)
        return weight[start:stop]

    pack(LazyTensor((200, 64), read), config, 0, 200)
    assert max(sizes) == 4 * BLOCK


@pytest.mark.parametrize(("config", "error"), [(FOUR[0], 0.092), (FOUR[2], 0.124), (EIGHT, 0.0073)], ids=str)
def test_the_error_is_that_of_the_method(config: QuantizeConfig, error: float) -> None:
    weight = matrix((512, 512))
    found = dense(whole(weight, config), (512, 512), config, torch.float32)
    assert float((found - weight).norm() / weight.norm()) == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("config", [*FOUR, EIGHT], ids=str)
def test_zeros_stay_zeros(config: QuantizeConfig) -> None:
    weight = matrix((8, 64))
    weight[2:4] = 0
    found = dense(whole(weight, config), (8, 64), config, torch.float32)
    assert bool(found.isfinite().all()) and not found[2:4].any() and bool(found[4:].any())


@pytest.mark.parametrize("config", [*FOUR, EIGHT], ids=str)
def test_what_it_takes(config: QuantizeConfig) -> None:
    """Bits per weight: 4 and 32 / 64 of the scales, 8 / 64 where those are stored in a byte; 8 and 32 / in."""
    codes, scales, num_nested = layout((1024, 1024), config)
    bits = 8 * (math.prod(codes) + math.prod(scales) + 4 * num_nested) / 1024**2
    assert bits == {(4, True): 4 + 1 / 8 + 32 / (64 * 256), (4, False): 4.5}.get((config.bits, config.double), 8 + 32 / 1024)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    quantize.functional.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[quantize\]'"):
        quantize.functional()
    quantize.functional.cache_clear()
