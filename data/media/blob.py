"""A lazily opened byte source of a medium: a file, a slice of an archive, or memory."""

from __future__ import annotations

import base64
import io
import os
import stat
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

from data.records.fields import inline_bytes
from model.errors import DataError
from model.files.untrusted import open_regular

MAX_MEMBER_BYTES = 1 << 31
"""Bytes of a medium inside an archive, which is read into memory as a whole."""


class MediaError(DataError):
    """A medium cannot be used. The message is the reason alone; the code that knows the record adds its place."""


@dataclass(frozen=True)
class Blob:
    """The bytes of one medium."""

    name: str  # readable place of the medium, for messages
    path: str = ""  # the file that holds it, or a folder of frames; "" if `data` does
    start: int = 0  # first byte of the medium in that file
    size: int | None = None  # None: up to the end of the file
    data: bytes | None = None

    @property
    def is_folder(self) -> bool:
        return self.data is None and os.path.isdir(self.path)

    def check_exists(self) -> None:
        """Raise MediaError unless there is a regular file; opening a pipe or a device could block for ever."""
        if self.data is None and not os.path.isfile(self.path):
            raise MediaError(f"{self.name!r} {'is not a regular file' if os.path.exists(self.path) else 'does not exist'}")

    def num_bytes(self) -> int:
        if self.data is not None:
            return len(self.data)
        return os.path.getsize(self.path) - self.start if self.size is None else self.size

    def open(self) -> BinaryIO:
        """Open a seekable file of these bytes alone. Raises MediaError if there is none."""
        if self.data is not None:
            return io.BytesIO(self.data)
        try:
            file = open_regular(self.path)
        except OSError as error:
            self.check_exists()  # its message is the clearer one
            raise MediaError(f"{self.name!r} cannot be opened: {error.strerror or error}") from error
        if self.size is None and self.start == 0:
            return file
        with file:
            if not 0 <= self.num_bytes() <= MAX_MEMBER_BYTES or self.start < 0:
                raise MediaError(f"{self.name!r} has {self.num_bytes()} bytes in its archive; at most {MAX_MEMBER_BYTES} are read")
            file.seek(self.start)
            return io.BytesIO(file.read(self.num_bytes()))

    def tail(self, count: int) -> bytes:
        """Return the last `count` bytes."""
        if self.data is not None:
            return self.data[-count:]
        with open_regular(self.path) as file:
            stop = self.start + self.num_bytes()
            file.seek(max(self.start, stop - count))
            return file.read(min(count, stop - self.start))

    def sampled(self, count: int) -> bytes:
        """Return the first, the middle and the last `count` bytes; all bytes if there are no more than these."""
        size = self.num_bytes()
        if size <= 3 * count:
            return self.tail(size)
        places = _places(size, count)
        if self.data is not None:
            return b"".join(self.data[at : at + count] for at in places)
        with open_regular(self.path) as file:
            return b"".join(os.pread(file.fileno(), count, self.start + at) for at in places)


def sampled_bytes(stream: BinaryIO, size: int, count: int) -> bytes:
    """Return what `Blob.sampled` returns, of an open file of `size` bytes."""
    found = []
    for at in _places(size, count) if size > 3 * count else (0,):
        stream.seek(at)
        found.append(stream.read(count if size > 3 * count else size))
    return b"".join(found)


def _places(size: int, count: int) -> tuple[int, int, int]:
    return 0, (size - count) // 2, size - count


def inline_blob(path: str) -> Blob | None:
    """Return the medium that a data URI holds; None for the path of a file. Raises MediaError if its text is no base64."""
    if (text := inline_bytes(path)) is None:
        return None
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise MediaError(f"the data URI cannot be decoded: {error}") from error
    return Blob(f"data URI of {len(content)} bytes", data=content)


def resolve_path(path: str, root: str, *, follow_links: bool) -> str:
    """Return the file that `path` of a record names inside `root` ("" = the current directory).

    Raises MediaError if the path leaves `root`, or is a link that does so and `follow_links` is False.
    """
    if "\0" in path:
        raise MediaError(f"{path!r} is no usable path: it holds a null character")
    if os.path.isabs(path):
        raise MediaError(f"{path!r} is absolute; write it relative to the source's media_root {root!r}")
    base = os.path.abspath(root)
    named = os.path.normpath(os.path.join(base, path))
    if not _inside(named, base):
        raise MediaError(f"{path!r} leaves media_root {root!r}")
    if follow_links:
        return named
    try:
        real, real_base = _without_links(named, base)
    except (OSError, ValueError) as error:
        raise MediaError(f"{path!r} is no usable path: {error}") from error
    if not _inside(real, real_base):
        raise MediaError(f"{path!r} is a link that leaves media_root {root!r}; set data.follow_links = true to allow it")
    return real


def _without_links(named: str, base: str) -> tuple[str, str]:
    """Return the path `named`, which is in the folder `base`, and `base`, with all links followed.

    Two look-ups where the folder of `named` was seen before and is the same still, by its inode; one per component otherwise.
    """
    folder, name = os.path.split(named)
    try:
        state = os.stat(folder)
        if named != base and not stat.S_ISLNK(os.lstat(named).st_mode):
            real_folder, real_base = _real_folders(folder, base, state.st_dev, state.st_ino)
            return os.path.join(real_folder, name), real_base
    except OSError:
        pass  # a file that is missing may be named through links all the same
    return os.path.realpath(named), os.path.realpath(base)


@lru_cache(maxsize=1 << 12)
def _real_folders(folder: str, base: str, device: int, inode: int) -> tuple[str, str]:
    return os.path.realpath(folder), os.path.realpath(base)


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
