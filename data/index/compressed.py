"""Compressed .json and .jsonl files: unpacked once beside the index, because a compressed file cannot be read at any place."""

from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

from data.index.sidecar import open_atomically
from model.errors import ConfigError, DataError

_CHUNK = 1 << 20
_KEPT_FREE = 1 << 30  # bytes of the disk that unpacking leaves free
_PACKED = (".json", ".jsonl")
Open = Callable[[Path], io.BufferedIOBase]


OPENERS: dict[str, Open | None] = {".gz": gzip.GzipFile, ".zst": None}
"""Functions that open a compressed file for reading, by the end of its name; None where Python has none (.zst: before 3.14)."""
_DAMAGE: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
if sys.version_info >= (3, 14):
    from compression import zstd

    OPENERS[".zst"] = zstd.ZstdFile
    _DAMAGE += (zstd.ZstdError,)


def is_compressed(path: str) -> bool:
    """Tell whether the name is that of a compressed .json or .jsonl file."""
    return Path(path).suffix.lower() in OPENERS and Path(path).with_suffix("").suffix.lower() in _PACKED


def check_opener(path: str) -> None:
    """Raise `ConfigError` where this Python cannot unpack the file."""
    if OPENERS[Path(path).suffix.lower()] is None:
        raise ConfigError(f"data.sources: {path} needs Python 3.14, which reads .zst; unpack it first: zstd -d {Path(path).name}")


def unpacked(path: Path, folder: Path, on_progress: Callable[[str], object]) -> Path:
    """Return the unpacked copy of a file in `folder`, made now if there is none of this size and time.

    Several processes may do so at once. Raises `DataError` for a damaged file, `ConfigError` where the disk has no room for it.
    """
    state, name = path.stat(), path.with_suffix("").name
    place = hashlib.sha256(f"{path}".encode()).hexdigest()[:16]
    copy = folder / "unpacked" / place / f"{state.st_size}-{state.st_mtime_ns}" / name
    if not copy.is_file():
        for old in (folder / "unpacked" / place).glob("*"):
            if old != copy.parent:  # which another process may be writing
                shutil.rmtree(old, ignore_errors=True)  # of an earlier version of the file
        _unpack(path, copy, on_progress)
    return copy


def _unpack(path: Path, copy: Path, on_progress: Callable[[str], object]) -> None:
    opened = OPENERS[path.suffix.lower()]
    assert opened is not None  # check_opener
    try:
        with opened(path) as packed, open_atomically(copy) as out:
            while chunk := packed.read(_CHUNK):
                if shutil.disk_usage(copy.parent).free < _KEPT_FREE + len(chunk):
                    raise ConfigError(f"data.sources: {path} unpacks to more than the disk of {copy.parent} has room for")
                out.write(chunk)
                on_progress(path.name)
    except _DAMAGE as error:
        raise DataError(f"{path}: is cut short or damaged: {error}") from None
