"""Small files of arrays beside a run's index: written atomically, read as None if they are damaged."""

from __future__ import annotations

import errno
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

from data.records.fields import MAX_NAME
from model.files.untrusted import open_regular


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that appears at `path` once all of it is on disk: readers see no half and no mixture of two writers.

    Raises OSError with the folder and what it is for, where no file can be made in it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    except OSError as error:
        # ENOENT is that of a folder which can hold none, as under /proc: nothing that is read is missing.
        code = errno.EACCES if error.errno == errno.ENOENT else error.errno
        why = f"{error.strerror}; an index of the data goes into this folder: can output_dir be written?"
        raise OSError(code, why, str(path.parent)) from None
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
    """Write all arrays into one file, atomically. Equal arrays give equal bytes."""
    with open_atomically(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Return the arrays that `write_arrays` wrote; they are never larger in memory than on disk.

    Returns None for a file that is missing or damaged, as a crash of the machine may leave it.
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
"""Exceptions that the readers of zip files and arrays raise for broken bytes."""


def _check_sizes(archive: zipfile.ZipFile, num_bytes: int) -> None:
    """Raise ValueError for members that are compressed, which ours never are, or together larger than their file."""
    members = archive.infolist()
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > num_bytes:
        raise ValueError("is no file of plain arrays")
    for member in members:
        _check_array(archive, member)


def _check_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raise ValueError unless the array's header describes as many bytes as the member has: memory is allocated by that header."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)  # type: ignore[no-untyped-call]
        if version != (1, 0):
            raise ValueError(f"array format {version}")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)  # type: ignore[no-untyped-call]
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise ValueError("the header of an array is wrong")


def text_array(text: str) -> np.ndarray:
    """Encode text as an array of bytes, for `write_arrays`."""
    return np.frombuffer(text.encode(), dtype=np.uint8)


def safe_name(key: str) -> str:
    """Return a source's key as part of a file name: bounded in length and safe on every file system.

    The caller appends what makes it unique.
    """
    return re.sub(r"[^A-Za-z0-9._-]", "_", key[:MAX_NAME])
