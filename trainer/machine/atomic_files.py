"""The only place that renames, removes and syncs in a run folder: what stands there is either not begun or done.

A crash of the process keeps what was written, in order. A power cut keeps what was synced and any part of the rest, so every
step here is synced before the next one relies on it. An fsync that fails is a failure: the system forgets what it could not
write, and asking again would look like success.
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
    """Until the disk has the content of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync names at once and know no fsync of a folder.
        if error.errno != errno.EINVAL or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def sync_to_disk(folder: Path) -> None:
    """Until the disk has a folder of files: without it a machine that stops may leave their names and not their content."""
    for path in sorted(folder.iterdir()):
        sync_file(path)
    sync_file(folder)


def sync_run(folder: Path) -> None:
    """Until the disk has the files of a run folder and of its stages, not what is in its checkpoints.

    Called before a checkpoint gets its name: what was appended up to its step must not be less than it says.
    """
    for place in places(folder):
        for path in sorted(place.iterdir()):
            # Not .lock: closing any descriptor of it would give this process's lock away.
            if not path.name.startswith(".") and path.is_file() and not path.is_symlink():
                with suppress(FileNotFoundError):  # a request, as STOP, is taken away when it is heard
                    sync_file(path)
        sync_file(place)


def places(folder: Path) -> list[Path]:
    """A run folder and those of its stages that are there."""
    return [path for path in (folder, *sorted((folder / "stages").glob("*"))) if path.is_dir() and not path.is_symlink()]


def make_folder(path: Path) -> None:
    """Make a folder and those above it, as far as they are missing; the disk has their names."""
    missing = [above for above in (path, *path.parents) if not above.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync_file(made.parent)


def fresh_folder(path: Path) -> None:
    """An empty folder, whatever stood there."""
    remove_folder(path)
    make_folder(path)


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that readers, and a start after a crash, find either the old or the new one."""
    temporary = path.with_name(f".{path.name}{NEW}")
    temporary.write_text(text, encoding="utf-8")
    sync_file(temporary)
    move(temporary, path)


def move(path: Path, target: Path) -> None:
    """Rename within a folder, in place of a file that may be there; the disk has it."""
    path.replace(target)
    sync_file(target.parent)


def move_aside(path: Path, target: Path) -> None:
    """Rename a folder; one that has that name already is removed first."""
    remove_folder(target)
    move(path, target)


def put_in_place(temporary: Path, target: Path) -> None:
    """Give a complete folder its name, in place of one that may have it: a start after a crash finds either the old or the new one.

    When it returns the disk has it. Between the two renames of a replacement nothing has the name: `recover` sees to that.
    """
    sync_to_disk(temporary)
    previous = target.with_name(f".{target.name}{PREVIOUS}")
    if target.exists():
        move_aside(target, previous)
    move(temporary, target)
    remove_folder(previous)


def remove_folder(path: Path) -> None:
    """Remove a folder, or a file or link in its place; nothing is done where there is none.

    It loses its name first: half a folder is never found under a name that means something.
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
    """Finish or undo replacements that a crash cut in two; what was done, for people."""
    told = []
    for previous in sorted(folder.glob(f".*{PREVIOUS}")):
        target = previous.with_name(previous.name[1 : -len(PREVIOUS)])
        if target.exists():
            remove_folder(previous)
            told.append(f"{previous} was replaced by {target.name}; removed")
        else:
            move(previous, target)
            told.append(f"{target} was about to be replaced; put back")
    return told


def clean_leftovers(folder: Path) -> list[str]:
    """Remove what a start before this one has not finished writing or removing; what was found, for people.

    For the one process that holds the run folder. OSError when something cannot be removed.
    """
    told = []
    for place in places(folder):
        told += recover(place)
        for path in sorted(place.iterdir()):
            if is_leftover(path.name):
                remove_folder(path)
                told.append(f"{path} was not finished; removed")
    return told


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is one that only an unfinished save or removal leaves."""
    return LEFTOVER.fullmatch(name) is not None
