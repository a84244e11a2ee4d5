"""Checks of products: a fused adapter is the plain one, and a matrix in few bits is the same on every device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import LoraConfig, QuantizeConfig
from model.errors import ConfigError
from model.files.tensor_files import LazyTensor
from model.llm.quantize import Packed, dense, functional, pack, product
from model.lora import LoraLinear, add_lora
from model.lora_product import keep_mask, random_state
from tools.devicechecks.models import QUANTISED
from tools.devicechecks.numbers import strict_float32
from tools.devicechecks.outcome import CheckResult, Context, Figure, Skipped

ROWS, WIDTH, RANK = 96, 256, 16
FLOAT32_BOUND, HALF_BOUND = 1e-5, 2e-2
DROPOUT = 0.25


class Projections(nn.Module):
    """Three projections of one input, as of an attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, out) for out in (width, width // 2, width // 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def check_lora(context: Context) -> CheckResult:
    """Compare the fused product, its shared mask and its gradients with the formula, written out in plain operations."""
    found: dict[str, tuple[float, float]] = {}
    with strict_float32():
        for name, dtype, rate, bound in (
            ("float32", torch.float32, 0.0, FLOAT32_BOUND),
            ("float32 with dropout", torch.float32, DROPOUT, FLOAT32_BOUND),
            ("bfloat16", torch.bfloat16, DROPOUT, HALF_BOUND),
        ):
            found[name] = (adapter_distance(context.device, dtype, rate), bound)
    return bounded(found)


def adapter_distance(device: torch.device, dtype: torch.dtype, rate: float) -> float:
    """Return how far output and gradients of adapted projections are from the formula."""
    torch.manual_seed(0)
    layer = Projections(WIDTH).to(device, dtype)
    add_lora(layer, ["q", "k", "v"], LoraConfig(rank=RANK, alpha=8.0, dropout=rate))
    for name, parameter in layer.named_parameters():
        with torch.no_grad():
            parameter.normal_().mul_(parameter.shape[-1] ** -0.5)
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_("lora" in name)
    x = torch.randn(ROWS, WIDTH, device=device, dtype=dtype, requires_grad=True)
    state = random_state(device)
    out = layer.train()(x)
    grad = torch.randn_like(out)
    learned = [x, *(p for p in layer.parameters() if p.requires_grad)]
    fused = [out, *torch.autograd.grad(out, learned, grad)]
    mask = keep_mask(x.shape, rate, device, state) if rate else torch.ones_like(x, dtype=torch.bool)
    written = torch.cat([plain(x, mask, rate, part) for part in (layer.q, layer.k, layer.v)], -1)
    return max(apart(a, b) for a, b in zip(fused, [written, *torch.autograd.grad(written, learned, grad)]))


def plain(x: Tensor, mask: Tensor, rate: float, layer: nn.Linear) -> Tensor:
    """Compute W x + b + scale * B A dropout(x) in plain operations."""
    if not isinstance(layer, LoraLinear):
        raise TypeError("a layer is not adapted")
    adapted = F.linear(F.linear(x * mask / (1 - rate), layer.lora_A), layer.lora_B)
    return F.linear(x, layer.weight, layer.bias) + layer.scale * adapted


def apart(found: Tensor, expected: Tensor) -> float:
    """Return the distance of two tensors on any devices, relative to the second; infinite where a value is not a number."""
    a, b = found.detach().double().cpu(), expected.detach().double().cpu()
    value = float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp(min=1e-30))
    return value if value == value else float("inf")


def check_quantised(context: Context) -> CheckResult:
    """Compare matrices in few bits, and products with them and back, on the device with those on the CPU."""
    try:
        functional()
    except ConfigError as error:
        raise Skipped(str(error)) from error
    found: dict[str, tuple[float, float]] = {}
    with strict_float32():
        for name, config in QUANTISED.items():
            for dtype, bound in ((torch.float32, FLOAT32_BOUND), (torch.bfloat16, HALF_BOUND)):
                key = name if dtype == torch.float32 else f"{name} bfloat16"
                found[key] = (product_distance(context.device, config, dtype), bound)
    return bounded(found)


def product_distance(device: torch.device, config: QuantizeConfig, dtype: torch.dtype) -> float:
    """Return how far the dequantised matrix, a product with it and its gradient are from those on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shape = (WIDTH, WIDTH + 64)
    matrix = torch.randn(shape, generator=generator) / WIDTH**0.5
    rows = LazyTensor(shape, lambda start, stop: matrix[start:stop])
    x = torch.randn(ROWS, shape[1], generator=generator)
    grad = torch.randn(ROWS, shape[0], generator=generator)
    num_rows = shape[0] if config.bits == 8 else matrix.numel() // 64
    packed = pack(rows, config, 0, num_rows)

    def numbers(device: torch.device) -> list[Tensor]:
        nested, offset = (None if t is None else t.to(device) for t in (packed.nested, packed.offset))
        here = Packed(packed.codes.to(device), packed.scales.to(device), nested, offset)
        read = x.to(device, dtype).requires_grad_()
        out = product(read, None, here, shape, config)
        return [dense(here, shape, config, dtype), out, *torch.autograd.grad(out, [read], grad.to(device, dtype))]

    return max(apart(a, b) for a, b in zip(numbers(device), numbers(torch.device("cpu"))))


def bounded(found: dict[str, tuple[float, float]]) -> CheckResult:
    """Return a finding that passes where every distance is within its bound."""
    figures: dict[str, Figure] = {name: distance for name, (distance, _) in found.items()}
    passed = all(distance <= bound for distance, bound in found.values())
    return CheckResult(passed, ", ".join(f"{name} {distance:.1e}" for name, (distance, _) in found.items()), figures)
