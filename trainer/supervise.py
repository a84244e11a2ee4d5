"""Supervision of a run: one lock, one watchdog, one exit report. A reader who looks for the training can skip this file."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from model.errors import ConfigError
from trainer import errors
from trainer.config import RunConfig
from trainer.distributed.rank_consistency import check_same_settings
from trainer.distributed.world import World, die_with_parent, start_world, stop_world
from trainer.errors import INTERNAL, SaveError, code_of
from trainer.faults import exit_report, signals
from trainer.faults.exit_report import INTERRUPT, RunEnd, RunStatus, write_exit_report
from trainer.faults.requests import OF_ANOTHER
from trainer.faults.watchdog import Watchdog
from trainer.machine.atomic_files import make_folder
from trainer.machine.folder_lock import FolderLock
from trainer.machine.open_files import explain_open_files, raise_limit
from trainer.machine.run_folder import check_folder, check_names
from trainer.runfile.toml_files import apply_override, read_toml
from trainer.setup import resolve_config

REFUSE_SECONDS = 10.0
"""Patience of the other ranks with the report of rank 0 about a wrong run file."""
Train = Callable[[RunConfig, World, RunStatus], None]


def run_supervised(train: Train, config: RunConfig, world: World | None = None) -> int:
    """Call `train` as `config` says and return the exit code. An error is reported by one rank, and in exit.json."""
    rank, folder, status = int(os.environ.get("RANK", "0")), Path(config.output_dir), RunStatus()
    lock: FolderLock | None = None
    raise_limit()
    if world is None:
        die_with_parent()  # before anything is held that the next start has to wait for
    try:
        rank = world.rank if world else rank
        signals.check_restart(folder)
        lock = hold(folder) if rank == 0 else None
        if lock is not None:
            check_names(folder)
        with signals.listening(folder, rank, status, config.faults.grace_seconds):
            return run_watched(train, config, world, status, lock)
    except (Exception, KeyboardInterrupt) as error:
        # What rank 0 does not hold is another run's, which would take exit.json for the word of a rank of its own.
        return report_failure(error, folder if lock or rank else None, status.step, rank)
    finally:
        if lock is not None:
            lock.release()


def run_watched(train: Train, config: RunConfig, world: World | None, status: RunStatus, lock: FolderLock | None) -> int:
    """Connect the ranks, watch them while they train, and return the exit code. Collective."""
    own, folder = world is None, Path(config.output_dir)
    world = world or start_world()
    status.has_met = True
    watchdog = Watchdog(status.tracker, world, folder, config.faults.stall_seconds, lock).start()
    code = errors.DONE
    try:
        config = resolve_config(config, world)
        check_same_settings(config, world)
        train(config, world, status)
        if world.is_main:
            exit_report.record_exit(folder, RunEnd(errors.DONE, "done", status.step, world.rank))
    except (Exception, KeyboardInterrupt) as error:
        code = report_end(error, folder, status, world.rank, watchdog)
    finally:
        watchdog.stop()
    if own and (code == errors.DONE or world.size == 1):  # after a failure peers may stand in a collective, and it would wait
        stop_world()
    return code


def report_end(error: BaseException, folder: Path, status: RunStatus, rank: int, watchdog: Watchdog) -> int:
    """Report why a run failed and return its exit code."""
    # Torch interrupts the main thread, wherever it is, to say that a data worker died: not while the report is written.
    is_main_thread = threading.current_thread() is threading.main_thread()
    try:
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if is_main_thread else None
    except RuntimeError as later:
        before, error = None, later
    try:
        return report_failure(status.tracker.explained(error), folder, status.step, rank, watchdog)
    finally:
        watchdog.stop()
        if before is not None:
            signal.signal(signal.SIGCHLD, before)


def report_failure(
    error: BaseException, output_dir: Path | None, step: int | None, rank: int, watchdog: Watchdog | None = None
) -> int:
    """Report once what went wrong, on the rank that found out. Return the exit code; with a `watchdog`, that of all ranks."""
    error = explain_open_files(error)
    code = code_of(error)
    reason = INTERRUPT if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
    shown = error if code == INTERNAL else None
    if watchdog is None:
        write_exit_report(output_dir, RunEnd(code, reason, step, rank), error=shown)
        return code
    found = watchdog.agree_on_failure(error, code, reason)
    speaks, is_own = found.by == rank, found.by == found.culprit == rank
    if not speaks or OF_ANOTHER in found.reason:
        time.sleep(0.5)  # the rank that found out, or was asked, reports, unless it has died since
    end = RunEnd(found.code, found.reason, step if is_own else found.step, found.culprit)
    write_exit_report(output_dir, end, speaks=speaks, error=shown if is_own else None)
    return found.code


def hold(folder: Path, *, waits: bool = True) -> FolderLock:
    """Make and lock the run folder, and forget how the last start ended, before anything can fail that must be reported there.

    For rank 0. `waits`: wait for a run that is dying. Raises SaveError when the folder cannot be written.
    """
    check_folder(folder)
    lock: FolderLock | None = None
    try:
        make_folder(folder)
        lock = FolderLock(folder, waits=waits)
        (folder / exit_report.NAME).unlink(missing_ok=True)
        return lock
    except OSError as error:
        if lock is not None:
            lock.release()
        where = f" ({error.filename})" if error.filename and str(error.filename) != str(folder) else ""
        raise SaveError(f"output_dir = {str(folder)!r} cannot be written: {error.strerror}{where}") from error


def report_refusal(error: Exception, run_file: str, overrides: list[str]) -> None:
    """Report what is wrong with a run file, in exit.json too unless another process trains into the folder that it names.

    Every rank finds the same, and rank 0 reports; the others wait for it, because torchrun ends all ranks as soon as one leaves.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        exit_report.write_error_file(RunEnd(code_of(error), str(error), None, 0), is_first=False)
        time.sleep(REFUSE_SECONDS)
        return
    folder, lock = named_folder(run_file, overrides), None
    try:
        lock = hold(folder, waits=False) if folder else None
    except SaveError:
        folder = None
    report_failure(error, folder, None, 0)
    if lock is not None:
        lock.release()


def named_folder(run_file: str, overrides: list[str]) -> Path | None:
    """Return output_dir of a run file that is wrong elsewhere, so that exit.json can tell; None where it names none."""
    try:
        tables = read_toml(run_file)
        for text in overrides:
            apply_override(tables, text)
        return Path(tables["output_dir"])
    except (ConfigError, KeyError, TypeError, OSError):
        return None
