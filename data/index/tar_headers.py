"""The members of a .tar archive, read from its headers: POSIX (ustar and pax) and GNU names, any size. Strict about damage."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from model.errors import DataError

_BLOCK = 512  # bytes
_ZEROS = bytes(_BLOCK)
_REGULAR, _WITHOUT_DATA = b"0\x007", b"123456"
_PAX, _PAX_FOR_ALL, _LONG_NAME, _LONG_LINK, _SPARSE = b"xgLKS"
_MAX_EXTENSION = 1 << 20
"""Most bytes of an extension header, which holds names and times of other members."""
_MAX_DIGITS = 20  # most digits of a number: no file has so many bytes


@dataclass(frozen=True)
class Member:
    """A regular file in an archive."""

    name: str  # its path, without "./"
    start: int  # first byte of its contents in the archive
    size: int  # bytes


def members(data: mmap.mmap, name: str) -> Iterator[Member]:
    """Yield every regular file of an archive, in order.

    Folders and links are skipped; sparse files are refused. Raises `DataError` for an archive that is damaged, cut short or has
    bytes after its end mark.
    """
    at = 0
    own: dict[str, str] = {}  # fields that extension headers set for the next member
    shared: dict[str, str] = {}  # fields that extension headers set for all following members
    while data[at : at + _BLOCK] != _ZEROS:
        header = data[at : at + _BLOCK]
        kind = _checked(header, at, name)
        start, size = at + _BLOCK, _number(header[124:136], at, name)
        is_extension = kind in (_PAX, _PAX_FOR_ALL, _LONG_NAME, _LONG_LINK)
        if not is_extension:
            fields, own = shared | own, {}
            if kind == _SPARSE or any(key.startswith("GNU.sparse") for key in fields):
                _damaged(at, name, "a member with holes cannot be read in place; pack it without --sparse")
            size = _pax_size(fields["size"], at, name) if "size" in fields else size
        stop = start + (0 if kind in _WITHOUT_DATA else size)
        if stop > len(data):
            _damaged(at, name, "the archive is cut short in what begins here")
        if is_extension:
            if size > _MAX_EXTENSION:
                _damaged(at, name, f"a header of {size} bytes; at most {_MAX_EXTENSION} are read")
            _extend(kind, data[start:stop], own, shared, at, name)
        elif kind in _REGULAR and not (path := fields.get("path") or _name(header)).endswith("/"):
            yield Member(_clean(path), start, size)
        at = stop + -stop % _BLOCK
    _check_end(data, at, name)


def _checked(header: bytes, at: int, name: str) -> int:
    """Return the type byte of a member's header after checking it. Raises `DataError` for a damaged header."""
    if header[:2] == b"\x1f\x8b":
        _damaged(at, name, "the archive is compressed; unpack it with gunzip, a compressed one cannot be read in place")
    if len(header) < _BLOCK:
        _damaged(at, name, "the archive is cut short: its end mark is missing")
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if total != _number(header[148:156], at, name):
        _damaged(at, name, "no header of a member, or a damaged one")
    return header[156]


def _number(field: bytes, at: int, name: str) -> int:
    """Decode octal digits, or big-endian bytes after a set bit (GNU)."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.strip(b" \0") or b"0"
    if digits.strip(b"01234567"):  # int() would take signs and underscores too
        _damaged(at, name, "no header of a member, or a damaged one")
    return int(digits, 8)


def _pax_size(digits: str, at: int, name: str) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) <= _MAX_DIGITS):
        _damaged(at, name, f"a damaged pax header: size {digits[:20]!r}")
    return int(digits)


def _extend(kind: int, body: bytes, own: dict[str, str], shared: dict[str, str], at: int, name: str) -> None:
    """Apply an extension header to `own` or `shared`, the fields of the members after it."""
    if kind == _LONG_NAME:
        own["path"] = _text(body.rstrip(b"\0"))
    while kind in (_PAX, _PAX_FOR_ALL) and body.strip(b"\0"):
        length, space, _ = body.partition(b" ")
        if not space or not length.isdigit() or len(length) > _MAX_DIGITS or not len(length) + 1 < int(length) <= len(body):
            _damaged(at, name, "a damaged pax header")
        key, _, value = body[len(length) + 1 : int(length) - 1].partition(b"=")
        (own if kind == _PAX else shared)[_text(key)] = _text(value)
        body = body[int(length) :]


def _name(header: bytes) -> str:
    first, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    is_posix = header[257:263] == b"ustar\0"  # GNU's own format keeps times where the prefix is
    return _text(prefix + b"/" + first if is_posix and prefix else first)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _clean(name: str) -> str:
    return os.path.normpath(name) if name.startswith("./") else name


def _check_end(data: mmap.mmap, at: int, name: str) -> None:
    for low in range(at, len(data), 1 << 20):
        if data[low : low + (1 << 20)].strip(b"\0"):
            _damaged(low, name, "there is more after the end mark; archives cannot be joined by cat: make each a file of its own")


def _damaged(at: int, name: str, reason: str) -> NoReturn:
    raise DataError(f"{name}: byte {at}: {reason}")
