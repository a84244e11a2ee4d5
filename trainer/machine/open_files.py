"""Limit of open files: raised to what the system allows, and checked against what a run needs."""

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
"""Open files per data worker in the rank that started it: queue pipes in both directions, its sentinel, and a socket while it hands
over a batch."""
SPARE = 16
"""Files beside those: weights, checkpoints, logs, and what libraries open for a moment."""


def raise_limit() -> None:
    """Raise the limit of open files of this process and its children to the maximum: shells and services begin with far fewer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # the system has a lower limit of its own, as macOS has
            return


def check_limit(data: DataConfig) -> None:
    """Check that training and validation with `data.workers` may open as many files as they need. Raises ConfigError otherwise."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return
    kept = sum(MAX_OPEN if glob.has_magic(source.path) else 1 for source in (*data.sources, *data.validation))
    loaders = 2 if data.validation else 1  # the workers of both exist during a validation
    needed = open_files() + kept + PER_WORKER * data.workers * loaders + SPARE
    if needed > limit:
        raise ConfigError(
            f"this process may have {limit:,} files open, and training takes about {needed:,} ({open_files()} are open now, and "
            f"data.workers = {data.workers}): raise the limit (`ulimit -n`, LimitNOFILE of a service), or lower data.workers"
        )


def open_files() -> int:
    """Return how many files this process has open; 0 where the system does not tell."""
    folder = Path("/proc/self/fd")
    return len(os.listdir(folder)) if folder.is_dir() else 0


def explain_open_files(error: BaseException) -> BaseException:
    """Return `error`; or, when too many open files caused it, a ConfigError that says so and what to do."""
    if not (isinstance(error, OSError) and error.errno in NO_FILE) and os.strerror(errno.EMFILE) not in str(error):
        return error
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    explanation = ConfigError(
        f"no more files can be opened: this process may have {limit:,} open ({error}). Raise the limit (`ulimit -n`, LimitNOFILE "
        "of a service), or lower data.workers"
    )
    explanation.__cause__ = error
    return explanation
