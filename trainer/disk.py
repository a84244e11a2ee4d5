"""Changes of files that a crash finds either not begun or done, and that the disk has before anything is said of them."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path


def put_in_place(temporary: Path, target: Path) -> None:
    """Rename a complete folder, in place of one that may be there: a reader finds either the old or the new one."""
    sync_to_disk(temporary)
    previous = target.with_name(".final.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if target.exists():
        target.rename(previous)
    temporary.rename(target)
    shutil.rmtree(previous, ignore_errors=True)


def fresh_folder(path: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(path)
    path.mkdir(parents=True)


def sync_to_disk(folder: Path) -> None:
    """Until the disk has it, a machine that stops may leave a folder with its name and without its content."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
