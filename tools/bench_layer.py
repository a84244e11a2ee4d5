"""Count what one decoder layer of a language model costs: operators, bytes moved outside matrix products, FLOPs, kept activations.

Ours beside PEFT's adapters on the same layer, of Qwen2-7B's shape. It runs forward and backward on the meta device, in bfloat16;
nothing is computed: counts are exact and repeat. An operator reads its tensors once and writes its results once; views cost
nothing. What a matrix product reads and writes, what it adds to in place included, is left out, and so is attention. Dropout of
torch counts as CUDA's fused kernel.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2Model

from model.config import LoraConfig
from model.errors import ConfigError
from model.llm import attention
from model.lora import add_lora, is_adapter
from tools.cli import command_parser, run_command
from trainer.distributed.casting import cast_for_compute
from trainer.distributed.selective import recompute_selectively
from trainer.memory.simulate import LiveCounter, shape_stand_ins

SHAPE = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "vocab_size": 64,
}
"""The shape of a layer of Qwen2-7B."""
CHAIN = 28
"""Consecutive layers of the selective row: what is computed again differs from layer to layer. As many as Qwen2-7B has."""
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "_grouped_mm"}
WRITES = {"bernoulli_", "copy_", "zero_", "fill_"}
"""Operators that do not read what they write to."""
CASTS = {"_to_copy", "copy_"}
ALLOCATES = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


@dataclass
class PassCost:
    """Cost of one pass."""

    num_ops: float = 0  # views left out
    moved: float = 0  # bytes read and written outside matrix products
    flops: float = 0  # of matrix products
    cast: float = 0  # bytes read and written to change the number type

    def of_one(self, num_layers: int) -> PassCost:
        """Return the mean of `num_layers` layers."""
        return PassCost(*(total / num_layers for total in (self.num_ops, self.moved, self.flops, self.cast)))


@dataclass(frozen=True)
class LayerCost:
    """Mean cost of a layer with `num_tokens` tokens."""

    forward: PassCost
    backward: PassCost
    kept: float  # bytes that live from forward to backward
    num_tokens: int


class CostCounter(TorchDispatchMode):
    """Adds up in `cost` what the operators inside the `with` cost."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = PassCost()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in ALLOCATES or func.namespace == "simulated":
            return found
        self.cost.num_ops += 1
        if name == "adapted":  # the product of the weight, and that of the adapter, which adds to it
            self.cost.num_ops += 1
            self.cost.flops += 2 * (args[0].numel() + args[3].numel()) * found.shape[-1]
        elif name in PRODUCTS:
            a, b = [arg for arg in args if isinstance(arg, Tensor) and arg.dim() > 1][-2:]
            self.cost.flops += 2 * math.prod(a.shape) * b.shape[-1]
        else:
            read = tree_leaves((args[name in WRITES :], kwargs))
            self.cost.moved += sum({id(t): moved_bytes(t) for t in read if isinstance(t, Tensor)}.values())
            self.cost.moved += sum(moved_bytes(t) for t in tree_leaves(found) if isinstance(t, Tensor))
            source = args[1] if name == "copy_" else args[0]
            if name in CASTS and source.dtype != found.dtype:
                self.cost.cast += moved_bytes(source) + moved_bytes(found)
        return found


def moved_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor; an expanded one is no larger than its storage."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def decoder_layer() -> tuple[nn.Module, nn.Module]:
    """Return a frozen model of one layer on meta, in bfloat16, and its layer."""
    attention.register()
    config = Qwen2Config(**SHAPE, attn_implementation=attention.implementation("sdpa"), use_cache=False)
    with torch.device("meta"):
        model = Qwen2Model(config).to(torch.bfloat16).requires_grad_(False).train()
    return model, model.layers[0]


def linear_paths(layer: nn.Module) -> list[str]:
    """Return the paths of the linear layers of `layer`."""
    return [path for path, module in layer.named_modules() if isinstance(module, nn.Linear)]


def our_layer(rank: int, dropout: float) -> nn.Module:
    """Return a layer with our adapters on all linear layers, float32 masters that are cast where they are used."""
    _, layer = decoder_layer()
    add_lora(layer, linear_paths(layer), LoraConfig(rank=rank, dropout=dropout))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    cast_for_compute(layer, torch.bfloat16)
    return layer.train()


def peft_layer(rank: int, dropout: float, dtype: torch.dtype) -> nn.Module:
    """Return a layer with PEFT's adapters of type `dtype` on all linear layers."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"PEFT's rows need peft ({error}): pip install peft") from error
    model, layer = decoder_layer()
    targets = [f"layers.0.{path}" for path in linear_paths(layer)]
    config = peft.LoraConfig(r=rank, lora_alpha=16, lora_dropout=dropout, target_modules=targets)
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return layer.train()


@contextmanager
def stand_ins() -> Iterator[None]:
    """Let dropout be CUDA's fused kernel, a linear layer cast to bfloat16 as autocast does, and attention cost nothing."""
    linear = F.linear

    def fused(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, training)[0] if training and p else x

    def cast(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x.to(torch.bfloat16), weight.to(torch.bfloat16), bias)

    with patch.object(F, "dropout", fused), patch.object(F, "linear", cast), shape_stand_ins():
        yield


def measure(layers: Sequence[nn.Module], num_tokens: int) -> LayerCost:
    """Run forward and backward of consecutive layers on meta, and return the mean cost of one.

    Their input has a gradient, as in all but the first layer of a model. Inputs of layers do not count as kept.
    """
    tensor = functools.partial(torch.empty, device="meta", dtype=torch.bfloat16)
    hidden = tensor(1, num_tokens, SHAPE["hidden_size"]).requires_grad_()
    angles = tuple(tensor(1, num_tokens, SHAPE["hidden_size"] // SHAPE["num_attention_heads"]) for _ in range(2))
    grad = tensor(1, num_tokens, SHAPE["hidden_size"])
    parameters = [p for layer in layers for p in layer.parameters()]
    live, forward, backward = LiveCounter([*parameters, hidden, grad, *angles]), CostCounter(), CostCounter()
    with stand_ins(), live:
        out = hidden
        with forward:
            for layer in layers:
                found = layer(out, position_embeddings=angles, attention_mask=None)
                out = found[0] if isinstance(found, tuple) else found
        kept = live.live - len(layers) * moved_bytes(out)
        with backward:
            out.backward(grad)
    return LayerCost(forward.cost.of_one(len(layers)), backward.cost.of_one(len(layers)), kept / len(layers), num_tokens)


def recomputed(layer: nn.Module) -> nn.Module:
    """Make backward recompute the layer."""
    layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    return layer


def selected(layers: list[nn.Module]) -> list[nn.Module]:
    """Make backward recompute the layers selectively."""
    recompute_selectively(layers)
    return layers


def rows(rank: int, dropout: float) -> dict[str, Callable[[], list[nn.Module]]]:
    """Return the layers to be measured, by the name of their row."""
    return {
        "ours": lambda: [our_layer(rank, dropout)],
        "ours, recomputed": lambda: [recomputed(our_layer(rank, dropout))],
        f"ours, selective, of {CHAIN}": lambda: selected([our_layer(rank, dropout) for _ in range(CHAIN)]),
        "ours, dropout 0": lambda: [our_layer(rank, 0.0)],
        "PEFT, float32 adapters": lambda: [peft_layer(rank, dropout, torch.float32)],
        "PEFT, the same, recomputed": lambda: [recomputed(peft_layer(rank, dropout, torch.float32))],
        "PEFT, bfloat16 adapters": lambda: [peft_layer(rank, dropout, torch.bfloat16)],
        "PEFT, bfloat16, dropout 0": lambda: [peft_layer(rank, 0.0, torch.bfloat16)],
    }


def line(name: str, cost: LayerCost) -> str:
    """Return the row of a layer: everything per token but the operators."""
    tokens, (forward, backward) = cost.num_tokens, (cost.forward, cost.backward)
    moved = [part.moved / tokens / 1e6 for part in (forward, backward)]
    numbers = [*moved, sum(moved), (forward.flops + backward.flops) / tokens / 1e9, cost.kept / tokens / 1e3]
    ops = f"{forward.num_ops:.0f} / {backward.num_ops:.0f}"
    return f"{name:<28}{ops:>12}" + "".join(f"{number:>10.3f}" for number in numbers)


def bench(options: argparse.Namespace) -> None:
    if options.rank < 1 or options.tokens < 1 or not 0 <= options.dropout < 1:
        raise ConfigError("--rank and --tokens are positive, --dropout is in [0, 1)")
    print(f"LoRA of rank {options.rank}, dropout {options.dropout}, {options.tokens} tokens; per token: MB, GFLOP, kept kB")
    print(f"{'':<28}{'operators':>12}{'forward':>10}{'backward':>10}{'moved':>10}{'GFLOP':>10}{'kept':>10}")
    for name, build in rows(options.rank, options.dropout).items():
        print(line(name, measure(build(), options.tokens)))


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("bench_layer", __doc__)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch (2048)")
    options = parser.parse_args(argv)
    return run_command("bench_layer", lambda: bench(options))


if __name__ == "__main__":
    raise SystemExit(main())
