"""Atomic file operations of a run folder: a crash leaves the old or the new version of a file or folder, never a mixture.

Only this module renames, removes and syncs there. A crash of the process keeps all that was written, in order. A power cut keeps
what was synced and any part of the rest, so every step here is synced before the next one relies on it. An fsync that fails is a
failure: the system forgets what it could not write, and a second fsync would look like success.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from contextlib import suppress
from pathlib import Path

SAVING, PREVIOUS, REMOVING, TRIAL, NEW = ".saving", ".previous", ".removing-", ".trial-", ".new"
LEFTOVER = re.compile(r"\.(.+\.saving(-.*)?|removing-.*|trial-.*|.+\.new)", re.DOTALL)


def sync_file(path: Path) -> None:
    """Wait until the disk has the content of a file, or the names in a folder. Raises OSError when the sync fails."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync names at once and do not support fsync of a folder.
        if error.errno != errno.EINVAL or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def sync_run(folder: Path) -> None:
    """Wait until the disk has the files of a run folder and of its stages, except the files inside checkpoints.

    Called before a checkpoint gets its final name: the files that grow with the run must reach at least to its step.
    """
    for place in places(folder):
        for path in sorted(place.iterdir()):
            # Not .lock: closing any descriptor of it would release this process's lock.
            if not path.name.startswith(".") and path.is_file() and not path.is_symlink():
                with suppress(FileNotFoundError):  # a request file, such as STOP, is removed when the run reads it
                    sync_file(path)
        sync_file(place)


def places(folder: Path) -> list[Path]:
    """Return a run folder and the existing folders of its stages."""
    return [path for path in (folder, *sorted((folder / "stages").glob("*"))) if path.is_dir() and not path.is_symlink()]


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, and wait until the disk has their names."""
    missing = [above for above in (path, *path.parents) if not above.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync_file(made.parent)


def fresh_folder(path: Path) -> None:
    """Create an empty folder at `path`; whatever is there is removed first."""
    remove_folder(path)
    make_folder(path)


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that readers, and a start after a crash, find either the old or the new one."""
    temporary = path.with_name(f".{path.name}{NEW}")
    temporary.write_text(text, encoding="utf-8")
    sync_file(temporary)
    move(temporary, path)


def move(path: Path, target: Path) -> None:
    """Rename within a folder, replacing a file of that name, and wait until the disk has the new name."""
    path.replace(target)
    sync_file(target.parent)


def move_aside(path: Path, target: Path) -> None:
    """Rename a folder; a folder that has the new name already is removed first."""
    remove_folder(target)
    move(path, target)


def put_in_place(temporary: Path, target: Path) -> None:
    """Give a complete folder its final name, replacing one of that name: a start after a crash finds either the old or the new one.

    The disk has it on return. Between the two renames of a replacement no folder has the name: `recover` repairs a crash there.
    """
    for path in (*sorted(temporary.iterdir()), temporary):  # or a machine that stops may leave names without their content
        sync_file(path)
    previous = target.with_name(f".{target.name}{PREVIOUS}")
    if target.exists():
        move_aside(target, previous)
    move(temporary, target)
    remove_folder(previous)


def remove_folder(path: Path) -> None:
    """Remove a folder, or a file or link at that path; nothing is done where there is none.

    It is renamed first: a partly removed folder never has a meaningful name.
    """
    if not os.path.lexists(path):
        return
    if path.name.startswith(REMOVING):
        doomed = path
    else:
        number = 0
        while os.path.lexists(doomed := path.with_name(f"{REMOVING}{path.name.lstrip('.')}-{number}")):
            number += 1
        move(path, doomed)
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()


def recover(folder: Path) -> list[str]:
    """Finish or undo replacements that a crash interrupted; return a line about each, for people."""
    lines = []
    for previous in sorted(folder.glob(f".*{PREVIOUS}")):
        target = previous.with_name(previous.name[1 : -len(PREVIOUS)])
        if target.exists():
            remove_folder(previous)
            lines.append(f"{previous} was replaced by {target.name}; removed")
        else:
            move(previous, target)
            lines.append(f"{target} was about to be replaced; put back")
    return lines


def clean_leftovers(folder: Path) -> list[str]:
    """Remove what an earlier start did not finish writing or removing; return a line about each, for people.

    Only the process that holds the run folder may call it. Raises OSError when something cannot be removed.
    """
    lines = []
    for place in places(folder):
        lines += recover(place)
        for path in sorted(place.iterdir()):
            if is_leftover(path.name):
                remove_folder(path)
                lines.append(f"{path} was not finished; removed")
    return lines


def is_leftover(name: str) -> bool:
    """Return whether a file or folder of this name is one that only an unfinished save or removal leaves."""
    return LEFTOVER.fullmatch(name) is not None
