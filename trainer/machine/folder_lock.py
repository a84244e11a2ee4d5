"""Lock of a run folder, one process at a time: a lock that ends with its holder, or a lease where the file system has no locks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from trainer.errors import BusyError

LOCK, LEASE = ".lock", ".lease"
RELEASE_SECONDS = 10.0  # a start waits this long for a run that is ending; a lease not renewed for this long is void
RENEW_SECONDS = 2.0
LOOK_SECONDS = 0.2
NO_LOCKS = {getattr(errno, name) for name in ("ENOLCK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EINVAL") if hasattr(errno, name)}
"""Errors of file systems without record locks."""


class FolderLock:
    """Exclusive hold on the run folder, until `release` or until this process ends, in whatever way.

    It is a record lock: forked data workers do not inherit it, so the next start need not wait for them. On a file system without
    record locks it is a file that a thread renews. A process that finds this file unchanged for RELEASE_SECONDS by its own clock
    takes the folder over. `problem` then tells the former holder, if it still runs.
    """

    def __init__(self, folder: Path, *, waits: bool = True) -> None:
        """Take the lock. `waits`: wait up to RELEASE_SECONDS for another process to leave.

        Raises BusyError when another process keeps the folder, OSError when the folder cannot be written.
        """
        self.folder, self.problem = folder, ""
        self._descriptor: int | None = None
        self._lease: _Lease | None = None
        end, announced = time.monotonic() + (RELEASE_SECONDS if waits else 0.0), False
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            while not self._try_lock(descriptor):
                if time.monotonic() >= end:
                    raise BusyError(f"output_dir = {str(folder)!r}: another process trains into it; use another one")
                if not announced:
                    print(f"waiting for another process to leave {folder}", flush=True)
                    announced = True
                time.sleep(LOOK_SECONDS)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor  # stays open: closing it would unlock

    def _try_lock(self, descriptor: int) -> bool:
        """Try to take the record lock, or a lease where there are no record locks; return whether this process holds the folder.

        Raises BusyError when another process renews the lease.
        """
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in NO_LOCKS:
                raise
        self._lease = _Lease(self.folder, self._lost)
        return True

    def _lost(self, holder: str) -> None:
        """Set `problem`: another process has taken the folder over."""
        self.problem = (
            f"{holder} took the run folder {self.folder} over: this process had not renewed its lease for {RELEASE_SECONDS:g} s; "
            "this run stops, so that two do not write into one folder"
        )

    def release(self) -> None:
        """Give the run folder up: end the lease, if there is one, and close the lock file."""
        if self._lease is not None:
            self._lease.release()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class _Lease:
    """A file that its holder rewrites every RENEW_SECONDS, in a thread."""

    def __init__(self, folder: Path, lost: Callable[[str], None]) -> None:
        self.path, self.id, self.count, self._lost = folder / LEASE, secrets.token_hex(8), 0, lost
        self._over = threading.Event()
        self._take(folder)
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _take(self, folder: Path) -> None:
        """Create the lease, or take over one that is not renewed for RELEASE_SECONDS.

        Raises BusyError when another process renews it.
        """
        try:
            with self.path.open("x") as out:
                out.write(self._text())
            return
        except FileExistsError:
            print(f"waiting to see whether another process holds {folder}: its file system knows no locks", flush=True)
        text, since, end = self._read(), time.monotonic(), time.monotonic() + 2 * RELEASE_SECONDS
        while time.monotonic() - since < RELEASE_SECONDS:
            time.sleep(LOOK_SECONDS)
            if (now := self._read()) != text:
                text, since = now, time.monotonic()
                if now is None:  # the former holder released it
                    break
            if time.monotonic() > end:
                raise BusyError(f"output_dir = {str(folder)!r}: {_holder(text)} trains into it; use another one")
        self._write()
        time.sleep(2 * LOOK_SECONDS)  # of several processes that take it over at once, the last one to write holds it
        if (left := self._read()) != self._text():
            raise BusyError(f"output_dir = {str(folder)!r}: {_holder(left)} trains into it; use another one")

    def _renew(self) -> None:
        """Rewrite the lease every RENEW_SECONDS; call `lost` and end when another process has taken it."""
        while not self._over.wait(RENEW_SECONDS):
            with suppress(OSError):  # a disk that is full for a moment
                if (found := self._read()) is not None and f'"{self.id}"' not in found:
                    self._lost(_holder(found))
                    return
                self.count += 1
                self._write()

    def _text(self) -> str:
        """Return the content of the lease: host, process, random id and a count that every renewal raises."""
        return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "id": self.id, "count": self.count})

    def _write(self) -> None:
        temporary = self.path.with_name(f"{LEASE}-{self.id}")
        temporary.write_text(self._text())
        temporary.replace(self.path)

    def _read(self) -> str | None:
        try:
            return self.path.read_text()
        except FileNotFoundError:
            return None

    def release(self) -> None:
        """Stop the renewals, and remove the lease if this process still holds it."""
        self._over.set()
        self._thread.join()
        if f'"{self.id}"' in (self._read() or ""):
            self.path.unlink(missing_ok=True)


def _holder(text: str | None) -> str:
    """Name the process that wrote a lease, for people."""
    try:
        found = json.loads(text or "")
        return f"process {found['pid']} on {found['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
