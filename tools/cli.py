"""Helpers shared by the command lines of the tools: exit codes of failures, and text that is safe to print."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

from data.records import fields
from model.errors import ConfigError
from trainer.errors import INTERNAL, code_of

INTERRUPTED, BROKEN_PIPE = 130, 141


def command_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of the command `python -m tools.NAME`; its help keeps the lines of `description`."""
    shape = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m tools.{name}", description=description, formatter_class=shape)


def run_command(name: str, action: Callable[[], None]) -> int:
    """Run `action` and return its exit code: 0, or the `exit_code` of its error, which becomes one line on stderr.

    An error without such a code is a mistake of the program, not of its user, and keeps its traceback.
    """
    try:
        action()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes the rest of stdout when it exits
        return BROKEN_PIPE
    except Exception as error:
        if (code := code_of(error)) == INTERNAL:
            raise
        print(f"{name}: {printable_lines(fields.bound_message(str(error)))}", file=sys.stderr)
        return code
    return 0


def check_positive(options: argparse.Namespace, *names: str) -> None:
    """Raise `ConfigError` for the first of some options that is less than 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)} is not positive")


def printable_lines(text: str) -> str:
    """Return the text made safe for a terminal, with its line breaks: records and models could hold control sequences."""
    return fields.printable(text, keep="\n\t")


def check_named(option: str, path: str | Path | None, is_folder: bool = False) -> None:
    """Raise `ConfigError` for a file or folder, named by an option, that cannot be written: before the work, not behind it.

    Nothing is touched. None or "": the option is not given. A folder may lack the ones above it, a file may not.
    """
    if not path:
        return
    path = Path(path)
    at = path if path.exists() else path.parent
    while is_folder and not at.exists():
        at = at.parent
    if path.exists() and path.is_dir() != is_folder:
        why = errno.ENOTDIR if is_folder else errno.EISDIR
    elif not path.exists() and not at.is_dir():
        why = errno.ENOTDIR if at.exists() else errno.ENOENT
    elif not os.access(at, os.W_OK):
        why = errno.EACCES
    else:
        return
    raise ConfigError(f"{option} {str(path)!r} cannot be written: {os.strerror(why)}")


def write_named(option: str, path: str | Path, text: str) -> None:
    """Write a file that an option names. Raises `ConfigError` when it cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option} {str(path)!r} cannot be written: {error.strerror}") from error
