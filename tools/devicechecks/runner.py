"""Runs the checks in a process of their own, which is replaced where one breaks the device, hangs or dies: the others go on."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch

from model.errors import ConfigError
from tools.devicechecks.outcome import Check, Context, ReportRow, run_check
from trainer.distributed.world import start_world, stop_world

START_SECONDS = 120.0
"""Seconds that a new process may take to import everything and open the device."""


def open_context(device: str, folder: Path, tiny: bool) -> Context:
    """Open the device and a group of this process alone. Raises `ConfigError` where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; --device cpu --tiny runs what can be checked without one")
    world = start_world()
    return Context(replace(world, device=torch.device("cpu")) if device == "cpu" else world, folder, tiny)


def run_here(checks: Iterable[Check], context: Context, until: float, report: Callable[[str, ReportRow | None], None]) -> None:
    """Run the checks one after the other, none that would begin after `until`, in seconds of `time.time`.

    `report` gets the name of each before it and its row after it.
    """
    for check in checks:
        if time.time() < until:
            report(check.name, None)
            outcome = run_check(check, context)
        else:
            late = "no time was left: give --minutes more, or --only NAME"
            outcome = ReportRow(check.name, check.expected, "skipped", late)
        report(check.name, outcome)
        clean_up(context)


def clean_up(context: Context) -> None:
    """Free what a check has left. Raises where the device does not work any more, as after an illegal access."""
    gc.collect()
    if context.on_gpu:
        torch.cuda.synchronize(context.device)
        torch.cuda.empty_cache()


def worker(checks: Sequence[Check], device: str, tiny: bool, until: float, out: TextIO) -> None:
    """Run the checks in this process and write a line of JSON before and after each."""

    def report(name: str, outcome: ReportRow | None) -> None:
        out.write(json.dumps({"name": name, "outcome": None if outcome is None else outcome.to_json()}) + "\n")
        out.flush()

    with tempfile.TemporaryDirectory(prefix="check_device-") as folder:
        context = open_context(device, Path(folder), tiny)
        run_here(checks, context, until, report)
        stop_world()


def run_apart(checks: dict[str, Check], command: list[str], on_outcome: Callable[[ReportRow], None], patience: float = 1.0) -> None:
    """Run the checks in other processes: `command` with names behind it starts one, which writes to the descriptor behind --worker.

    A process that ends too early, or takes longer for a check than it may, costs that check alone. `patience`: factor on all limits
    of time.
    """
    left = dict(checks)
    while left:
        before = len(left)
        done, last = _one_process([*left.values()], command, on_outcome, patience)
        for name in done:
            del left[name]
        if last is not None:
            on_outcome(last)
            del left[last.name]
        if len(left) == before:
            raise RuntimeError("a process of checks has ended without a word")


def _one_process(
    checks: list[Check], command: list[str], on_outcome: Callable[[ReportRow], None], patience: float
) -> tuple[list[str], ReportRow | None]:
    """Run as many checks as one process can; return their names, and the row of the one that broke the process, if one did."""
    read, write = os.pipe()
    names = [word for check in checks for word in ("--only", check.name)]
    process = subprocess.Popen([*command, "--worker", str(write), *names], pass_fds=[write], stdout=sys.stderr)
    os.close(write)
    by_name = {check.name: check for check in checks}
    done, current, began = list[str](), checks[0], time.monotonic()
    deadline = _Deadline(process, patience * (START_SECONDS + current.seconds))
    with os.fdopen(read) as lines:
        for line in lines:
            row = json.loads(line)
            current, began = by_name[row["name"]], time.monotonic()
            if row["outcome"] is None:
                deadline.move(patience * current.seconds)
                continue
            on_outcome(ReportRow(**row["outcome"]))
            done.append(current.name)
            deadline.move(patience * START_SECONDS)
    code = process.wait()
    deadline.end()
    unfinished = [check for check in checks if check.name not in done]
    if not unfinished:
        return done, None
    broken = current if current in unfinished else unfinished[0]
    if current not in unfinished and done:  # it ended between two checks: the device was broken by the one before
        return done, None
    why = f"took more than {patience * broken.seconds:.0f} s" if deadline.passed else f"its process ended with {_ending(code)}"
    return done, ReportRow(broken.name, broken.expected, "failed", why, time.monotonic() - began)


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


class _Deadline:
    """Kills a process that says nothing for too long."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        self.process, self.passed = process, False
        self.timer = threading.Timer(seconds, self._kill)
        self.timer.start()

    def move(self, seconds: float) -> None:
        self.timer.cancel()
        self.timer = threading.Timer(seconds, self._kill)
        self.timer.start()

    def end(self) -> None:
        self.timer.cancel()

    def _kill(self) -> None:
        self.passed = True
        self.process.kill()
