"""Device checks: name, what each expects, and what it found on a machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from model.files.untrusted import Json
from trainer.distributed.world import World

Figure = float | int | str
Status = Literal["passed", "failed", "skipped"]
MEBI = 2**20


@dataclass(frozen=True)
class Context:
    """The machine that is checked, and how."""

    world: World  # of this process alone; its device is the one that is checked
    folder: Path  # empty at first, for files of the checks
    tiny: bool = False  # small shapes and few steps: a minute on a CPU

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def on_gpu(self) -> bool:
        return self.world.device.type == "cuda"


class Skipped(Exception):
    """A check that cannot run here; its text is the reason."""


@dataclass(frozen=True)
class CheckResult:
    """Result of a check that ran: what it has seen."""

    passed: bool
    seen: str
    figures: dict[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One check. It raises `Skipped` where it cannot run; any other error is a failure."""

    name: str
    expected: str
    run: Callable[[Context], CheckResult]
    seconds: float  # that it may take: it is stopped after them


@dataclass(frozen=True)
class ReportRow:
    """A row of the report."""

    name: str
    expected: str
    status: Status
    seen: str  # what was seen, the first line of the error, or the reason for skipping
    seconds: float = 0.0
    figures: dict[str, Figure] = field(default_factory=dict)

    def to_json(self) -> Json:
        return asdict(self)


def run_check(check: Check, context: Context) -> ReportRow:
    """Run one check and return its row; no error of a check gets out of here, but one that asks this process to end."""
    began = time.monotonic()
    try:
        found = check.run(context)
        status: Status = "passed" if found.passed else "failed"
        seen, figures = found.seen, found.figures
    except Skipped as reason:
        status, seen, figures = "skipped", str(reason), {}
    except Exception as error:
        status, seen, figures = "failed", first_line(error), {}
    return ReportRow(check.name, check.expected, status, seen, time.monotonic() - began, figures)


def first_line(error: BaseException) -> str:
    """Return the type, the first line and the place of an error in this project's code."""
    text = (str(error).strip() or "no message").splitlines()[0]
    root, where, frame = Path(__file__).parents[2], "", error.__traceback__
    while frame is not None:
        path = Path(frame.tb_frame.f_code.co_filename)
        if path.is_relative_to(root) and ".venv" not in path.parts:
            where = f" ({path.relative_to(root)}:{frame.tb_lineno})"
        frame = frame.tb_next
    return f"{type(error).__name__}: {text[:300]}{where}"
