"""Runs that die at a chosen point: in the n-th visit to a phase, in the n-th fsync of any thread, or at an instant."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.ranks import kill_ranks, run_ranks
from tests.support.runs import Start, start
from trainer.distributed.world import World
from trainer.faults.phase_tracker import PhaseTracker

FSYNC = "fsync"
INSTANT = "any instant"
SIDE_FILES = ("ledger.json", "samples.bin", "quarantine.jsonl", "faults.jsonl")


class Point(NamedTuple):
    """Where a rank dies: the `number`-th time, from 1, that it enters `phase`."""

    rank: int
    phase: str
    number: int


def start_observed(
    world: World, parts: Path, output_dir: Path, sections: dict[str, Any], point: Point | None
) -> tuple[Start, dict[str, int]]:
    """A start that dies at `point` if it is this rank's and is reached; else also how often each phase was entered."""
    visits: Counter[str] = Counter()

    def visit(phase: str) -> None:
        visits[phase] += 1
        if point is not None and point == (world.rank, phase, visits[phase]):
            os.kill(os.getpid(), signal.SIGKILL)

    def observed(method: Callable[..., None]) -> Callable[..., None]:
        def call(self: PhaseTracker, *args: Any, **kwargs: Any) -> None:
            method(self, *args, **kwargs)
            visit(self.beat.phase)

        return call

    for name in ("__init__", "mark", "begin"):  # this process is the run's own
        setattr(PhaseTracker, name, observed(getattr(PhaseTracker, name)))
    fsync = os.fsync
    os.fsync = lambda descriptor: (visit(FSYNC), fsync(descriptor))[1]  # type: ignore[assignment,func-returns-value]
    return start(world, parts, output_dir, sections), dict(visits)


def start_and_kill(
    size: int, parts: Path, output_dir: Path, sections: dict[str, Any], point: Point | None, after: float
) -> list[tuple[Start, dict[str, int]]] | None:
    """None when the ranks were killed: one at `point` and the others with it; without a point all of them, `after` seconds."""
    if point is None:
        return kill_ranks(start_observed, size, parts, output_dir, sections, None, after=after, seconds=300)
    try:
        return run_ranks(start_observed, size, parts, output_dir, sections, point, seconds=300)
    except AssertionError as error:
        if str(error) != f"rank {point.rank} died":
            raise
        return None


def ending_of(output_dir: Path) -> dict[str, Any]:
    """All that must be the same whatever happened on the way: finals, weights and moments, curve, quarantine, ledger, exit."""
    found: dict[str, Any] = {}
    for final in sorted(output_dir.rglob("final")):
        found |= {str(p.relative_to(output_dir)): p.read_bytes() for p in final.iterdir() if p.name != "provenance.json"}
    newest = max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    found |= {f"{newest.name}/{path.name}": path.read_bytes() for path in sorted(newest.glob("rank-*"))}
    found["optimizer_steps"] = json.loads((newest / "state.json").read_text())["optimizer_steps"]
    for folder in (output_dir, *sorted(output_dir.glob("stages/*"))):
        for name in SIDE_FILES:
            if (folder / name).exists():
                found[str((folder / name).relative_to(output_dir))] = (folder / name).read_bytes()
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{key: value for key, value in line.items() if not key.startswith(("perf/", "mem/"))} for line in lines]
    found["exit"] = json.loads((output_dir / "exit.json").read_text())["code"]
    found["damaged"] = sorted(path.name for path in output_dir.glob("damaged-*"))
    return found


def difference(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what is not the same in two endings."""
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
