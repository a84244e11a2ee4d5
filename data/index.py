"""Random access to the records of a file, without holding it: byte offsets in a sidecar, the file itself memory-mapped."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from data.blob import Blob
from data.config import ConfigError, DataError, SourceConfig
from data.record import MediaRef, RecordError, parse
from model.batch import MediaMeta, MediaSpec, num_tokens

_VERSION = 1  # of the table: raise it when a column or a rule changes
_COLUMNS = ("start", "stop", "line", "text_tokens", "num_images")
_BYTES_PER_TOKEN = 4
_BOM = b"\xef\xbb\xbf"
# Up to the next bracket outside strings. Possessive: a match never backtracks, whatever the file holds.
_BRACKET = re.compile(rb'(?:[^"{}\[\]]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+([{}\[\]])', re.DOTALL)
_SPACE = re.compile(rb"[ \t\r\n]*+")


class RecordIndex:
    """Records of one source by number. Opening maps two files; forked and pickled copies share the pages."""

    lengths: np.ndarray  # (N,) int32 planned tokens of each record, an estimate
    modalities: np.ndarray  # (N,) int8: 0 text only, 1 has an image

    def __init__(self, path: Path, table_path: Path, image_tokens: int) -> None:
        self._path, self._table_path, self._image_tokens = path, table_path, image_tokens
        self._table = np.load(table_path, mmap_mode="r", allow_pickle=False)[1:]
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        planned = self._table[:, 3] + self._table[:, 4] * image_tokens
        self.lengths = np.minimum(planned, np.iinfo(np.int32).max).astype(np.int32)
        self.modalities = (self._table[:, 4] > 0).astype(np.int8)

    @staticmethod
    def open(source: SourceConfig, folder: Path, specs: dict[str, MediaSpec]) -> RecordIndex:
        """The index of `source`; its sidecar in `folder` is used if the file's size and time agree with it, else built.

        Several processes may do so at once. Raises `ConfigError` for a path that cannot be read, `DataError` for a file
        that is no list of records.
        """
        path = _checked(source)
        image_tokens = num_tokens(specs["image"], MediaMeta()) if "image" in specs else 0
        digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
        sidecar = folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', source.key)}-{digest}.npy"
        stat = path.stat()
        header = [_VERSION, stat.st_size, stat.st_mtime_ns, *[0] * (len(_COLUMNS) - 3)]
        if not _is_current(sidecar, header):
            _write(sidecar, np.array([header, *_scan(path)], dtype=np.int64))
        return RecordIndex(path, sidecar, image_tokens)

    def __len__(self) -> int:
        return len(self._table)

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordIndex, (self._path, self._table_path, self._image_tokens)

    def raw(self, i: int) -> Any:
        """The decoded JSON of record `i`. Raises `RecordError` if its bytes are no JSON."""
        start, stop = self._table[i, :2]
        try:
            return json.loads(self._bytes[start:stop].decode("utf-8"))
        except (ValueError, RecursionError) as error:
            where = self.where(i)
            raise RecordError(where, where.rpartition(":")[2], "json", f"cannot be decoded: {error}") from None

    def blob(self, i: int, ref: MediaRef) -> Blob | None:
        """Where a medium of record `i` is, if the records' own file holds it; None: it is a file in the source's folder."""
        return None

    def where(self, i: int) -> str:
        """File name and the line, counted from 1, on which record `i` starts."""
        return f"{self._path.name}:{self._table[i, 2]}"


def _checked(source: SourceConfig) -> Path:
    path = Path(source.path)
    if path.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"data.sources path {source.path!r} is neither .json nor .jsonl; other kinds are not read yet")
    if not path.is_file():
        hint = "; patterns are not expanded: make each file a source of its own" if set("*?[{") & set(source.path) else ""
        raise ConfigError(f"data.sources path {source.path!r} is no file{hint}")
    return path


def _is_current(sidecar: Path, header: list[int]) -> bool:
    try:
        table = np.load(sidecar, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # missing, or cut short by a crash of the machine
        return False
    return table.ndim == 2 and table.shape[1] == len(_COLUMNS) and table.shape[0] > 1 and table[0].tolist() == header


def _write(sidecar: Path, table: np.ndarray) -> None:
    """Header and table are one file and appear at once: readers never see a half or a mixture."""
    sidecar.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=sidecar.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, table, allow_pickle=False)
        os.replace(name, sidecar)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _scan(path: Path) -> list[tuple[int, ...]]:
    """One row of `_COLUMNS` per record. Raises `DataError` if there is none, or if an array is broken between records."""
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; expected at least one record")
    borders = _array_borders if path.suffix == ".json" else _line_borders
    rows: list[tuple[int, ...]] = []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        first = len(_BOM) if data[: len(_BOM)] == _BOM else 0
        line, seen = 1, 0
        with tqdm(total=len(data), unit="B", unit_scale=True, desc=f"index {path.name}", delay=3, leave=False) as bar:
            for start, stop in borders(data, first, str(path)):
                line += data[seen:start].count(b"\n")
                bar.update(start - seen)
                seen = start
                rows.append((start, stop, line, *_plan(data[start:stop])))
    if not rows:
        raise DataError(f"{path}: holds no record")
    return rows


def _plan(raw: bytes) -> tuple[int, int]:
    """Planned text tokens and number of images of a record; one that breaks the rules is planned by its size."""
    try:
        record = parse(json.loads(raw.decode("utf-8")), "", needs_answer=False)
    except (ValueError, RecursionError, RecordError):  # found and named when the record is read
        return max(1, len(raw) // _BYTES_PER_TOKEN), 0
    return sum(max(1, len(turn.content.encode()) // _BYTES_PER_TOKEN) for turn in record.turns), len(record.media)


def _line_borders(data: mmap.mmap, start: int, name: str) -> Iterator[tuple[int, int]]:
    while start < len(data):
        newline = data.find(b"\n", start)
        stop = newline if newline >= 0 else len(data)
        line = data[start:stop]
        if body := line.strip():
            low = start + len(line) - len(line.lstrip())
            yield low, low + len(body)
        start = stop + 1


def _array_borders(data: mmap.mmap, start: int, name: str) -> Iterator[tuple[int, int]]:
    """Borders of the objects of a JSON array, found by its brackets outside strings; the objects are not decoded."""
    at = _skip_space(data, start)
    if data[at : at + 1] != b"[":
        _broken(data, at, name, "the file is no array; name it .jsonl if it holds one object per line")
    at = _skip_space(data, at + 1)
    if data[at : at + 1] == b"]":
        return
    while True:
        if data[at : at + 1] != b"{":
            _broken(data, at, name, "expected the '{' of the next record")
        stop = _object_end(data, at, name)
        yield at, stop
        at = _skip_space(data, stop)
        if data[at : at + 1] == b"]":
            break
        if data[at : at + 1] != b",":
            _broken(data, at, name, "expected ',' or ']' after a record")
        at = _skip_space(data, at + 1)
    if (rest := _skip_space(data, at + 1)) != len(data):
        _broken(data, rest, name, "there is more after the end of the array")


def _object_end(data: mmap.mmap, start: int, name: str) -> int:
    depth, at = 0, start
    while (match := _BRACKET.match(data, at)) is not None:
        at = match.end()
        depth += 1 if match[1] in b"{[" else -1
        if depth == 0:
            return at
    _broken(data, start, name, "the record that starts here never ends; a quote or a bracket is missing")


def _skip_space(data: mmap.mmap, at: int) -> int:
    match = _SPACE.match(data, at)
    return match.end() if match else at


def _broken(data: mmap.mmap, at: int, name: str, reason: str) -> NoReturn:
    found = data[at : at + 20].decode("utf-8", "replace")
    raise DataError(f"{name}:{data[:at].count(10) + 1}: {reason}; found {found!r}" if found else f"{name}: {reason}; found its end")
