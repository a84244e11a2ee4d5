"""Needs of compiling on a machine: compilers, and a folder in which compiled blocks are kept between starts."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import sysconfig
from pathlib import Path

import torch

from model.errors import ConfigError
from trainer.config import ParallelConfig

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def prepare_compiling(config: ParallelConfig, device: torch.device) -> str:
    """Check what compiling for `device` needs, and have torch keep what it compiles. Return a line for people, or "".

    Raises ConfigError that names what is missing, before any weight is read.
    """
    if not config.compile:
        return ""
    if (missing := missing_compiler(device)) and config.compile is True:
        raise ConfigError(
            f"parallel.compile = true on {device.type}: {missing}; install it, or set parallel.compile = false "
            "('or_eager' runs what cannot be compiled as it is)"
        )
    if device.type == "cpu":
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # ranks share the cores; a pool would live as long as each
    return f"blocks are compiled at their first use and kept in {cache_folder()}" + (f"; {missing}" if missing else "")


def missing_compiler(device: torch.device) -> str:
    """Return what `torch.compile` would lack on this machine, in words; "" when nothing is missing."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    variable, names = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++",))
    wanted = (os.environ[variable],) if os.environ.get(variable) else names
    if not any(shutil.which(name) for name in wanted):
        return f"no compiler {' or '.join(map(repr, wanted))} is on the PATH ({variable} may name another)"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return "" if header.is_file() else f"{header} of Python's development files is missing"


def cache_folder() -> Path:
    """Return the folder of compiled blocks: torch's own variable, or one in the user's cache that nobody else may write to.

    Torch unpickles what it reads there. Raises ConfigError when others could have written it.
    """
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "multimodal-trainer", "compiled")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise ConfigError(
            f"parallel.compile: {folder} cannot be made ({error.strerror}): name a folder by {CACHE_VARIABLE}"
        ) from error
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise ConfigError(
            f"parallel.compile: others may write to {folder}, whose files are run: chmod 700 it, or name one by {CACHE_VARIABLE}"
        )
    os.environ[CACHE_VARIABLE] = str(folder)
    return folder
