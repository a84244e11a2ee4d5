"""Law 8 at any instant: SIGKILL, whatever the run is doing, costs steps and no more; nothing complete is ever damaged by it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.kill_long import STAGES, sections_of
from tests.support.kills import FSYNC, INSTANT, Point, difference, ending_of, start_and_kill, start_observed
from tests.support.ranks import run_ranks
from tests.support.resume import LORA
from tests.support.runs import merged
from tests.support.torchrun import ROOT, command, wait_until_gone, workers

KILLS, LAUNCHER_KILLS = 25, 20
PHASES = {"start", "index", "load", "data", "copy", "count", "forward", "backward", "update", "log", "save", "final", FSYNC}
"""At least these are seen in every run; others, as validation, where there is some."""
ACCUMULATED = {"batch": {"micro_batch_size": 1}}
PACKED = {"data": {"packing": True, "max_length": 64}, "batch": {"micro_batch_size": None, "micro_batch_tokens": 64}}
VALIDATED = {"validation": {"every": 2}}
RARE = {"checkpoint": {"every": 3, "keep": 1}, "log": {"every": 2}}
CASES: dict[str, tuple[int, str, int, dict[str, Any]]] = {
    "one process": (1, "ddp", 0, merged(LORA, VALIDATED)),
    "ddp, lora dropout": (2, "ddp", 0, LORA),
    "fsdp, lora dropout, workers, validation": (2, "fsdp", 2, merged(LORA, VALIDATED)),
    "ddp, accumulation, workers": (2, "ddp", 2, ACCUMULATED),
    "fsdp, accumulation": (2, "fsdp", 0, ACCUMULATED),
    "ddp, packing, workers": (2, "ddp", 2, merged(LORA, PACKED)),
    "fsdp, packing, validation": (2, "fsdp", 0, merged(PACKED, VALIDATED)),
    "ddp, stages, workers": (2, "ddp", 2, STAGES),
    "fsdp, stages": (2, "fsdp", 0, STAGES),
    "ddp on three, accumulation": (3, "ddp", 0, merged(LORA, ACCUMULATED)),
    "hsdp on four": (4, "hsdp", 0, LORA),
    "fsdp, a checkpoint every third step": (2, "fsdp", 2, merged(LORA, RARE)),
}


def points(draw: random.Random, visits: list[dict[str, int]]) -> Iterator[Point | None]:
    """Every phase once, in any order, then phases and instants in turn; None is an instant."""
    phases = sorted({phase for rank in visits for phase in rank})
    for phase in draw.sample(phases, len(phases)):
        yield drawn(draw, visits, phase)
    while True:
        yield None
        yield drawn(draw, visits, draw.choice(phases))


def drawn(draw: random.Random, visits: list[dict[str, int]], phase: str) -> Point:
    rank = draw.choice([rank for rank, found in enumerate(visits) if phase in found])
    return Point(rank, phase, draw.randint(1, (visits[rank][phase] + 1) // 2))


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_killed_anywhere_it_ends_with_the_same_bytes(parts: Path, tmp_path: Path, case: str) -> None:
    """Ranks die in every phase and at any instant, time and again in the same run, over as many runs as come to their end."""
    size, strategy, num_workers, changes = CASES[case]
    sections = sections_of(parts, tmp_path, strategy, num_workers, changes)
    draw = random.Random(case)
    whole = tmp_path / "whole"
    began = time.monotonic()
    answers = run_ranks(start_observed, size, parts, whole, sections, None, seconds=300)
    seconds = time.monotonic() - began
    assert {begun.code for begun, _ in answers} == {0}, answers[0][0].said
    expected, visits = ending_of(whole), [found for _, found in answers]
    assert visits[0].keys() >= PHASES and ("validation" in visits[0]) == ("validation" in changes)
    killed: Counter[str] = Counter()
    number, plan = 1, points(draw, visits)
    point = next(plan)
    while sum(killed.values()) < KILLS:
        found = start_and_kill(size, parts, tmp_path / f"run{number}", sections, point, after=draw.uniform(0, seconds))
        if found is None:
            killed[point.phase if point else INSTANT] += 1
            point = next(plan)
            continue
        check_ending(tmp_path / f"run{number}", found, expected)
        number += 1  # the same point again, from the beginning
    found = start_and_kill(size, parts, tmp_path / f"run{number}", sections, Point(0, "", 0), 0)
    check_ending(tmp_path / f"run{number}", found, expected)
    assert killed.keys() >= {phase for rank in visits for phase in rank}
    print(f"\n{case}: {sum(killed.values())} kills in {number} runs that ended alike: {dict(killed)}")


def check_ending(output_dir: Path, answers: Any, expected: dict[str, Any]) -> None:
    assert {begun.code for begun, _ in answers} == {0}, answers[0][0].said
    assert difference(ending_of(output_dir), expected) == []


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_killed_under_torchrun_it_ends_with_the_same_bytes(parts: Path, tmp_path: Path, strategy: str) -> None:
    """The launcher, a rank or everything at any instant; the same command again, and torchrun's own restarts in between."""
    sections = {**sections_of(parts, tmp_path, strategy, 1, LORA), "log": {"every": 1}}
    whole = tmp_path / "whole"
    began = time.monotonic()
    assert launch(parts, whole, sections).wait(300) == 0
    seconds = time.monotonic() - began
    expected = ending_of(whole)
    draw, kills, number = random.Random(strategy), 0, 1
    killed: Counter[str] = Counter()
    while kills < LAUNCHER_KILLS // 2:
        folder = tmp_path / f"run{number}"
        launcher = launch(parts, folder, sections)
        try:
            launcher.wait(draw.uniform(0.1 * seconds, seconds))
        except subprocess.TimeoutExpired:
            kills += 1
            victim = draw.choice(["launcher", "rank", "all"])
            killed[victim] += 1
            kill(launcher, folder, victim, draw)
        if launcher.wait(300) == 0:
            assert difference(ending_of(folder), expected) == []
            number += 1
        wait_until_gone(folder, 60)  # a rank that was still importing ends when it comes to look
    assert launch(parts, tmp_path / f"run{number}", sections).wait(300) == 0
    assert difference(ending_of(tmp_path / f"run{number}"), expected) == []
    print(f"\ntorchrun, {strategy}: {kills} kills in {number} runs that ended alike: {dict(killed)}")


def launch(parts: Path, output_dir: Path, sections: dict[str, Any]) -> subprocess.Popen[bytes]:
    line = command(parts, output_dir, **sections)
    line.insert(line.index("-m", 4), "--max-restarts=1")
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill(launcher: subprocess.Popen[bytes], output_dir: Path, victim: str, draw: random.Random) -> None:
    ranks = [pid for pid in workers(output_dir) if pid != launcher.pid]
    chosen = {"launcher": [launcher.pid], "rank": draw.sample(ranks, min(1, len(ranks))), "all": [launcher.pid, *ranks]}[victim]
    for pid in chosen:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
