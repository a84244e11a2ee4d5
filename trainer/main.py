"""`torchrun --nproc_per_node=N -m trainer.main --cfg run.toml [section.key=value ...]`: the table of contents of a run."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from model.errors import ConfigError
from trainer import errors
from trainer.config import RunConfig
from trainer.distributed.rank_consistency import agree
from trainer.distributed.world import World, die_with_parent, start_world, stop_world
from trainer.faults import exit_report, signals
from trainer.faults.watchdog import Watchdog
from trainer.machine.folder_lock import FolderLock, hold
from trainer.machine.open_files import raise_limit
from trainer.machine.run_folder import check_names
from trainer.run import train
from trainer.runfile.load import load_config
from trainer.runfile.toml_files import apply_override, read_toml, undashed
from trainer.setup import resolved


def run(config: RunConfig, world: World | None = None) -> int:
    """Train as `config` says; returns the exit code. Errors are reported in one line, and in exit.json."""
    rank, folder, progress = int(os.environ.get("RANK", "0")), Path(config.output_dir), exit_report.RunStatus()
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
        with signals.listening(folder, rank, progress, config.faults.grace_seconds):
            return attended(config, world, progress, lock)
    except (Exception, KeyboardInterrupt) as error:
        # What rank 0 does not hold is another run's, which would take exit.json for the word of a rank of its own.
        return exit_report.report_failure(error, folder if lock or rank else None, progress.step, rank)
    finally:
        if lock is not None:
            lock.release()


def attended(config: RunConfig, world: World | None, progress: exit_report.RunStatus, lock: FolderLock | None) -> int:
    """The run once the ranks have met: they look after each other until the last message is said. Returns the exit code."""
    own, folder = world is None, Path(config.output_dir)
    world = world or start_world()
    progress.has_met = True
    guard = Watchdog(progress.watch, world, folder, config.faults.stall_seconds, lock).start()
    code = errors.DONE
    try:
        config = resolved(config, world)
        agree(config, world)
        train(config, world, progress)
        if world.is_main:
            exit_report.record(folder, errors.DONE, "done", progress.step, world.rank)
    except (Exception, KeyboardInterrupt) as error:
        code = ended(error, folder, progress, world.rank, guard)
    finally:
        guard.stop()
    if own and (code == errors.DONE or world.size == 1):  # after a failure peers may stand in a collective, and it would wait
        stop_world()
    return code


def ended(error: BaseException, folder: Path, progress: exit_report.RunStatus, rank: int, guard: Watchdog) -> int:
    """The exit code of a run that failed, once people are told."""
    # Torch interrupts the main thread, wherever it is, to say that a data worker died: not while people are told.
    is_main_thread = threading.current_thread() is threading.main_thread()
    try:
        before = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if is_main_thread else None
    except RuntimeError as later:
        before, error = None, later
    try:
        return exit_report.report_failure(progress.watch.explained(error), folder, progress.step, rank, guard)
    finally:
        guard.stop()
        if before is not None:
            signal.signal(signal.SIGCHLD, before)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainer.main", description="Train a multimodal model as a run.toml describes it.")
    parser.add_argument("--cfg", required=True, help="the run file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file")
    arguments = parser.parse_args(undashed(argv))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Many ranks and workers share a machine; the tokenizer's own threads would fight them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        config = load_config(arguments.cfg, arguments.overrides)
    except Exception as error:
        # Every rank reads the same file and finds the same: one of them tells.
        if int(os.environ.get("RANK", "0")) == 0:
            refuse(error, named_folder(arguments.cfg, arguments.overrides))
        return errors.code_of(error)
    return run(config)


def refuse(error: Exception, folder: Path | None) -> None:
    """Tell what is wrong with a run file, and in exit.json unless another process trains into the folder it names."""
    lock: FolderLock | None = None
    try:
        lock = hold(folder, waits=False) if folder else None
    except errors.SaveError:
        folder = None
    exit_report.report_failure(error, folder, None, 0)
    if lock is not None:
        lock.release()


def named_folder(path: str, overrides: list[str]) -> Path | None:
    """output_dir of a run file that is wrong elsewhere, so that exit.json can tell; None where it names none."""
    try:
        tables = read_toml(path)
        for text in overrides:
            apply_override(tables, text)
        return Path(tables["output_dir"])
    except (ConfigError, KeyError, TypeError, OSError):
        return None


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a failed rank must leave at once, while its peers may still hang in a collective with it.
    os._exit(code)
