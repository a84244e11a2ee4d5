"""Helpers of tests/trainer/test_lock.py that other tests share."""

from __future__ import annotations

import errno
import fcntl
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.ranks import SERVER
from trainer.machine import folder_lock as lock
from trainer.machine.folder_lock import FolderLock

KINDS = ["lock", "lease"]


def no_locks(*args: Any) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def prepare(kind: str) -> None:
    """Shorter times, and the system as `kind` wants it."""
    lock.RELEASE_SECONDS, lock.RENEW_SECONDS, lock.LOOK_SECONDS = 1.0, 0.2, 0.05
    if kind == "lease":
        fcntl.lockf = no_locks


def hold(kind: str, folder: Path, pipe: Connection) -> None:
    prepare(kind)
    held = FolderLock(folder)
    pipe.send("held")
    while pipe.poll(None):  # end of file: the test is over
        if pipe.recv() == "problem?":
            pipe.send(held.problem)


class Holder:
    """Another process that holds a folder."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.pipe, theirs = SERVER.Pipe()
        self.process = SERVER.Process(target=hold, args=(kind, folder, theirs), daemon=True)
        self.process.start()
        assert self.pipe.recv() == "held"

    def signal(self, number: int) -> None:
        os.kill(self.process.pid or 0, number)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
