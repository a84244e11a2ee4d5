"""Small files of arrays beside a run's index: written whole or not at all, read as None where they are not sound."""

from __future__ import annotations

import math
import os
import re
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.limits import open_regular
from data.records.fields import MAX_NAME


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
    """What `write_arrays` wrote; None for a file that is not there, or that is damaged: a crash of the machine may cut it short.

    It is never larger in memory than on disk.
    """
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as found:
            _check_sizes(found.zip, os.fstat(file.fileno()).st_size)
            return {name: found[name] for name in found.files}
    except _DAMAGED:
        return None


_DAMAGED = (
    *(OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, IndexError, MemoryError, SyntaxError, RecursionError),
    *(NotImplementedError, RuntimeError, UnicodeError, struct.error, zlib.error, zipfile.BadZipFile, zipfile.LargeZipFile),
)
"""What the readers of zip files and arrays make of broken bytes."""


def _check_sizes(archive: zipfile.ZipFile, num_bytes: int) -> None:
    """ValueError for members that are compressed, which ours are not, or together larger than their file."""
    members = archive.infolist()
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > num_bytes:
        raise ValueError("is no file of plain arrays")
    for member in members:
        _check_array(archive, member)


def _check_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """ValueError unless the array's header describes as many bytes as there are: room is made by what it says."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)  # type: ignore[no-untyped-call]
        if version != (1, 0):
            raise ValueError(f"array format {version}")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)  # type: ignore[no-untyped-call]
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise ValueError("the header of an array is wrong")


def text_array(text: str) -> np.ndarray:
    """Text as bytes, for `write_arrays`."""
    return np.frombuffer(text.encode(), dtype=np.uint8)


def safe_name(key: str) -> str:
    """A source's key as part of a file's name, which a file system bounds; what makes it unique stands behind it."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", key[:MAX_NAME])
