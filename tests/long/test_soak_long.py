"""A run of ten thousand steps, and one of two hundred starts: nothing grows that should not."""

from __future__ import annotations

import gc
import json
import os
import statistics
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.support.ranks import run_ranks
from tests.support.resume import LORA, metrics, weights
from tests.support.runs import Start, start
from trainer import loop
from trainer.distributed.world import World

STEPS, SAMPLES, STARTS = 10_000, 100, 200
MAX_GROWTH = 4 << 20
"""Bytes that the second half of the run may hold more than the first, both by their medians. Curves grow with the log, so some."""

Sample = tuple[int, int, int, int, int]
"""Resident bytes, open files, threads, keys of the store, tensors."""


def sample(store: dist.Store) -> Sample:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    tensors = sum(type(item).__name__ in ("Tensor", "Parameter") for item in gc.get_objects())
    return resident, len(os.listdir("/proc/self/fd")), threading.active_count(), store.num_keys(), tensors


def start_sampled(world: World, parts: Path, output_dir: Path, sections: dict[str, Any]) -> tuple[Start, list[Sample]]:
    """A run and what it held after every hundredth step, right after the step."""
    found: list[Sample] = []
    inner, number = loop.Loop._finish_step, 0

    def due(self: Any, done: int, *args: Any) -> None:
        nonlocal number
        inner(self, done, *args)
        number += 1
        if number % (STEPS // SAMPLES) == 50:  # between two saves
            found.append(sample(world.store))

    loop.Loop._finish_step = due  # type: ignore[method-assign]
    return start(world, parts, output_dir, sections), found


@pytest.mark.long
def test_ten_thousand_steps_hold_no_more_than_five_thousand(parts: Path, tmp_path: Path) -> None:
    held_out = [{"path": str(parts / "train.json"), "media_root": str(parts / "images"), "name": "held_out"}]
    sections = {
        **LORA,
        "train": {"max_steps": STEPS},
        "data": {"workers": 0, "validation": held_out},
        "batch": {"global_batch_size": 2, "micro_batch_size": 1},
        "optim": {"lr": 1e-4},
        "log": {"every": 10},
        "validation": {"every": 500, "max_samples": 4},
        "checkpoint": {"every": 100, "keep": 2},
        "parallel": {"strategy": "ddp"},
    }
    for rank, (begun, samples) in enumerate(run_ranks(start_sampled, 2, parts, tmp_path / "run", sections, seconds=3600)):
        assert begun.code == 0, begun.said
        assert len(samples) == SAMPLES
        early, late = samples[SAMPLES // 10 : SAMPLES // 2], samples[SAMPLES // 2 :]
        resident, files, threads, keys, tensors = halves(early, late)
        print(
            f"\nrank {rank}: bytes {resident}, files {files}, threads {threads}, keys {keys}, tensors {tensors}; first {samples[0]}"
        )
        assert resident[1] - resident[0] < MAX_GROWTH
        assert files[1] <= files[0] and threads[1] <= threads[0]
        assert keys[1] <= keys[0] and tensors[1] <= tensors[0]
    assert logged_steps(tmp_path / "run") == [1, *range(10, STEPS + 1, 10)]


def logged_steps(output_dir: Path) -> list[int]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "train/loss" in line]


def halves(early: list[Sample], late: list[Sample]) -> list[list[float]]:
    """Medians of each figure, early and late."""
    return [[statistics.median(sample[k] for sample in half) for half in (early, late)] for k in range(5)]


def start_often(world: World, parts: Path, output_dir: Path, sections: dict[str, Any], starts: int) -> list[Sample]:
    """One step more at every start, all in one process: what each start leaves behind."""
    found = []
    for steps in range(1, starts + 1):
        begun = start(world, parts, output_dir, {**sections, "train": {"max_steps": steps}})
        assert begun.code == 0, begun.said
        gc.collect()
        found.append(sample(world.store))
    return found


@pytest.mark.long
def test_two_hundred_starts_of_one_run(parts: Path, tmp_path: Path) -> None:
    """Each makes the run one step longer; it ends as one that was never stopped, and the process holds no more than early on."""
    sections = {**LORA, "optim": {"lr": 1e-2, "schedule": "constant", "warmup_ratio": 0.0}, "checkpoint": {"every": 1, "keep": 2}}
    samples = run_ranks(start_often, 1, parts, tmp_path / "often", sections, STARTS, seconds=3600)[0]
    whole = {**sections, "train": {"max_steps": STARTS}}
    assert run_ranks(start, 1, parts, tmp_path / "whole", whole, seconds=3600)[0].code == 0
    assert weights(tmp_path / "often") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "often") == metrics(tmp_path / "whole")
    early, late = samples[20:100], samples[120:]
    resident, files, threads, keys, tensors = halves(early, late)
    print(f"\nstarts: bytes {resident}, files {files}, threads {threads}, keys {keys}, tensors {tensors}")
    assert files[1] <= files[0] and threads[1] <= threads[0] and tensors[1] <= tensors[0]
