"""Records in .tar archives (WebDataset): the members of one key are one record, read in place.

The key of a member is its path up to the first dot of its file name. KEY.json holds the record, and its media are members of the
same key: "image": "KEY.jpg" names one, by its path in the archive or by its file name. A record that names no media at all gets
every member of its key that has the extension of a medium; a record without media says "image": []. The members of a key need not
be adjacent, and other members of the archive are ignored.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from data.index.json_scan import Advance
from data.index.reader import RowError, decode_json, read
from data.index.source_files import Shards
from data.index.table import KINDS, Table
from data.index.tar_headers import ArchiveMap, Member, members
from data.index.token_estimate import plan_columns, plan_range
from data.media.blob import Blob, MediaError
from data.records.media_refs import MediaRef
from model.errors import DataError
from model.files.untrusted import Json

EXTENSIONS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "gif", "bmp"), "image"),
    **dict.fromkeys(("mp4", "webm", "mkv", "avi", "mov"), "video"),
    **dict.fromkeys(("wav", "mp3", "flac", "ogg", "opus", "m4a"), "audio"),
}
"""Kinds of medium by extension: members of these extensions need not be named by the record."""
_RECORD = "json"
_Inside = tuple[str, int, int]
"""Name, first byte and size of a member."""


class TarRows:
    """Records of .tar archives: groups of members that share a key."""

    def __init__(self, shards: Shards, table: Table) -> None:
        self._shards, self._table = shards, table
        self._last_members: tuple[int, dict[str, list[_Inside]]] = (-1, {})  # the record that was read last, its members by name

    def raw(self, i: int) -> Any:
        names = [name for name, _, _ in self._members(i)]
        if (count := sum(_extension(name) == _RECORD for name in names)) != 1:
            raise RowError(f"{count or 'no'} member{'s are' if count else ' is'} called {self.describe_position(i)}.{_RECORD}")
        value = decode_json(read(self._shards, self._table, i))
        return value | _media_of_key(names) if isinstance(value, dict) and not _names_media(value) else value

    def blob(self, i: int, ref: MediaRef) -> Blob | None:
        file = self._table.file_of(i)
        if self._last_members[0] != i:
            self._last_members = i, _by_name(self._members(i))
        found = self._last_members[1].get(ref.path, [])
        if len(found) > 1:
            raise MediaError(f"{ref.path!r} is the name of {len(found)} members of {self._shards.names[file]}")
        for name, start, size in found:
            return Blob(f"{self._shards.names[file]}:{name}", self._shards.paths[file], start, size)
        return None

    def describe_position(self, i: int) -> str:
        return _key(next(self._table.members_of(i))[0])

    def _members(self, i: int) -> list[_Inside]:
        return list(self._table.members_of(i))


def scan_tar(path: Path, advance: Advance) -> Table:
    """Return the table of a .tar file. Raises `DataError` if it is damaged or holds no record."""
    groups: dict[str, list[Member]] = {}
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: is empty; expected at least one record")
        data = ArchiveMap(file.fileno(), 0, access=mmap.ACCESS_READ)
    seen = 0
    for member in members(data, str(path)):
        if not _base(member.name).startswith("."):
            groups.setdefault(_key(member.name), []).append(member)
        advance(member.start - seen)
        seen = member.start
    records = [group for group in groups.values() if any(_extension(m.name) in (_RECORD, *EXTENSIONS) for m in group)]
    if not any(_extension(member.name) == _RECORD for group in records for member in group):
        raise DataError(f"{path}: holds no record; a record is a member KEY.{_RECORD}, its media are KEY.jpg, KEY.wav ...")
    return _table(data, records)


def _table(data: mmap.mmap, records: list[list[Member]]) -> Table:
    texts = [next((m for m in group if _extension(m.name) == _RECORD), Member("", 0, 0)) for group in records]
    inside = [member for group in records for member in group]
    names = [member.name.encode("utf-8", "surrogateescape") for member in inside]
    text_tokens, media = plan_columns([plan_range(data, member.start, member.start + member.size) for member in texts])
    unnamed = np.minimum([_counts(group) for group in records], np.iinfo(np.int16).max).astype(np.int16)
    return Table(
        start=np.array([member.start for member in texts], dtype=np.int64),
        stop=np.array([member.start + member.size for member in texts], dtype=np.int64),
        line=np.zeros(len(records), dtype=np.int64),
        text_tokens=text_tokens,
        media=np.where(media.any(axis=1, keepdims=True), media, unnamed),
        member_stops=np.cumsum([len(group) for group in records]),
        members=np.array([(member.start, member.size) for member in inside], dtype=np.int64),
        name_stops=np.cumsum([len(name) for name in names]),
        names=np.frombuffer(b"".join(names), dtype=np.uint8),
    )


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _by_name(inside: list[_Inside]) -> dict[str, list[_Inside]]:
    """Group members by their paths and by their file names."""
    found: dict[str, list[_Inside]] = {}
    for member in inside:
        for called in {member[0], _base(member[0])}:
            found.setdefault(called, []).append(member)
    return found


def _extension(name: str) -> str:
    return _base(name).partition(".")[2].lower()


def _counts(group: list[Member]) -> list[int]:
    kinds = [EXTENSIONS.get(_extension(member.name)) for member in group]
    return [kinds.count(kind) for kind in KINDS]


def _media_of_key(names: list[str]) -> dict[str, list[str]]:
    """Return the media of a record that names none, by kind, as the record would name them."""
    found: dict[str, list[str]] = {}
    for name in names:
        if (kind := EXTENSIONS.get(_extension(name))) is not None:
            found.setdefault(kind, []).append(name)
    return found


def _names_media(value: Json) -> bool:
    """Return whether a record names media, by its own keys or in a content part."""
    if any(value.get(key) is not None for kind in KINDS for key in (kind, f"{kind}s")):
        return True
    turns = value.get("messages")
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return any(part.get("type") != "text" and len(part) > 1 for part in parts)
