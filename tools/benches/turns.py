"""Cases that are measured in turns, round after round, so that a busy machine slows them alike, and processes for them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def in_turns(cases: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Return what each case found in each of `rounds` rounds."""
    found: dict[str, list[T]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            found[name].append(run())
    return found


def cpu_time(action: Callable[[], object]) -> float:
    """Return the CPU seconds that this process takes for `action`."""
    start = time.process_time()
    action()
    return time.process_time() - start


def run_child(case: str, module: str, *words: str) -> str:
    """Run `python -m MODULE WORDS` with one thread; return the last line that it prints. RuntimeError if it fails."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, env={**os.environ, **threads}, text=True, capture_output=True)
    if done.returncode or not done.stdout:
        raise RuntimeError(f"{case}: {done.stderr[-3000:]}")
    return done.stdout.splitlines()[-1]
