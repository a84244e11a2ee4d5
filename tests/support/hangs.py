"""Runs in which one rank, or one of its data workers, stops going on at a step of choice."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import get_worker_info

from data.dataset import MultimodalDataset
from tests.support.ranks import ends_of
from tests.support.runs import config_of
from trainer.distributed.world import World
from trainer.faults.phase_tracker import PhaseTracker
from trainer.main import run

FOREVER = 1000.0
STALL_SECONDS = 2.0
FAILED = "failed"  # in the run folder: when it happened


def fail(how: str, output_dir: Path) -> None:
    """What goes wrong, in the process that calls it."""
    output_dir.joinpath(FAILED).write_text(str(time.time()))
    if how == "raising":
        raise RuntimeError("a bug")
    if how == "sleeping":
        time.sleep(FOREVER)
    os.kill(os.getpid(), {"stopped": signal.SIGSTOP, "killed": signal.SIGKILL}[how])


def start_failing(world: World, parts: Path, output_dir: Path, sections: dict[str, Any], culprit: int, *when: Any) -> int:
    """A run whose rank `culprit` fails as `how` says when it begins `phase` of the step after `step` completed ones; `how` may
    be that of its data workers: then they fail while they read their sample number `step`, counted from 0, and `phase` is none.
    """
    how, phase, step = when
    os.setsid()  # what it leaves behind is found by its session
    if world.rank == culprit and how.startswith("worker "):
        _spoil_reading(how.removeprefix("worker "), output_dir, step)
    elif world.rank == culprit:
        _spoil_marks(how, output_dir, phase, step)
    os._exit(run(config_of(parts, **{**sections, "output_dir": str(output_dir)}), world))


def _spoil_marks(how: str, output_dir: Path, phase: str, step: int) -> None:
    mark, at, numbers = PhaseTracker.mark, PhaseTracker.begin, itertools.count()

    def spoilt(original: Callable[..., None]) -> Callable[..., None]:
        def marking(self: PhaseTracker, name: str, *rest: Any) -> None:
            original(self, name, *rest)
            if (self.beat.phase, self.beat.step) == (phase, step) and next(numbers) == 0:  # once: it may be woken
                fail(how, output_dir)

        return marking

    PhaseTracker.mark, PhaseTracker.begin = spoilt(mark), spoilt(at)  # type: ignore[method-assign]


def _spoil_reading(how: str, output_dir: Path, number: int) -> None:
    original, numbers = MultimodalDataset.__getitem__, itertools.count()

    def reading(self: MultimodalDataset, i: int) -> Any:
        if get_worker_info() is not None and next(numbers) == number:
            fail(how, output_dir)
        return original(self, i)

    MultimodalDataset.__getitem__ = reading  # type: ignore[method-assign]


def check(parts: Path, output_dir: Path, strategy: str, size: int, culprit: int, how: str, phase: str, step: int) -> float:
    """One failure ends all ranks, with one message that names rank, phase, step and samples, with the stacks of all ranks and
    with nobody left. Returns the seconds from the failure to the last rank's end.
    """
    sections: dict[str, Any] = {
        "faults": {"stall_seconds": STALL_SECONDS},
        "parallel": {"strategy": strategy},
        "data": {"workers": int("worker" in how or how == "killed")},
        "train": {"max_steps": 8},
        "optim": {"schedule": "constant", "warmup_steps": 0},
    }
    ends = ends_of(start_failing, size, parts, output_dir, sections, culprit, how, phase, step)
    took = time.time() - float((output_dir / FAILED).read_text())
    told = json.loads((output_dir / "exit.json").read_text())
    dead = {culprit: -signal.SIGKILL} if how == "killed" else {}
    # One that is woken leaves by itself, unless the machine is so busy that it is killed first.
    woken = {culprit: {1, -signal.SIGKILL}} if how == "stopped" else {}
    for rank, code in enumerate(ends.codes):
        assert code in woken.get(rank, {dead.get(rank, 1)}), (rank, code, told)
    assert took < 10.0, told
    assert (told["code"], told["rank"]) == (1, culprit), told
    for word in words_of(how, phase, step):
        assert word in told["reason"], (word, told)
    assert re.search(r"r\d+ \(train.json:\d+\)", told["reason"]), told
    for rank in range(size):
        stacks = (output_dir / "stacks" / f"rank-{rank:05d}.txt").read_text()
        assert ("File" in stacks or rank in dead) and stacks, rank
    end = time.monotonic() + 5.0
    while left := of_sessions(set(ends.pids)):
        assert time.monotonic() < end, f"left behind: {left}"
        time.sleep(0.05)
    return took


def words_of(how: str, phase: str, step: int) -> list[str]:
    where = f"in {phase} of step {step + 1}"
    return {
        "stopped": ["has been stopped (SIGSTOP", where],
        "killed": ["is dead", where],
        "raising": ["RuntimeError: a bug", where],
        "sleeping": ["has made no progress for", where],
        "worker sleeping": ["has made no progress for", "in data of step"],
        "worker killed": ["was killed by SIGKILL while it read r", "out of memory"],
        "worker stopped": ["has made no progress for", "in data of step"],
        "worker raising": ["RuntimeError while r", "a bug"],
    }[how]


def of_sessions(leaders: set[int]) -> list[int]:
    """Processes that live in the sessions of `leaders`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) in leaders and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found
