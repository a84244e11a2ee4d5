"""Hostile bytes: nothing but the errors that people are meant to see comes out, in bounded memory, and nothing is waited for."""

from __future__ import annotations

import random
import resource
import signal
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fuzz_targets import TARGETS, quick_disk
from tests.support.mutations import mutated
from tests.support.ranks import run_ranks
from trainer.distributed.world import World

ROOM = 512 << 20
"""Bytes that a case may take beyond what the process has."""
PATIENCE = 60
"""Seconds after which a case counts as one that never ends; the machine may be slow."""
QUICK = {"examples": 4, "batch": 5}
LONG_CASES = {
    **{"run file": 20_000, "overrides": 20_000, "json lines": 8_000, "json array": 8_000, "tar": 8_000, "parquet": 3_000},
    **{"index": 10_000, "measurements": 20_000, "pictures": 20_000, "sounds": 12_000, "animations": 8_000, "films": 3_000},
    **{"safetensors": 20_000, "bin": 6_000, "manifest": 40_000, "layout": 10_000, "state": 20_000, "config.json": 6_000},
    **{"model.json": 10_000},
}


def bombard(world: World, names: list[str], examples: int, batch: int, seed: int) -> dict[str, Any]:
    """Cases and the longest one in seconds, by target. AssertionError with the bytes of the first case that breaks a law."""
    quick_disk()
    signal.signal(signal.SIGALRM, too_long)
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = bombard_one(name, Path(folder), examples, batch, seed)
    return found


def bombard_one(name: str, folder: Path, examples: int, batch: int, seed: int) -> dict[str, Any]:
    limit_memory(None)
    target = TARGETS[name](folder)
    for good in target.seeds:
        target.run(good)
    limit_memory(ROOM)
    told: dict[str, Any] = {"cases": 0, "slowest": 0.0}

    @settings(max_examples=examples, database=None, deadline=None, derandomize=False)
    @given(st.integers(0, 2**64 - 1))
    def laws(drawn: int) -> None:
        draw = random.Random(drawn ^ seed)
        for _ in range(batch):
            data = mutated(draw, target.seeds, target.words)
            began = time.process_time()
            signal.alarm(PATIENCE)
            try:
                target.run(data)
            except BaseException as error:
                raise AssertionError(f"{name}: {len(data)} bytes {data[:3000]!r}: {traceback.format_exc()[-3000:]}") from error
            finally:
                signal.alarm(0)
            told["cases"] += 1
            told["slowest"] = max(told["slowest"], time.process_time() - began)

    laws()
    return told


def too_long(*_: Any) -> None:
    raise TimeoutError(f"not done in {PATIENCE} s")


def limit_memory(room: int | None) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard if room is None else used + room, hard))


def test_hostile_bytes_end_in_errors_that_are_meant() -> None:
    found = run_ranks(bombard, 1, list(TARGETS), QUICK["examples"], QUICK["batch"], 0, seconds=600)[0]
    assert all(told["cases"] >= QUICK["examples"] for told in found.values())


@pytest.mark.long
@pytest.mark.parametrize("name", list(TARGETS))
def test_many_more_of_them(name: str) -> None:
    batch = 100
    seed = random.SystemRandom().randrange(2**64)
    told = run_ranks(bombard, 1, [name], LONG_CASES[name] // batch, batch, seed, seconds=3600)[0][name]
    print(f"{name}: {told['cases']} cases, the slowest took {told['slowest']:.2f} s of CPU, seed {seed}")
    assert told["cases"] >= LONG_CASES[name] * 0.9
