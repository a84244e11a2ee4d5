"""An output folder that appears under its name only when it is complete, and a listing of its files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import ConfigError
from trainer.errors import SaveError


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Open a temporary folder beside `out`, renamed to `out` at the end and removed after an error.

    Raises ConfigError when `out` already exists and holds something, SaveError when nothing can be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder: name another one, or remove it")
    temporary = out.absolute().parent / f".{out.name}.{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        raise SaveError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def listing(folder: Path) -> str:
    """List the files with their sizes, one line each."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return "\n".join(f"  {size_text(path.stat().st_size):>10}  {path.relative_to(folder)}" for path in files)


def size_text(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
