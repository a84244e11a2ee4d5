"""Exit report of a run: one line for people, exit.json for programs, an exit code for the shell."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict

from data.records.fields import bound_message, printable
from model.files.tensor_files import dump_json
from trainer.faults.phase_tracker import PhaseTracker
from trainer.faults.requests import Requests
from trainer.machine.atomic_files import NEW

NAME = "exit.json"
INTERRUPT = "interrupted; the same command goes on from the last checkpoint"


class ExitReport(TypedDict):
    """Content of exit.json."""

    code: int
    reason: str
    step: int | None  # completed steps
    rank: int  # the one to blame
    launch: NotRequired[str]  # id of torchrun's launch


@dataclass
class RunStatus:
    """Live state of a run for its exit report: completed steps, pending requests, current phase."""

    step: int | None = None
    has_met: bool = False  # this rank has joined the others, and so the rank that holds the run folder
    requests: Requests = field(default_factory=Requests)
    tracker: PhaseTracker = field(default_factory=PhaseTracker)


@dataclass(frozen=True)
class RunEnd:
    """Reason and step of the end of a run, as exit.json holds them."""

    code: int
    reason: str
    step: int | None  # completed steps of the run
    rank: int  # the rank to blame


def record_exit(output_dir: Path | None, end: RunEnd, *, speaks: bool | None = None) -> bool:
    """Write exit.json unless another rank was first; return whether this rank prints the message.

    Where the file cannot be written, the rank that `speaks` prints it, by default rank 0.
    """
    speaks = end.rank == 0 if speaks is None else speaks
    if output_dir is None:
        return speaks
    launch = {"launch": os.environ["TORCHELASTIC_RUN_ID"]} if "TORCHELASTIC_RUN_ID" in os.environ else {}
    value = {**asdict(end), "reason": bound_message(end.reason), **launch}
    temporary = output_dir / f".{NAME}-{end.rank}-{threading.get_ident()}{NEW}"
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


def read_exit_report(output_dir: Path) -> ExitReport | None:
    """Return the exit report that a rank of this start has written; None when there is no readable one."""
    try:
        found: ExitReport = json.loads((output_dir / NAME).read_text())
        return found if {"code", "reason", "step", "rank"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def write_error_file(end: RunEnd, *, is_first: bool) -> None:
    """Write the file from which torchrun's report takes what a rank said; nothing without torchrun.

    `is_first`: this rank reports for all. The others count as later: torchrun calls the earliest failure the root cause.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    where = "" if end.step is None else f" after step {end.step}"
    text = printable(f"rank {end.rank} stopped{where}: {bound_message(end.reason)}", keep="\n\t")
    if not is_first and str(end.rank) != os.environ.get("RANK"):
        text = f"ended with {text.splitlines()[0]}"
    shown = {"py_callstack": text, "timestamp": str(int(time.time()) + (not is_first))}
    with suppress(OSError):
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": shown}}))


def write_exit_report(
    output_dir: Path | None, end: RunEnd, *, speaks: bool | None = None, error: BaseException | None = None
) -> None:
    """Write exit.json and print one line for people, on the rank that is the first to report.

    With `error`, its traceback is printed as well.
    """
    speaks = record_exit(output_dir, end, speaks=speaks)
    write_error_file(end, is_first=speaks)
    if speaks:
        if error is not None:
            traceback.print_exception(error, file=sys.stderr)
        where = "" if end.step is None else f" after step {end.step}"
        line_of_its_own = "" if end.step is None else "\n"  # the cursor is at the end of a progress bar
        text = f"{line_of_its_own}trainer: rank {end.rank} stopped{where}: {bound_message(end.reason)}"
        print(printable(text, keep="\n\t"), file=sys.stderr, flush=True)
