"""Files that are proven: written, on the disk, read back, and compared with what they were made of."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PIECE_BYTES = 4 << 20
"""What is written at once. Whoever writes beside a training thread holds the interpreter's lock only between two pieces."""


SYNC_BYTES = 1 << 30
"""The disk has at most so much to catch up with at the end of a file: one fsync of all could take as long as if nothing went on."""


class BadShard(Exception):
    """What was to be saved is not sound, or was not found on disk as it was written; the message names the tensor or the file."""


def write(path: Path, chunks: Iterator[memoryview]) -> dict[str, Any]:
    """Until the disk has it. The checksum is of the bytes as they are handed over."""
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


def compare(path: Path, chunks: Iterator[memoryview]) -> None:
    """BadShard unless the file holds `chunks`, one after the other, and nothing more."""
    space = np.empty(PIECE_BYTES, dtype=np.uint8)
    with path.open("rb", buffering=0) as file:
        for chunk in chunks:
            for begin in range(0, len(chunk), PIECE_BYTES):
                expected = np.frombuffer(chunk[begin : begin + PIECE_BYTES], dtype=np.uint8)
                found = space[: len(expected)]
                if _fill(file, memoryview(found)) != len(expected) or not np.array_equal(found, expected):  # type: ignore[arg-type]
                    raise BadShard(f"{path} is read back otherwise than it was written: the disk or the memory is failing")
        if file.read(1):
            raise BadShard(f"{path} is longer than what was written")


def _fill(file: Any, space: memoryview) -> int:
    """Bytes read into `space`, fewer than fit only at the end of the file."""
    count = 0
    while count < len(space) and (got := file.readinto(space[count:])):
        count += got
    return count
