"""Runs in which one rank, or one of its data workers, stops going on at a step of choice."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import get_worker_info

from data.dataset import MultimodalDataset
from tests.runs import config_of
from trainer.distributed import World
from trainer.main import run
from trainer.watch import Watch

FOREVER = 1000.0


def fail(how: str) -> None:
    """What goes wrong, in the process that calls it."""
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
    if world.rank == culprit and how.startswith("worker "):
        _spoil_reading(how.removeprefix("worker "), step)
    elif world.rank == culprit:
        _spoil_marks(how, phase, step)
    os._exit(run(config_of(parts, **{**sections, "output_dir": str(output_dir)}), world))


def _spoil_marks(how: str, phase: str, step: int) -> None:
    mark, at = Watch.mark, Watch.at

    def spoilt(original: Callable[..., None]) -> Callable[..., None]:
        def marking(self: Watch, name: str, *rest: Any) -> None:
            original(self, name, *rest)
            if (self.beat.phase, self.beat.step) == (phase, step):
                fail(how)

        return marking

    Watch.mark, Watch.at = spoilt(mark), spoilt(at)  # type: ignore[method-assign]


def _spoil_reading(how: str, number: int) -> None:
    original, numbers = MultimodalDataset.__getitem__, itertools.count()

    def reading(self: MultimodalDataset, i: int) -> Any:
        if get_worker_info() is not None and next(numbers) == number:
            fail(how)
        return original(self, i)

    MultimodalDataset.__getitem__ = reading  # type: ignore[method-assign]


def ended(output_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output_dir / "exit.json").read_text())
    return found
