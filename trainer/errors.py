"""Exit codes, and the exceptions that stand for them. ConfigError and DataError are in model/errors.py."""

from __future__ import annotations

import errno

DONE, INTERNAL, CONFIG, DATA, PROOF, CANNOT_WRITE, STOPPED, INTERRUPTED = 0, 1, 2, 65, 70, 73, 75, 130


class ProofError(Exception):
    """Something that was to be proven is not so: a save, a checkpoint, or finite numbers."""

    exit_code = PROOF


class SaveError(Exception):
    """Something could not be written."""

    exit_code = CANNOT_WRITE


class StopRequested(Exception):
    """Someone asked the run to stop, and everything is saved."""

    exit_code = STOPPED


class BusyError(SaveError):
    """Another process holds the run folder."""


NO_WRITING = {
    getattr(errno, name)
    for name in ("ENOSPC", "EROFS", "EACCES", "EPERM", "EDQUOT", "EIO", "EFBIG", "EISDIR", "ENOTDIR", "EEXIST", "ENAMETOOLONG")
    if hasattr(errno, name)
}
"""Errors of the system that mean a file cannot be written, whoever tried."""


def code_of(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, OSError) and error.errno in NO_WRITING:
        return CANNOT_WRITE
    return getattr(error, "exit_code", INTERNAL)
