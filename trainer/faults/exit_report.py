"""Exit report of a run: one line for people, exit.json for programs, an exit code for the shell."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.records.fields import message, printable
from model.files.tensor_files import dump_json
from trainer.errors import INTERNAL, code_of
from trainer.faults.phase_tracker import PhaseTracker
from trainer.faults.requests import Requests
from trainer.machine.atomic_files import NEW
from trainer.machine.open_files import explained

if TYPE_CHECKING:
    from trainer.faults.watchdog import Watchdog

NAME = "exit.json"
INTERRUPT = "interrupted; the same command goes on from the last checkpoint"


@dataclass
class RunStatus:
    """Live state of a run for its exit report: completed steps, pending requests, current phase."""

    step: int | None = None
    has_met: bool = False  # this rank has joined the others, and so the rank that holds the run folder
    steering: Requests = field(default_factory=Requests)
    watch: PhaseTracker = field(default_factory=PhaseTracker)


def clear(output_dir: Path) -> None:
    """Remove the exit report of the previous start."""
    (output_dir / NAME).unlink(missing_ok=True)


def record(output_dir: Path | None, code: int, reason: str, step: int | None, rank: int, *, speaks: bool | None = None) -> bool:
    """Write exit.json unless another rank was first; return whether this rank prints the message.

    Where the file cannot be written, the rank that `speaks` prints it, by default rank 0.
    """
    speaks, reason = rank == 0 if speaks is None else speaks, message(reason)
    if output_dir is None:
        return speaks
    launch = {"launch": os.environ["TORCHELASTIC_RUN_ID"]} if "TORCHELASTIC_RUN_ID" in os.environ else {}
    value: dict[str, Any] = {"code": code, "reason": reason, "step": step, "rank": rank, **launch}
    temporary = output_dir / f".{NAME}-{rank}-{threading.get_ident()}{NEW}"
    try:
        temporary.write_text(dump_json(value))  # written first: on a full disk no rank claims the report
        (output_dir / NAME).open("x").close()  # fails when the file exists: the first reason is the true one
        temporary.replace(output_dir / NAME)
        return True
    except FileExistsError:
        return False
    except OSError:
        return speaks
    finally:
        with suppress(OSError):
            temporary.unlink()


def read_exit_report(output_dir: Path) -> dict[str, Any] | None:
    """Return the exit report that a rank of this start has written; None when there is no readable one."""
    try:
        found: dict[str, Any] = json.loads((output_dir / NAME).read_text())
        return found if {"code", "reason", "step", "rank"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def write_exit_report(
    output_dir: Path | None,
    code: int,
    reason: str,
    step: int | None,
    rank: int,
    speaks: bool | None = None,
    error: BaseException | None = None,
) -> None:
    """Write exit.json and print one line for people, on the rank that is the first to report; `rank` is the one to blame.

    With `error`, its traceback is printed as well.
    """
    if record(output_dir, code, reason, step, rank, speaks=speaks):
        if error is not None:
            traceback.print_exception(error, file=sys.stderr)
        where = "" if step is None else f" after step {step}"
        line_of_its_own = "" if step is None else "\n"  # the cursor is at the end of a progress bar
        text = f"{line_of_its_own}trainer: rank {rank} stopped{where}: {message(reason)}"
        print(printable(text, keep="\n\t"), file=sys.stderr, flush=True)


def report_failure(
    error: BaseException, output_dir: Path | None, step: int | None, rank: int, guard: Watchdog | None = None
) -> int:
    """Report a failure once for all ranks, on the rank that found it; return the exit code, with `guard` that of all ranks."""
    error = explained(error)
    code = code_of(error)
    reason = INTERRUPT if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
    shown = error if code == INTERNAL else None
    if guard is None:
        write_exit_report(output_dir, code, reason, step, rank, error=shown)
        return code
    found = guard.failed(error, code, reason)
    speaks, is_own = found.by == rank, found.by == found.culprit == rank
    if not speaks:
        time.sleep(0.5)  # the rank that found the failure reports first, unless it has died since
    write_exit_report(
        output_dir, found.code, found.reason, step if is_own else found.step, found.culprit, speaks, shown if is_own else None
    )
    return found.code
