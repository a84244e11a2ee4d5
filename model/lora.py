"""Low-rank adapters (Hu et al. 2021) injected by hand into linear layers, found by full path."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ConfigError, LoraConfig

ALL_LINEAR = "all-linear"
SUFFIXES = (".lora_A", ".lora_B")


class LoraLinear(nn.Linear):
    """x (..., in) -> W x + b + scale * B A dropout(x). The layer keeps its name, its weight and its bias."""

    def __init__(self, linear: nn.Linear, config: LoraConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(config.rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, config.rank, device=device))
        self.scale = config.scale
        self.dropout = nn.Dropout(config.dropout)

    def multiply(self, x: Tensor) -> Tensor:
        """W x + b, without the adapter."""
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x) + self.scale * F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B)


def target_paths(parts: dict[str, nn.Module], targets: str | tuple[str, ...], head: nn.Module | None) -> list[str]:
    """Full paths, as `llm.model.layers.0.self_attn.q_proj`, of the linear layers of `parts` that `targets` names.

    `all-linear` means every one but the head. A pattern (`*` matches anything, dots too) that matches none is an error.
    """
    linear = [
        f"{part}.{name}"
        for part, module in parts.items()
        for name, child in module.named_modules()
        if type(child) is nn.Linear and child is not head
    ]
    if targets == ALL_LINEAR:
        return linear
    patterns = (targets,) if isinstance(targets, str) else targets
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in linear):
            raise ConfigError(
                f"lora.targets: {pattern!r} matches no linear layer of the parts tuned by LoRA ({', '.join(parts)}); "
                f"full paths look like {linear[0]!r}; '*' matches anything"
            )
    return [path for path in linear if any(fnmatchcase(path, pattern) for pattern in patterns)]


def add_lora(root: nn.Module, paths: list[str], config: LoraConfig) -> None:
    """Replace the linear layers at `paths` by adapted ones that share their parameters."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(root.get_submodule(parent), name, LoraLinear(root.get_submodule(path), config))  # type: ignore[arg-type]


def adapted(root: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Adapted layers with their full paths."""
    for name, module in root.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def learning_biases(part: nn.Module, bias: str) -> Iterator[str]:
    """Names of the biases of `part` that learn beside its adapters; `bias`: none | lora_only | all, of all its layers."""
    if bias == "all":
        yield from (name for name, _ in part.named_parameters() if name.rpartition(".")[2] == "bias")
    if bias == "lora_only":
        yield from (f"{path}.bias" for path, layer in adapted(part) if layer.bias is not None)


def is_adapter(name: str) -> bool:
    """Whether a parameter's full name is that of an adapter matrix."""
    return name.endswith(SUFFIXES)


def merge_rows(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """weight (n, in) + scale * lora_b (n, r) @ lora_a (r, in), all in float32."""
    return torch.addmm(weight.float(), lora_b.float(), lora_a.float(), alpha=scale)
