"""Low-rank adapters (Hu et al. 2021) for linear layers, which are selected by full path and replaced by adapted ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import LoraConfig
from model.errors import ConfigError
from model.files.untrusted import shown
from model.lora_product import LoraPair, Matrix, SharedInputs, adapted_product

ALL_LINEAR = "all-linear"
SUFFIXES = (".lora_A", ".lora_B")
HEAD_STAYS = (
    "which is never adapted: the loss multiplies by its bare matrix piece by piece; leave it out, or train it with "
    "model.llm.tune = 'full'"
)


class LoraLinear(nn.Linear):
    """A linear layer with an adapter: x (..., in) -> W x + b + scale * B A dropout(x). It keeps its name, weight and bias.

    Layers with the same `inputs` that read the same tensor share one dropout mask. Switched off, it computes W x + b.
    """

    is_on = True

    def __init__(self, linear: nn.Linear, config: LoraConfig, inputs: SharedInputs | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(config.rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, config.rank, device=device))
        self.scale = config.scale
        self.dropout = nn.Dropout(config.dropout)
        self.inputs = SharedInputs() if inputs is None else inputs

    def stored(self) -> Matrix:
        """Return W as it is stored."""
        return Matrix((self.weight,), lambda weight, dtype: weight)

    def base(self, x: Tensor) -> Tensor:
        """Compute W x + b."""
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_on:
            return self.base(x)
        if torch.compiler.is_compiling():
            return self._traced(x)
        read = self.inputs.read(x, self.dropout.p if self.dropout.training else 0.0, self)
        return adapted_product(x, read, self.stored(), self.bias, LoraPair(self.lora_A, self.lora_B, self.scale))

    def _traced(self, x: Tensor) -> Tensor:
        rate = self.dropout.p if self.dropout.training else 0.0
        low = F.linear(self.inputs.traced(x, rate), self.lora_A) * (self.scale / (1 - rate))
        return self.base(x) + F.linear(low, self.lora_B)


def target_paths(parts: dict[str, nn.Module], targets: str | tuple[str, ...]) -> list[str]:
    """Return the full paths, as `llm.model.layers.0.self_attn.q_proj`, of the linear layers of `parts` that `targets` selects.

    `all-linear` selects every one but the head. In a pattern, `*` matches anything, dots too. Raises `ConfigError` when a pattern
    matches no layer.
    """
    linear = [path for path, module in _modules(parts) if type(module) is nn.Linear and not at_head(path, parts)]
    if not linear:
        raise ConfigError(f"lora: the parts tuned by LoRA ({', '.join(parts)}) have no linear layer that an adapter could stand in")
    if targets == ALL_LINEAR:
        return linear
    patterns = (targets,) if isinstance(targets, str) else targets
    if not patterns:
        raise ConfigError(f"lora.targets = [] names no layer: name patterns of full paths, as {linear[0]!r}, or {ALL_LINEAR!r}")
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in linear):
            raise ConfigError(
                f"lora.targets: {shown(pattern)} matches no linear layer of the parts tuned by LoRA ({', '.join(parts)})"
                f"{_reason_unmatched(pattern, parts, linear)}; full paths look like {linear[0]!r}; '*' matches anything"
            )
    return [path for path in linear if any(fnmatchcase(path, pattern) for pattern in patterns)]


def _modules(parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for part, module in parts.items():
        yield from ((f"{part}.{name}" if name else part, child) for name, child in module.named_modules())


def _reason_unmatched(pattern: str, parts: dict[str, nn.Module], linear: list[str]) -> str:
    """Explain why a pattern matches no linear layer, as a continuation of the error message; "" when no reason is known."""
    named = [(path, module) for path, module in _modules(parts) if fnmatchcase(path, pattern)]
    for path, module in named:
        if at_head(path, parts):
            return f": {path} is the head, {HEAD_STAYS}"
        if any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
            return f": {path} holds its experts fused in one parameter each, which adapters do not reach"
    if named:
        return f": {named[0][0]} is a {type(named[0][1]).__name__}, and adapters stand in linear layers"
    for path in linear:
        if fnmatchcase(f"{path}.weight", pattern):
            return f": it names a parameter; write {pattern.removesuffix('.weight')!r}, the layer"
        if path.endswith(f".{pattern}"):
            return f": patterns are of whole paths; write {f'*.{pattern}'!r}"
    return ""


def at_head(path: str, parts: Mapping[str, nn.Module]) -> bool:
    """Tell whether the full path is that of the language model's head."""
    part, _, name = path.partition(".")
    llm: Any = parts.get(part) if part == "llm" else None
    try:
        return llm is not None and llm.get_submodule(name) is llm.get_output_embeddings()
    except AttributeError:  # the path names no layer
        return False


def add_lora(root: nn.Module, paths: list[str], config: LoraConfig) -> None:
    """Replace the linear layers at `paths` by adapted ones that share their parameters.

    Layers of one module, as the projections of an attention, share the dropout masks of their inputs.
    """
    inputs: defaultdict[str, SharedInputs] = defaultdict(SharedInputs)
    for path in paths:
        parent, _, name = path.rpartition(".")
        linear = root.get_submodule(path)
        assert isinstance(linear, nn.Linear)  # `target_paths` selects no other layers
        setattr(root.get_submodule(parent), name, LoraLinear(linear, config, inputs[parent]))


def adapted(root: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yield the adapted layers with their full paths."""
    for name, module in root.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


@contextmanager
def switched_off(root: nn.Module) -> Iterator[None]:
    """Compute, inside the context, as if the adapted layers of `root` had no adapters."""
    layers = [layer for _, layer in adapted(root)]
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True


def learning_biases(part: nn.Module, bias: str) -> Iterator[str]:
    """Yield the names of the biases of `part` that are trained beside its adapters.

    `bias`: none | lora_only | all (of all its layers).
    """
    if bias == "all":
        yield from (name for name, _ in part.named_parameters() if name.rpartition(".")[2] == "bias")
    if bias == "lora_only":
        yield from (f"{path}.bias" for path, layer in adapted(part) if layer.bias is not None)


def is_adapter(name: str) -> bool:
    """Tell whether a parameter's full name is that of an adapter matrix."""
    return name.endswith(SUFFIXES)


def merge_rows(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Compute weight (n, in) + scale * lora_b (n, r) @ lora_a (r, in), all in float32."""
    return torch.addmm(weight.float(), lora_b.float(), lora_a.float(), alpha=scale)
