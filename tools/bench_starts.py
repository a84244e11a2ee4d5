"""Measure what one hostile record costs a start: CPU seconds and peak memory until step 1 is done, beside a start without it.

The data are 200 valid records with pictures, the model tiny untrained parts. The hostile record has 50,000 rounds, 20,000 pictures,
60 MiB of text, or all three: each is refused. With --within, records are just small enough to be read: 16,000 rounds, 8,000
pictures, 15 MiB. Every start is a process of its own, and starts of all cases take turns.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image
from transformers.utils import logging

from model.files.untrusted import Json
from tools.benches.turns import in_turns, run_child
from tools.cli import command_parser
from tools.demos.run_files import write_run_file
from tools.make_demo import CORPUS, SIDE, VOCAB, one_round, train_tokenizer, write_parts

NUM_GOOD, NUM_PICTURES = 200, 8
LIMIT = 1.2
"""Most that both ratios may be."""


ASKED = "Which digit is this? "
BEYOND, WITHIN = (50_000, 20_000, 60 << 20), (16_000, 8_000, 15 << 20)
"""Rounds, pictures and bytes of text of a record that is refused, and of one that is read."""


def hostile(num_rounds: int, num_pictures: int, num_bytes: int) -> dict[str, Json]:
    """Return the hostile records, by what they have too much of."""
    rounds = [turn for _ in range(num_rounds) for turn in one_round(ASKED, "seven")]
    names = ["0.png"] * num_pictures
    return {
        "rounds": {"id": "rounds", "conversations": rounds},
        "pictures": {"id": "pictures", "image": names, "conversations": one_round("<image>\n" * num_pictures, "seven")},
        "text": {"id": "text", "conversations": one_round(ASKED * (num_bytes // len(ASKED)), "seven")},
    }


@dataclass(frozen=True)
class Cost:
    """CPU, time and memory of one start until its first step is done."""

    cpu: float  # seconds
    seconds: float
    mib: float  # peak resident memory

    def over(self, other: Cost) -> Cost:
        return Cost(self.cpu / other.cpu, self.seconds / other.seconds, self.mib / other.mib)


def make(folder: Path, chosen: list[str], sizes: tuple[int, int, int]) -> dict[str, Path]:
    """Write parts, pictures and one run file per case."""
    write_parts(folder, train_tokenizer(CORPUS, VOCAB), VOCAB)
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for i in range(NUM_PICTURES):
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
    good = [
        {"id": f"r{i}", "image": f"{i % NUM_PICTURES}.png", "conversations": one_round("<image>\nWhich digit is this?", "seven")}
        for i in range(NUM_GOOD)
    ]
    bad = hostile(*sizes)
    cases = {"none": [], **{name: [bad[name]] for name in chosen}, **({"all": [bad[n] for n in chosen]} if len(chosen) > 1 else {})}
    return {name: _write_case(folder, name, good, records) for name, records in cases.items()}


def _write_case(folder: Path, name: str, good: list[Json], records: list[Json]) -> Path:
    """Write the run file of a case and return its path; the hostile records stand in the middle of the valid ones."""
    half = len(good) // 2
    (folder / f"{name}.json").write_text(json.dumps([*good[:half], *records, *good[half:]]))
    return write_run_file(folder, name, "tools.benches", "starts")


def start(run: Path) -> Cost:
    """Start one run in a process of its own and return its cost. RuntimeError if it does not reach its first step."""
    began = time.perf_counter()
    cpu, mib = map(float, run_child(run.stem, "tools.bench_starts", "--child", str(run)).split())
    seconds = time.perf_counter() - began
    shutil.rmtree(run.parent / "run" / run.stem, ignore_errors=True)
    return Cost(cpu, seconds, mib)


def child(run: str) -> int:
    """Train, and exit after the first step, printing CPU seconds and peak memory."""
    from trainer import loop
    from trainer.main import main

    original: Callable[..., Any] = loop.train_step

    def first(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        used = resource.getrusage(resource.RUSAGE_SELF)
        print(f"{used.ru_utime + used.ru_stime} {used.ru_maxrss / 1024}", flush=True)
        os._exit(0)

    with patch.object(loop, "train_step", first):
        return main(["--cfg", run])


def measure(cases: dict[str, Path], times: int) -> dict[str, Cost]:
    """Return the medians of `times` starts of each case, which take turns."""
    found = in_turns({name: partial(start, run) for name, run in cases.items()}, times)
    return {
        name: Cost(*(statistics.median(values) for values in zip(*((c.cpu, c.seconds, c.mib) for c in costs))))
        for name, costs in found.items()
    }


def report(found: dict[str, Cost]) -> bool:
    """Print one line per case; return whether all are within LIMIT."""
    base, fine = found["none"], True
    print(f"{'hostile record':<16}{'CPU s':>8}{'ratio':>7}{'seconds':>9}{'MiB':>8}{'ratio':>7}")
    for name, cost in found.items():
        ratio = cost.over(base)
        fine &= max(ratio.cpu, ratio.mib) <= LIMIT
        print(f"{name:<16}{cost.cpu:>8.2f}{ratio.cpu:>7.2f}{cost.seconds:>9.2f}{cost.mib:>8.0f}{ratio.mib:>7.2f}")
    print(f"limit of both ratios {LIMIT}: {'kept' if fine else 'NOT KEPT'}")
    return fine


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("bench_starts", __doc__)
    parser.add_argument("--times", type=int, default=3, help="starts of each case (default: 3)")
    parser.add_argument("--only", nargs="+", choices=("rounds", "pictures", "text"), default=["rounds", "pictures", "text"])
    parser.add_argument("--within", action="store_true", help="records that are just small enough to be read")
    parser.add_argument("--child", metavar="RUN", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        return child(options.child)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        return 0 if report(measure(make(Path(folder), options.only, WITHIN if options.within else BEYOND), options.times)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
