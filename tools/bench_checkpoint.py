"""Measure what a save costs training: ours, a copy of the same bytes, torch.save, and torch.distributed.checkpoint, in one run.

All methods save the same tensors, in turn, so that a busy machine slows them alike. A stall is the time until the caller gets
control back; the work after that is awaited before the next method begins. CPU is that of the caller's thread within the stall,
which a busy machine changes less. On disk: raw write and ours have called fsync by then, and ours has read the file back.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from model.card import ModelCard
from model.config import LlmConfig, LoraConfig, ModelConfig
from model.llm.causal_lm import VocabularyLayout
from tools.cli import command_parser
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.distributed.world import World, start_world, stop_world
from trainer.optim import Trained

LORA_ROWS = 16
"""Rows of the small tensors: half of the tensors are as small as LoRA's."""
CARD = ModelCard(ModelConfig(LlmConfig("")), LoraConfig(), {}, {}, VocabularyLayout(1, 1))
Timed = tuple[float, float, float]
"""Seconds until control came back, CPU seconds of the caller within them, and seconds until the bytes were on disk."""


class NoProcessor:
    """A stand-in for the processor: there is no tokenizer to save."""

    def save(self, folder: Path) -> None:
        (folder / "processor.json").write_text("{}")


def make_trained(num_bytes: int, width: int = 1024) -> Trained:
    """Return matrices and as many small tensors, with both moments, of `num_bytes` in all."""
    count = max(1, num_bytes // (12 * (width * width + width * LORA_ROWS)))
    shapes = [(width, width), (LORA_ROWS, width)] * count
    parameters = {f"layers.{i}.weight": nn.Parameter(torch.randn(shape)) for i, shape in enumerate(shapes)}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4, fused=True)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return Trained(dict(parameters), optimizer)


def tensors_of(trained: Trained) -> dict[str, Tensor]:
    """Return the tensors that the other methods save: the same as ours."""
    found = {f"weights/{name}": p.detach() for name, p in trained.parameters.items()}
    for name, p in trained.parameters.items():
        found |= {f"{key}/{name}": tensor for key, tensor in trained.optimizer.state[p].items() if key != "step"}
    return found


def savers(trained: Trained, world: World, folder: Path) -> dict[str, Callable[[int], Timed]]:
    """Return, by name, functions that save once more into `folder` and return how long it took."""
    tensors = tensors_of(trained)
    source = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    target = torch.zeros_like(source).fill_(1)
    data = source.numpy().data.cast("B")
    checkpointer = Checkpointer(folder / "ours", 1, world)
    checkpointer.prepare(trained, CARD, NoProcessor())  # type: ignore[arg-type]

    def ours(i: int) -> Timed:
        checkpointer.expect()  # as the loop does before the step that a save follows
        if checkpointer.memory and checkpointer.memory.staging and checkpointer.memory.staging.warming:
            checkpointer.memory.staging.warming.join()
        return time_action(
            lambda: checkpointer.save(i + 1, trained, {}, CARD, NoProcessor()),  # type: ignore[arg-type]
            lambda _: checkpointer.wait(),
        )

    def raw(i: int) -> Timed:
        def write() -> None:
            with (folder / "raw").open("wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())

        return time_action(write)

    def asynchronous(i: int) -> Timed:
        return time_action(lambda: dcp.async_save(tensors, checkpoint_id=str(folder / "async")), lambda future: future.result())

    return {
        "copy": lambda i: time_action(lambda: target.copy_(source)),
        "ours": ours,
        "dcp.async_save": asynchronous,
        "raw write": raw,
        "torch.save": lambda i: time_action(lambda: torch.save(tensors, folder / "torch.pt")),
        "dcp.save": lambda i: time_action(lambda: dcp.save(tensors, checkpoint_id=str(folder / "dcp"))),
    }


def time_action(action: Callable[[], Any], rest: Callable[[Any], Any] = lambda _: None) -> Timed:
    start, cpu = time.perf_counter(), time.thread_time()
    found = action()
    back, cpu = time.perf_counter() - start, time.thread_time() - cpu
    rest(found)
    return back, cpu, time.perf_counter() - start


def compare_savers(trained: Trained, world: World, folder: Path, rounds: int) -> None:
    num_bytes = sum(tensor.nbytes for tensor in tensors_of(trained).values())
    found: dict[str, list[Timed]] = {}
    by_name = savers(trained, world, folder)
    for i in range(rounds + 1):
        for name, save in by_name.items():
            os.sync()  # otherwise the next method pays for what this one left to the system to write
            result = save(i)
            if i:  # the first round makes folders and fills caches
                found.setdefault(name, []).append(result)
    copy, copy_cpu, _ = map(statistics.median, zip(*found["copy"]))
    print(f"{num_bytes / 1e6:,.0f} MB in {len(tensors_of(trained)):,} tensors, {rounds} saves each")
    print(f"{'':<16}{'stall ms':>10}{'worst':>9}{'/ copy':>8}{'worst / copy':>14}{'CPU / copy':>12}{'on disk s':>11}{'MB/s':>8}")
    for name, results in found.items():
        middle, cpu, whole = map(statistics.median, zip(*results))
        worst = max(stall for stall, _, _ in results)
        disk = f"{whole:>11.2f}{num_bytes / whole / 1e6:>8,.0f}" if name != "copy" else ""
        stall = f"{1e3 * middle:>10.1f}{1e3 * worst:>9.1f}{middle / copy:>8.2f}{worst / copy:>14.2f}"
        print(f"{name:<16}{stall}{cpu / copy_cpu:>12.2f}{disk}")


def slow_down(world: World, folder: Path, steps: int, every: int, rounds: int) -> None:
    """Train a small model with saves and without, in turn, and print the difference."""
    torch.manual_seed(0)
    layers = [nn.Linear(512, 512) for _ in range(20)]
    model = nn.Sequential(*(module for layer in layers for module in (layer, nn.GELU())))
    trained = Trained(dict(model.named_parameters()), torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))
    inputs = torch.randn(192, 512)
    checkpointer = Checkpointer(folder / "loop", 1, world)
    checkpointer.prepare(trained, CARD, NoProcessor())  # type: ignore[arg-type]
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    total = 0

    def run(saving: bool) -> tuple[float, float]:
        nonlocal total
        wall, cpu = time.perf_counter(), time.thread_time()
        for _ in range(steps):
            model(inputs).square().mean().backward()
            trained.optimizer.step()
            trained.optimizer.zero_grad()
            checkpointer.check()
            total += 1
            if saving and (total + 1) % every == 0:
                checkpointer.expect()
            if saving and total % every == 0:
                checkpointer.save(total, trained, {}, CARD, NoProcessor())  # type: ignore[arg-type]
        result = time.perf_counter() - wall, time.thread_time() - cpu
        checkpointer.wait()
        return result

    run(True)
    for _ in range(rounds):
        for saving in (False, True):
            found[saving].append(run(saving))
    num_bytes = sum(tensor.nbytes for tensor in tensors_of(trained).values())
    without, with_saves = ([statistics.median(values) for values in zip(*found[saving])] for saving in (False, True))
    print(f"\n{num_bytes / 1e6:,.0f} MB saved every {every} steps of {1e3 * without[0] / steps:.1f} ms, {rounds} x {steps} steps")
    for i, name in enumerate(("wall clock", "CPU of the training thread")):
        print(f"{name:<28}{with_saves[i] / without[i] - 1:>+8.2%}")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("bench_checkpoint", __doc__)
    parser.add_argument("--megabytes", type=int, default=500, help="what is saved, moments included (default 500)")
    parser.add_argument("--saves", type=int, default=20, help="saves of each kind (default 20)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of training with and without saves (default 5)")
    parser.add_argument("--steps", type=int, default=100, help="steps of each (default 100)")
    parser.add_argument("--folder", default=None, help="where to write (default: a temporary folder)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    world = start_world()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {load}, torch {torch.__version__}, one thread, one process")
    try:
        compare_savers(make_trained(arguments.megabytes * 10**6), world, folder, arguments.saves)
        if arguments.rounds:
            slow_down(world, folder, arguments.steps, 50, arguments.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        stop_world()
    return 0


if __name__ == "__main__":
    sys.exit(main())
