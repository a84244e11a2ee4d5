"""Small files of arrays beside a run's index: written whole or not at all, read as None where they are not sound."""

from __future__ import annotations

import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np


@contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which appears at `path` once all of it is on disk: readers see no half, and no mixture of two writers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a crash of the machine could leave the name with other bytes
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """All of them in one file. Same arrays, same bytes."""
    with appearing(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """What `write_arrays` wrote; None for a file that is not there, or that a crash of the machine cut short."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile):
        return None


def text_array(text: str) -> np.ndarray:
    """Text as bytes, for `write_arrays`."""
    return np.frombuffer(text.encode(), dtype=np.uint8)


def array_text(array: np.ndarray) -> str:
    """The text of `text_array`."""
    return array.tobytes().decode()


def safe_name(key: str) -> str:
    """A source's key as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", key)
