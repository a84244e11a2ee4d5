"""The members of a .tar archive, by the standard library's reader of headers: POSIX (ustar and pax) and GNU names, any size.

Damage is an error, wherever in the archive it is.
"""

from __future__ import annotations

import mmap
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from model.errors import DataError

_PIECE = 1 << 20  # bytes


@dataclass(frozen=True)
class Member:
    """A regular file in an archive."""

    name: str  # its path, without "./"
    start: int  # first byte of its contents in the archive
    size: int  # bytes
    begin: int = 0  # first byte of its headers
    end: int = 0  # one past its last block


class ArchiveMap(mmap.mmap):
    """A mapped archive that refuses to read much at once: the library reads a header of whatever size the header itself names."""

    def read(self, n: int | None = None, /) -> bytes:
        """Return the next `n` bytes. Raises `tarfile.HeaderError` for more than a header of names and times may have."""
        if n is None or not 0 <= n <= _PIECE:
            raise tarfile.HeaderError(f"a header of {n} bytes; at most {_PIECE} are read")
        return super().read(n)


def members(data: ArchiveMap, name: str) -> Iterator[Member]:
    """Yield every regular file of an archive, in order.

    Folders and links are skipped; sparse files are refused. Raises `DataError` for an archive that is damaged, cut short or has
    bytes after its end mark.
    """
    if data[:2] == b"\x1f\x8b":
        _damaged(0, name, "the archive is compressed; unpack it with gunzip, a compressed one cannot be read in place")
    at = 0
    try:
        archive = tarfile.TarFile(fileobj=data)
        while data[at : at + tarfile.BLOCKSIZE].strip(b"\0"):
            data.seek(at)
            member = tarfile.TarInfo.fromtarfile(archive)  # next() takes damage for the end, and keeps every member in memory
            if member.issparse():
                _damaged(at, name, "a member with holes cannot be read in place; pack it without --sparse")
            size = member.pax_headers.get("size", str(member.size))  # the library takes a size that is no number for 0
            if member.size < 0 or size != str(member.size):
                _damaged(at, name, f"a damaged header: size {size[:20]!r}")
            if archive.offset > len(data):
                _damaged(at, name, "the archive is cut short in what begins here")
            at = archive.offset
            if member.isreg():
                path = os.path.normpath(member.name) if member.name.startswith("./") else member.name
                yield Member(path, member.offset_data, member.size, member.offset, at)
    except (tarfile.TarError, ValueError, OverflowError, IndexError, RecursionError) as error:
        _damaged(at, name, f"no header of a member, or a damaged one ({error})")
    _check_end(data, at, name)


def _check_end(data: mmap.mmap, at: int, name: str) -> None:
    """Raise `DataError` unless an end mark and nothing but zeros follows the last member, which ends at byte `at`."""
    if at + tarfile.BLOCKSIZE > len(data):
        _damaged(at, name, "the archive is cut short: its end mark is missing")
    for low in range(at, len(data), _PIECE):
        if data[low : low + _PIECE].strip(b"\0"):
            _damaged(low, name, "there is more after the end mark; archives cannot be joined by cat: make each a file of its own")


def _damaged(at: int, name: str, reason: str) -> NoReturn:
    raise DataError(f"{name}: byte {at}: {reason}")
