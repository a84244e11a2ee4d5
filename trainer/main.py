"""`torchrun --nproc_per_node=N -m trainer.main --cfg run.toml [section.key=value ...]`: the table of contents of a run."""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import logging
import os
import sys
from pathlib import Path

from model.config import ConfigError
from trainer import exits
from trainer.checkpoint import restore, set_aside
from trainer.config import RunConfig
from trainer.distributed import World, start_world, stop_world
from trainer.export import write_final
from trainer.loop import Loop
from trainer.quarantine import NAME as QUARANTINE
from trainer.quarantine import read_rows, start_afresh
from trainer.quick_check import quick_check
from trainer.report import plan
from trainer.resume import choose, read_state
from trainer.runfile import load_config
from trainer.schema import apply_override, read_toml, to_tables, to_toml
from trainer.setup import Setup, build, make_deterministic, resolved
from trainer.sources import certify_all, open_data, with_bases


def run(config: RunConfig, world: World | None = None) -> int:
    """Train as `config` says; returns the exit code. Errors are reported in one line, and in exit.json."""
    rank, folder, progress = int(os.environ.get("RANK", "0")), Path(config.output_dir), exits.Progress()
    try:
        own = world is None
        prepare_folder(folder, world.rank if world else rank)
        world = world or start_world()
        rank = world.rank
        train(resolved(config, world), world, progress)
        if world.is_main:
            exits.record(folder, exits.DONE, "done", progress.step, rank)
        if own:
            stop_world()
        return exits.DONE
    except exits.BusyError as error:
        return exits.report_failure(error, None, None, rank)  # exit.json is the other process's
    except (Exception, KeyboardInterrupt) as error:
        return exits.report_failure(error, folder, progress.step, rank)


def train(config: RunConfig, world: World, progress: exits.Progress) -> None:
    """Data, model, resume, plan, loop, final: in this order, each proven before the next."""
    make_deterministic(config)
    checkpoint, damaged = choose(config, world)
    if world.is_main and not checkpoint:
        start_afresh(Path(config.output_dir))
    data = with_bases(open_data(config, world, first_start=checkpoint is None), world)
    certificates = certify_all(data, config)
    for line in quick_check(data, config, world):
        say(world, f"data      {line}")
    state = read_state(checkpoint, config, data) if checkpoint else None
    if checkpoint and config.train.max_steps == 0:
        raise ConfigError(
            f"train.max_steps = 0 builds a model without training, but {config.output_dir} holds {checkpoint.name}: use another "
            "output_dir; tools load and export from a checkpoint as from final/"
        )
    setup = build(config, data, world)
    first_step = progress.step = state["step"] if state else 0
    if checkpoint and state and setup.trained:
        restore(checkpoint, setup.trained, state["optimizer_steps"])
    if world.is_main:
        if config.checkpoint.resume not in ("auto", "none"):
            damaged += set_aside(Path(config.output_dir), first_step)
        exits.replace_text(Path(config.output_dir, "run.toml"), to_toml(to_tables(config)))
        print(plan(setup, certificates, checkpoint, damaged), flush=True)
    if setup.trained and first_step < setup.total_steps:
        Loop(setup, first_step, state["meter"] if state else None, progress).run()
    finish(setup, first_step, world)


def finish(setup: Setup, first_step: int, world: World) -> None:
    """Write final/, unless an earlier start of this run has and nothing was trained since."""
    folder = Path(setup.config.output_dir)
    step = max(first_step, setup.total_steps)
    if world.broadcast_json(first_step > 0 and first_step >= setup.total_steps and final_step(folder) == first_step):
        say(world, f"nothing left to do: {folder / 'final'} holds step {first_step}, the run asks for {setup.total_steps}")
        return
    target = write_final(setup.model, setup.data.card, setup.data.processor, folder, step, world)
    if num_left_out := len(read_rows(folder)):
        say(world, f"{num_left_out} records could not be used: {folder / QUARANTINE} says why")
    say(world, f"wrote and proved {target}")


def final_step(folder: Path) -> int | None:
    """The step that final/ holds."""
    path = folder / "final" / "provenance.json"
    return json.loads(path.read_text())["step"] if path.is_file() else None


def prepare_folder(folder: Path, rank: int) -> None:
    """Make the run folder and forget how the last start ended, before anything can fail that must be told there."""
    if rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock(folder)
            exits.clear(folder)
        except BlockingIOError as error:
            raise exits.BusyError(f"output_dir = {str(folder)!r}: another process trains into it; use another one") from error
        except OSError as error:
            raise exits.SaveError(f"output_dir = {str(folder)!r} cannot be written: {error.strerror}") from error
        if (folder / "final").exists() and not (folder / "final").is_dir():
            raise exits.SaveError(f"{folder / 'final'} is in the way: final/ will be a folder; remove it")


def lock(folder: Path) -> None:
    """Keep other processes out of the run folder until this one ends, however it does. BlockingIOError when one is in it.

    A record lock: forked data workers do not inherit it, so the next start need not wait for them. Where the file system knows
    no locks there is none.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)  # stays open: closing it would unlock
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError from error


def say(world: World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainer.main", description="Train a multimodal model as a run.toml describes it.")
    parser.add_argument("--cfg", required=True, help="the run file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # Many ranks and workers share a machine; the tokenizer's own threads would fight them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        config = load_config(arguments.cfg, arguments.overrides)
    except Exception as error:
        # Every rank reads the same file and finds the same: one of them tells.
        if int(os.environ.get("RANK", "0")) == 0:
            if folder := named_folder(arguments.cfg, arguments.overrides):
                exits.clear(folder)
            exits.report_failure(error, folder, None, 0)
        return exits.code_of(error)
    return run(config)


def named_folder(path: str, overrides: list[str]) -> Path | None:
    """output_dir of a run file that is wrong elsewhere, so that exit.json can tell; None where it names none."""
    try:
        tables = read_toml(path)
        for text in overrides:
            apply_override(tables, text)
        folder = Path(tables["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except (ConfigError, KeyError, TypeError, OSError):
        return None


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: a failed rank must leave at once, while its peers may still hang in a collective with it.
    os._exit(code)
