"""Measure the loss head: time, peak extra bytes and error of ours, of full logits, and of torch's `F.linear_cross_entropy`.

All get the same supervised rows and return the mean loss with its gradients. Extra bytes are what forward and backward hold at once
beyond their inputs, results included. Errors are of the loss and of the rows' gradient against float64, relative to the largest.
Cases take turns; CPU seconds are medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from model.loss import ChunkedLoss, HeadOptions
from tools.cli import command_parser

TOKENS, WIDTH = 4096, 256
Head = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Hidden rows (S, D), weight (V, D), targets (S,) -> summed loss ()."""


class HeadCost(NamedTuple):
    """HeadCost and errors of one way."""

    seconds: float
    extra_bytes: int
    loss_error: float
    gradient_error: float


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return our loss, in chunks of rows."""
    found: Tensor = ChunkedLoss.apply(hidden, weight, None, targets, HeadOptions())[0]
    return found


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of full logits, which are cast to float32 as transformers does."""
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the loss by torch's operator."""
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum")


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the loss by torch's operator in chunks, as its own options choose them."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def heads() -> dict[str, Head]:
    """Return the ways by name; torch's operator where this torch has it."""
    found: dict[str, Head] = {"ours": ours, "full logits": full_logits}
    if hasattr(F, "linear_cross_entropy"):
        found["fused"] = fused
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            found["fused, chunked"] = chunked
    return found


class Inputs(NamedTuple):
    """One case."""

    hidden: Tensor  # (S, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (S,)

    def run(self, head: Head) -> tuple[Tensor, Tensor]:
        """Return the mean loss () and the gradient of the rows (S, D)."""
        loss = head(self.hidden, self.weight, self.targets) / len(self.targets)
        loss.backward()
        assert self.hidden.grad is not None
        found, self.hidden.grad, self.weight.grad = self.hidden.grad, None, None
        return loss.detach(), found


def make_inputs(vocab: int, rows: int, dtype: torch.dtype, tuned: bool, device: str) -> Inputs:
    """Return hidden rows and a head whose logits have a deviation of about 3, as trained models' do."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, WIDTH, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, WIDTH, device=device) * 3 / WIDTH**0.5).to(dtype).requires_grad_(tuned)
    return Inputs(hidden, weight, torch.randint(0, vocab, (rows,), device=device))


def exact(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the same in float64."""
    hidden, weight = (t.detach().double().requires_grad_(t.requires_grad) for t in (inputs.hidden, inputs.weight))
    return Inputs(hidden, weight, inputs.targets).run(lambda h, w, t: F.cross_entropy(h @ w.T, t, reduction="sum"))


def extra_bytes(action: Callable[[], object], device: str) -> int:
    """Return the most bytes that `action` holds at once beyond what is held before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as seen:
        action()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        seen.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def cost_of_ways(inputs: Inputs, device: str, rounds: int) -> dict[str, HeadCost]:
    """Return what every way costs on `inputs`; they take turns."""
    loss, gradient = exact(inputs)
    ways, seconds = heads(), {name: [] for name in heads()}  # type: dict[str, Head], dict[str, list[float]]
    for i in range(rounds + 1):
        for name, head in ways.items():
            began = time.process_time() if device == "cpu" else time.perf_counter()
            inputs.run(head)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name] += [(time.process_time() if device == "cpu" else time.perf_counter()) - began] * (i > 0)
    found = {}
    for name, head in ways.items():
        mine, rows = inputs.run(head)
        errors = float((mine.double() - loss).abs() / loss), float((rows.double() - gradient).abs().max() / gradient.abs().max())
        found[name] = HeadCost(statistics.median(seconds[name]), extra_bytes(partial(inputs.run, head), device), *errors)
    return found


def print_costs(options: argparse.Namespace) -> None:
    """Print one line per case and way."""
    print(f"{TOKENS:,} tokens, width {WIDTH}, {options.device}, one thread, {platform.machine()}, torch {torch.__version__}")
    print("| vocabulary | supervised | type | head | way | ms | extra MB | ours / it: time | bytes | loss error | gradient error |")
    print("|" + "---|" * 11)
    for vocab in options.vocab:
        for share in (0.16, 1.0):
            for dtype in (torch.float32, torch.bfloat16):
                for tuned in (False, True):
                    inputs = make_inputs(vocab, int(TOKENS * share), dtype, tuned, options.device)
                    found = cost_of_ways(inputs, options.device, options.rounds)
                    case = f"| {vocab:,} | {share:.0%} | {str(dtype).removeprefix('torch.')} | {'tuned' if tuned else 'frozen'} "
                    for name, cost in found.items():
                        ratios = found["ours"].seconds / cost.seconds, found["ours"].extra_bytes / cost.extra_bytes
                        print(
                            f"{case}| {name} | {1e3 * cost.seconds:.0f} | {cost.extra_bytes / 1e6:.1f} | {ratios[0]:.2f} "
                            f"| {ratios[1]:.2f} | {cost.loss_error:.1e} | {cost.gradient_error:.1e} |",
                            flush=True,
                        )


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("bench_head", __doc__)
    parser.add_argument("--vocab", type=int, nargs="+", default=[8000, 32000], help="rows of the head (default 8000 32000)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    torch.set_num_threads(1)
    print_costs(parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
