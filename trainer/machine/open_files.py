"""How many files this process may have open: as many as the system lets it, and enough for what a run is about to do."""

from __future__ import annotations

import errno
import glob
import os
import resource
from pathlib import Path

from data.config import DataConfig
from data.index.source_files import MAX_OPEN
from data.workers import NO_FILE
from model.errors import ConfigError

PER_WORKER = 5
"""In the rank that started a data worker: pipes of its queue both ways, its sentinel, and a socket while it hands over a batch."""
SPARE = 16
"""Weights, checkpoints, logs, and what libraries open for a moment."""


def raise_limit() -> None:
    """Let this process, and those it starts, open as many files as the system allows: shells and services begin with far fewer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # no hard limit in a system that has another one
            return


def check_limit(data: DataConfig) -> None:
    """ConfigError when this process may not open as many files as training and validation with `data.workers` need."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return
    kept = sum(MAX_OPEN if glob.has_magic(source.path) else 1 for source in (*data.sources, *data.validation))
    loaders = 2 if data.validation else 1  # workers of both are there while one is validated
    needed = open_files() + kept + PER_WORKER * data.workers * loaders + SPARE
    if needed > limit:
        raise ConfigError(
            f"this process may have {limit:,} files open, and training takes about {needed:,} ({open_files()} are open now, and "
            f"data.workers = {data.workers}): raise the limit (`ulimit -n`, LimitNOFILE of a service), or lower data.workers"
        )


def open_files() -> int:
    """How many this process has open; 0 where the system does not tell."""
    folder = Path("/proc/self/fd")
    return len(os.listdir(folder)) if folder.is_dir() else 0


def explained(error: BaseException) -> BaseException:
    """`error`; or, where it comes of too many open files, one that says so and what to do."""
    if not (isinstance(error, OSError) and error.errno in NO_FILE) and os.strerror(errno.EMFILE) not in str(error):
        return error
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    told = ConfigError(
        f"no more files can be opened: this process may have {limit:,} open ({error}). Raise the limit (`ulimit -n`, LimitNOFILE "
        "of a service), or lower data.workers"
    )
    told.__cause__ = error
    return told
