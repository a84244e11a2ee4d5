"""Nothing hangs, at length: every failure ten times, in any phase of any step."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.hangs import check

TIMES = 10
PHASES = ("data", "copy", "count", "forward", "backward", "update")


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "how", ["stopped", "killed", "raising", "sleeping", "worker killed", "worker sleeping", "worker stopped", "worker raising"]
)
def test_all_ranks_leave_whenever_it_happens(parts: Path, tmp_path: Path, how: str, strategy: str) -> None:
    draw = random.Random(f"{how} {strategy}")
    seconds = []
    for i in range(TIMES):
        size = draw.choice((2, 3))
        phase, step = draw.choice(PHASES[1:]), draw.randrange(6)
        seconds.append(check(parts, tmp_path / str(i), strategy, size, draw.randrange(size), how, phase, step))
    print(f"{how} {strategy}: {TIMES} of {TIMES}, {min(seconds):.1f} to {max(seconds):.1f} s")
