"""Verified writes: a file is written, synced to disk, read back, and compared with its source."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import numpy as np

from model.files.manifest import FileFacts

PIECE_BYTES = 4 << 20
"""Bytes per write. A writer beside a training thread holds the interpreter's lock only between two writes."""


SYNC_BYTES = 1 << 30
"""Bytes between two fsyncs, so that the last one has little left to do: one fsync of a whole file could take as long as a hang."""


class BadShard(Exception):
    """Data to be saved is not finite, or the bytes on disk differ from it; the message names the tensor or the file."""


def write_synced(path: Path, chunks: Iterator[memoryview]) -> FileFacts:
    """Write `chunks` to a file and sync it to disk. Return its size and the sha256 of the bytes as they were passed in."""
    digest, size, synced = hashlib.sha256(), 0, 0
    with path.open("wb") as out:
        for chunk in chunks:
            digest.update(chunk)
            size += out.write(chunk)
            if size - synced >= SYNC_BYTES:
                os.fsync(out.fileno())
                synced = size
        out.flush()
        os.fsync(out.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def check_written(path: Path, chunks: Iterator[memoryview]) -> None:
    """Check that the file holds exactly `chunks`, one after the other. Raises `BadShard`."""
    space = np.empty(PIECE_BYTES, dtype=np.uint8)
    with path.open("rb", buffering=0) as file:
        for chunk in chunks:
            for begin in range(0, len(chunk), PIECE_BYTES):
                expected = np.frombuffer(chunk[begin : begin + PIECE_BYTES], dtype=np.uint8)
                found = space[: len(expected)]
                if _fill(file, found.data) != len(expected) or not np.array_equal(found, expected):
                    raise BadShard(f"{path} is read back otherwise than it was written: the disk or the memory is failing")
        if file.read(1):
            raise BadShard(f"{path} is longer than what was written")


def _fill(file: FileIO, space: memoryview) -> int:
    """Read into `space` until it is full or the file ends. Return the number of bytes read."""
    count = 0
    while count < len(space) and (got := file.readinto(space[count:])):
        count += got
    return count
