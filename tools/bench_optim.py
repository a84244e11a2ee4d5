"""Measure an update of every kind of optimizer, beside the classes of torch and bitsandbytes: CPU time and bytes of state.

Matrices are those of a decoder layer (hidden 1024, MLP 4096). CPU time of one thread; all kinds take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.llm.quantize import functional
from tools.cli import command_parser, run_command
from trainer.adamw8bit import AdamW8bit
from trainer.config import OptimConfig
from trainer.muon import Muon
from trainer.optim import clipped_update
from trainer.optim_state import Group
from trainer.sgd import SGD

SHAPES = [(1024, 1024)] * 4 + [(4096, 1024)] * 2 + [(1024, 4096)]
LR = 1e-3

Update = Callable[[], object]
Made = tuple[list[nn.Parameter], torch.optim.Optimizer, Update]


def our_kind(kind: str, build: Callable[[list[Group]], torch.optim.Optimizer]) -> Made:
    """Return parameters, our optimizer over them and its update, clipped."""
    parameters = layer_weights()
    optimizer = build([{"params": parameters, "rule": kind, "lr": LR, "weight_decay": 0.1}])
    return parameters, optimizer, lambda: clipped_update(optimizer, torch.tensor(1.0), 1.0)


def library_class(build: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Made:
    """Return parameters, a library's optimizer over them and its update."""
    parameters = layer_weights()
    optimizer = build(parameters)
    return parameters, optimizer, optimizer.step


def layer_weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape) * 0.02) for shape in SHAPES]


def all_kinds() -> dict[str, Made]:
    """Return every optimizer by its name in the table."""
    functional()  # imports bitsandbytes, or says how to install it
    from bitsandbytes.optim import AdamW8bit as Peer8bit

    return {
        "adamw": our_kind("adamw", lambda groups: torch.optim.AdamW(groups, fused=True)),
        "sgd": our_kind("sgd", lambda groups: SGD(groups, OptimConfig(kind="sgd"))),
        "adamw8bit": our_kind("adamw8bit", lambda groups: AdamW8bit(groups, OptimConfig(kind="adamw8bit"))),
        "bitsandbytes AdamW8bit": library_class(lambda parameters: Peer8bit(parameters, lr=LR)),
        "muon, bfloat16": our_kind("muon", lambda groups: Muon(groups, OptimConfig(kind="muon"), torch.bfloat16)),
        "muon, float32": our_kind("muon", lambda groups: Muon(groups, OptimConfig(kind="muon"), torch.float32)),
        "torch Muon (bfloat16)": library_class(lambda parameters: torch.optim.Muon(parameters, lr=LR)),
    }


def bench_updates(rounds: int) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made, seconds = all_kinds(), dict[str, list[float]]()
    count = sum(a * b for a, b in SHAPES)
    for i in range(rounds + 1):
        for name, (parameters, _, update) in made.items():
            for p in parameters:
                p.grad = torch.randn(p.shape)
            before = time.process_time()
            update()
            if i:  # the first update makes the state
                seconds.setdefault(name, []).append(time.process_time() - before)
    print(f"{count / 1e6:.1f} M numbers in {len(SHAPES)} matrices, {rounds} rounds")
    print(f"{'kind':<24}{'bytes of state per number':>28}{'CPU s per update':>20}{'ns per number':>16}")
    for name, (parameters, optimizer, _) in made.items():
        state = [value for p in parameters for key, value in optimizer.state[p].items() if key not in ("step", "qmap1", "qmap2")]
        size = sum(value.nbytes for value in state if isinstance(value, Tensor)) / count
        took = statistics.median(seconds[name])
        print(f"{name:<24}{size:>28.2f}{took:>20.3f}{took / count * 1e9:>16.1f}")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("bench_optim", __doc__)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measured updates of each (5)")
    options = parser.parse_args(argv)
    return run_command("bench_optim", lambda: bench_updates(options.rounds))


if __name__ == "__main__":
    raise SystemExit(main())
