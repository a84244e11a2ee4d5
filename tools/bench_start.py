"""Measure what a start costs: CPU seconds from the command to the end of step 1, ours by phase, beside Hugging Face's Trainer.

The model and the records are the demo's digits, one process, one thread. Trainer is that of `tools.bench_train`: it trains the same
model as one folder for LlavaForConditionalGeneration. `import torch` alone is the floor of both. Every start is a process of its
own; the three take turns, and medians are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tools.benches.turns import in_turns, run_child
from tools.cli import command_parser, run_command

PHASES = {
    "torch": "import torch",
    "transformers": "import transformers' model classes",
    "modules": "import our own modules",
    "open": "read the run file, join ranks, open, index and certify the data",
    "load": "build and load the model, prove gradients; beside it the look at the data",
    "prepare": "rehearse where memory is in doubt, prove that saving works",
    "step": "the first step",
}
"""What each phase of ours is, in order."""
ENDS = {"load": "open", "heaviest": "load", "data": "prepare"}
"""The phase of PHASES that has ended when the run marks a phase of its own for the first time."""
CASES = ("import torch", "ours", "Trainer")
PREPARE = "prepare"
"""A child that writes what the cases read: the peak of a process counts that of the one it comes from, which so stays small."""


def start_process(case: str, folder: Path) -> dict[str, float]:
    """Start one case in a process of its own; return its CPU seconds, with those of each phase of ours, and seconds and MiB."""
    began = time.monotonic()
    if case == "Trainer":
        options = ("--steps", "1", "--batch", "32", "--device", "cpu")
        figures = json.loads(run_child(case, "tools.benches.contender", case, str(folder), *options))
        found = {"total": figures["start_cpu"], "MiB": figures["peak_mib"]}
    else:
        found = json.loads(run_child(case, "tools.bench_start", "--child", case, "--folder", str(folder)))
    shutil.rmtree(folder / "out", ignore_errors=True)
    return {**found, "seconds": time.monotonic() - began}


class Clock:
    """CPU seconds of this process by phase."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def ended(self, phase: str) -> None:
        """Note that a phase has ended, unless it had ended before."""
        self.spent.setdefault(phase, time.process_time() - sum(self.spent.values()))

    def report(self) -> None:
        """Print everything as JSON and leave the process."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(json.dumps({**self.spent, "total": used.ru_utime + used.ru_stime, "MiB": used.ru_maxrss / 1024}), flush=True)
        os._exit(0)


def run_case(case: str, folder: Path) -> int:
    """Run one case in this process, until the end of its first step."""
    clock = Clock()
    if case == PREPARE:
        from tools.benches.prepare import prepare

        prepare(folder, "digits", 1, "float32")
        return 0
    if case == "ours":
        return start_ours(folder, clock)
    import torch  # noqa: F401  # here: what is measured

    clock.report()
    return 0


def start_ours(folder: Path, clock: Clock) -> int:
    """Train as the command does."""
    import torch  # noqa: F401  # here and below: each phase of importing by itself

    clock.ended("torch")
    from model.deferred_imports import import_transformers

    import_transformers()
    clock.ended("transformers")
    from trainer import loop
    from trainer.faults.phase_tracker import PhaseTracker
    from trainer.main import main
    from trainer.run import train  # noqa: F401  # as `main` imports it

    clock.ended("modules")
    mark, begin, step = PhaseTracker.mark, PhaseTracker.begin, loop.train_step

    def noted(original: Callable[..., None]) -> Callable[..., None]:
        def call(self: PhaseTracker, phase: str, *args: object) -> None:
            if phase in ENDS:
                clock.ended(ENDS[phase])
            original(self, phase, *args)

        return call

    def first(*args: Any, **options: Any) -> None:
        step(*args, **options)
        clock.ended("step")
        clock.report()

    patches = patch.multiple(PhaseTracker, mark=noted(mark), begin=noted(begin))
    with patches, patch.object(loop, "train_step", first):
        return main(["--cfg", str(folder / "digit.toml"), f"output_dir={folder / 'out'}"])


def compare(options: argparse.Namespace) -> None:
    """Write the demo's parts, measure, print one line per phase and the ratio."""
    with tempfile.TemporaryDirectory() as name:
        run_child(PREPARE, "tools.bench_start", "--child", PREPARE, "--folder", name)
        found = in_turns({case: partial(start_process, case, Path(name)) for case in CASES}, options.times)
    medians = {case: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for case, rows in found.items()}
    for key, what in PHASES.items():
        print(f"ours: {what:<75}{medians['ours'][key]:>7.2f}")
    for case, row in medians.items():
        print(f"{case:<14} CPU s {row['total']:6.2f}   s {row['seconds']:6.2f}   MiB {row['MiB']:5.0f}")
    ratios = [a["total"] / b["total"] for a, b in zip(found["ours"], found["Trainer"])]
    print(f"ours / Trainer {statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("bench_start", __doc__)
    parser.add_argument("--times", type=int, default=5, help="starts of each case (default 5)")
    parser.add_argument("--child", choices=(*CASES, PREPARE), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        return run_case(options.child, options.folder)
    return run_command("bench_start", lambda: compare(options))


if __name__ == "__main__":
    raise SystemExit(main())
