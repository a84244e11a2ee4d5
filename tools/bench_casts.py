"""Count the bytes of casting masters and gradients per micro-batch: in every forward, or once per update into copies.

One decoder layer of Qwen2-7B's shape, everything tuned, bfloat16 over float32 masters, forward and backward on the meta device:
counts are exact. An operator that changes the number type reads its tensor once and writes its result once; adding to a gradient
is not casting. A step is some micro-batches and one update.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from model.errors import ConfigError
from tools.bench_layer import SHAPE, CostCounter, decoder_layer, recomputed, stand_ins
from tools.cli import command_parser, run_command
from trainer.distributed.casting import cast_for_compute


def full_layer(copies: bool) -> nn.Module:
    """Return a layer on meta with float32 masters that all learn, computing in bfloat16."""
    _, layer = decoder_layer()
    for module in layer.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(p.float())
    cast_for_compute(layer, torch.bfloat16, copies=copies)
    return layer


def cast_bytes(layer: nn.Module, num_micro_batches: int, num_tokens: int) -> float:
    """Return the bytes of casting weights and their gradients per micro-batch of a step, the second one of a run."""
    tensor = functools.partial(torch.empty, device="meta", dtype=torch.bfloat16)
    hidden = tensor(1, num_tokens, SHAPE["hidden_size"]).requires_grad_()
    angles = tuple(tensor(1, num_tokens, SHAPE["hidden_size"] // SHAPE["num_attention_heads"]) for _ in range(2))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, foreach=False)
    moved = 0
    with stand_ins():
        for _ in range(2):
            with CostCounter() as counter:
                for _ in range(num_micro_batches):
                    out = layer(hidden, position_embeddings=angles, attention_mask=None)
                    (out[0] if isinstance(out, tuple) else out).backward(hidden.detach())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            moved = counter.cost.cast
    return moved / num_micro_batches


def count_casts(num_tokens: int) -> None:
    if num_tokens < 1:
        raise ConfigError("--tokens is positive")
    # Norms compute in float32: their casts depend on the tokens, are the same in all rows, and are left out.
    _, plain = decoder_layer()  # without masters: it makes no other casts
    plain.requires_grad_()
    norms = {False: cast_bytes(plain, 1, num_tokens), True: cast_bytes(recomputed(plain), 1, num_tokens)}
    print(f"MB of casting per micro-batch, {num_tokens} tokens; norms, which compute in float32, left out")
    print(f"{'micro-batches':<16}{'recomputed':<13}{'in forward':>12}{'copies':>12}{'ratio':>9}")
    for again in (False, True):
        for count in (1, 2, 4, 8, 16):
            sizes = []
            for copies in (False, True):
                layer = full_layer(copies)
                sizes.append(cast_bytes(recomputed(layer) if again else layer, count, num_tokens) - norms[again])
            inside, copied = sizes
            print(f"{count:<16}{'yes' if again else 'no':<13}{inside / 1e6:>12.1f}{copied / 1e6:>12.1f}{copied / inside:>9.3f}")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("bench_casts", __doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="of a micro-batch (2048)")
    options = parser.parse_args(argv)
    return run_command("bench_casts", lambda: count_casts(options.tokens))


if __name__ == "__main__":
    raise SystemExit(main())
