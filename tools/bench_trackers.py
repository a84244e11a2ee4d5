"""Measure what trackers and the run page cost a step: the same loop with none, and with every tracker that is installed.

Both log every --every steps into metrics.jsonl. "On" adds the norms of parts that the page draws, TensorBoard's event files and
wandb offline. Blocks of on and off take turns on one model; CPU seconds of a step and of logging are medians, those of the
trackers' threads are added, and what wandb's own process takes beside it is told as well.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from model.build import build_model
from model.config import ModelConfig
from tools.bench_step import make_batches, write_demo_model
from tools.cli import command_parser
from trainer.config import LogConfig, OptimConfig, RunConfig, WandbConfig
from trainer.distributed.world import World, start_world
from trainer.metrics import Meter, MetricsLog
from trainer.optim import build_optimizer
from trainer.part_norms import PartNorms
from trainer.step import StepOptions, train_step
from trainer.trackers.open_trackers import Trackers, open_trackers


class LoggedLoop:
    """A loop of steps whose every block ends with a line of the log, by one of two meters and logs: with trackers, and without.

    Two models would lie differently in memory, which costs more than what is measured.
    """

    def __init__(self, config: ModelConfig, folder: Path, world: World, trackers: Trackers) -> None:
        self.model, self.world, self.num_done = build_model(config), world, 0
        self.batches, self.optimizer = make_batches(self.model, 4, 8), build_optimizer(self.model, config, OptimConfig(lr=1e-4))
        self.meters = {"on": Meter(["bench"], world, PartNorms(self.optimizer, world)), "off": Meter(["bench"], world)}
        self.logs = {"on": MetricsLog(folder / "on", 0, world, trackers=trackers), "off": MetricsLog(folder / "off", 0, world)}

    def block(self, side: str, steps: int) -> tuple[float, float]:
        """Run `steps` steps and log; return the CPU seconds of this thread in a step, and in logging."""
        started = time.thread_time()
        for _ in range(steps):
            batch = [self.batches[self.num_done % len(self.batches)]]
            result = train_step(self.model, self.optimizer, batch, self.world, StepOptions(0, self.num_done, 1.0))
            self.meters[side].add(batch, result, 0.0)
            self.num_done += 1
        stepped = time.thread_time()
        self.logs[side].write(self.num_done, self.meters[side].read())
        return (stepped - started) / steps, time.thread_time() - stepped


def elsewhere() -> float:
    """Return the CPU seconds of this process in other threads than this one: those of the trackers."""
    return time.process_time() - time.thread_time()


def wait_for(trackers: Trackers) -> None:
    """Wait until every tracker has taken what it was given."""
    while any(not member.tasks.empty() and not member.is_out for member in trackers.members):
        time.sleep(0.2)


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("bench_trackers", __doc__)
    parser.add_argument("--every", type=int, default=10, help="steps between two lines of the log (default 10)")
    parser.add_argument("--rounds", type=int, default=60, help="blocks of each side, interleaved (default 60)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    world = start_world()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_demo_model(folder)
        wandb = WandbConfig("bench", mode="offline") if find_spec("wandb") else WandbConfig()
        log = LogConfig(tensorboard=find_spec("tensorboard") is not None, wandb=wandb)
        trackers = open_trackers(RunConfig(str(folder / "on"), config, log=log), world, 0)
        for side in ("on", "off"):
            (folder / side).mkdir(exist_ok=True)
        loop = LoggedLoop(config, folder, world, trackers)
        for side in ("on", "off"):
            loop.block(side, options.every)
        wait_for(trackers)
        opening, before = elsewhere(), elsewhere()
        costs: dict[str, list[tuple[float, float]]] = {"on": [], "off": []}
        for number in range(options.rounds):
            for side in ("on", "off") if number % 2 else ("off", "on"):
                costs[side].append(loop.block(side, options.every))
        wait_for(trackers)
        threads = (elsewhere() - before) / options.rounds
        trackers.close()
    names = [member.name.split()[0].rstrip(",") for member in trackers.members]
    print(f"logged every {options.every} steps; trackers: {', '.join(names) or 'none is installed'}")
    report_cost(costs, threads, options.every)
    print(f"opening the trackers: {opening:.1f} CPU s, once, beside training")
    if wandb.project:
        beside = stop_wandb() / loop.num_done
        print(f"wandb's own process: {1e3 * beside:.2f} CPU ms per step beside it, its start and end included")
    return 0


def report_cost(costs: dict[str, list[tuple[float, float]]], threads: float, every: int) -> None:
    """Print medians per step and what is added. `threads`: CPU seconds of the trackers' threads for each line."""
    step = statistics.median(step for side in costs.values() for step, _ in side)
    on, off = (statistics.median(log for _, log in costs[side]) for side in ("on", "off"))
    added = (on - off + threads) / every
    lines = f"off {1e3 * off:.2f}, on {1e3 * on:.2f} and {1e3 * threads:.2f} in threads"
    print(f"CPU ms: a step {1e3 * step:.2f}; a line of the log {lines}")
    print(f"on / off per step: {1 + added / (step + off / every):.4f}")


def stop_wandb() -> float:
    """End wandb's own process and return the CPU seconds that it took."""
    import wandb

    before = os.times()
    wandb.teardown()
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    raise SystemExit(main())
