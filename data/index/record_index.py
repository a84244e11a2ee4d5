"""Random access to the records of a source without holding them: a mapped table of their places, planned tokens and media."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.config import DataConfig, SourceConfig
from data.index.compressed import check_opener, is_compressed, unpacked
from data.index.dataset_folder import arrow_files
from data.index.json_scan import Advance, scan
from data.index.parquet import ParquetRows, scan_parquet
from data.index.reader import JsonRows, RecordReader, RowError
from data.index.sidecar import safe_name
from data.index.source_files import Shards
from data.index.subsets import write_json_subset, write_rows_subset, write_tar_subset
from data.index.table import KINDS, Table, file_stamps, join_tables, map_table, read_table_header, write_table
from data.index.tar_records import TarRows, scan_tar
from data.index.token_estimate import media_tokens
from data.media.blob import Blob, MediaError
from data.records.media_refs import MediaRef
from data.records.record import RecordError
from model.errors import ConfigError
from model.media_spec import MediaSpec

_DEFAULTS = DataConfig()


@dataclass(frozen=True)
class SourceFormat:
    """The functions that index, read and copy one kind of file."""

    scan: Callable[[Path, Advance], Table]
    rows: Callable[[Shards, Table], RecordReader]
    subset: Callable[[Path, Table, int, np.ndarray, Path], None]  # write a copy without some records
    holds_media: bool = False  # media stand beside the records, in the same file


FORMATS = {
    ".json": SourceFormat(scan, JsonRows, write_json_subset),
    ".jsonl": SourceFormat(scan, JsonRows, write_json_subset),
    ".parquet": SourceFormat(scan_parquet, ParquetRows, write_rows_subset, holds_media=True),
    ".arrow": SourceFormat(scan_parquet, ParquetRows, write_rows_subset, holds_media=True),
    ".tar": SourceFormat(scan_tar, TarRows, write_tar_subset, holds_media=True),
}
"""Formats by lower-case suffix. To add a kind of file, add an entry here, not a branch."""


class RecordIndex:
    """Records of one source by number. Opening maps a table; forked and pickled copies share its memory pages."""

    lengths: np.ndarray  # (N,) int32 planned tokens of each record, an estimate
    modalities: np.ndarray  # (N,) int8 bits: 1 has an image, 2 a video, 4 audio; 0 is text only

    def __init__(self, sidecar: Path, tokens: dict[str, int], has_folder: bool) -> None:
        """Open a valid index file. Raises `ConfigError` if it is none.

        `tokens`: planned tokens of one medium of each kind. `has_folder`: media may be files in a folder of the source.
        """
        files = read_table_header(sidecar)
        if files is None:
            raise ConfigError(f"{sidecar} is no index, or is damaged; start again to have it built")
        self._sidecar, self._tokens, self._has_folder = sidecar, tokens, has_folder
        self._table, self._shards = map_table(sidecar), Shards([path for path, _, _ in files])
        kind = FORMATS[Path(files[0][0]).suffix.lower()]
        self._rows, self._media_in_file_only = kind.rows(self._shards, self._table), kind.holds_media and not has_folder
        self.lengths, self.modalities = _lengths_and_modalities(self._table, tokens)

    @staticmethod
    def open(
        source: SourceConfig,
        folder: Path,
        specs: dict[str, MediaSpec],
        config: DataConfig = _DEFAULTS,
        on_progress: Callable[[str], object] = lambda at: None,
    ) -> RecordIndex:
        """Open the index of `source`.

        Its sidecar in `folder` is used if size and time of every file agree with it, and built otherwise.

        Several processes may do so at once. `on_progress` is called now and then with the name of the file being read. Raises
        `ConfigError` for a path that cannot be read, `DataError` for a file that is no list of records.
        """
        paths = [unpacked(path, folder, on_progress) if is_compressed(str(path)) else path for path in source_files(source)]
        files, kind = file_stamps(paths), FORMATS[paths[0].suffix.lower()]
        digest = hashlib.sha256(os.path.abspath(source.path).encode()).hexdigest()[:8]
        sidecar = folder / f"{safe_name(source.key)}-{digest}.index"
        if read_table_header(sidecar, all_bytes=True) != files:
            size = sum(size for _, size, _ in files)
            with tqdm(total=size, unit="B", unit_scale=True, desc=f"index {source.key}", delay=3, leave=False) as bar:
                write_table(
                    sidecar,
                    join_tables([_scanned(kind, path, _report_to_both(bar.update, on_progress, path.name)) for path in paths]),
                    files,
                )
        return RecordIndex(sidecar, media_tokens(specs, config), bool(source.media_root))

    def __len__(self) -> int:
        return len(self._table)

    def __reduce__(self) -> tuple[object, ...]:
        return RecordIndex, (self._sidecar, self._tokens, self._has_folder)

    def num_media(self, kind: str) -> np.ndarray:
        """Return how many media of a kind each record names (N,); an estimate, like `lengths`."""
        return self._table.media[:, KINDS.index(kind)]

    def raw(self, i: int) -> Any:
        """Return the decoded JSON of record `i`. Raises `RecordError` if it cannot be read."""
        try:
            return self._rows.raw(i)
        except RowError as error:
            raise RecordError(self.where(i), self.name(i), "json", str(error)) from None

    def blob(self, i: int, ref: MediaRef) -> Blob | None:
        """Return the place of a medium of record `i` if the records' own file holds it.

        Returns None if the medium is a file in the source's folder. Raises `MediaError` if it is neither, because the source has no
        folder for media.
        """
        found = self._rows.blob(i, ref)
        if found is None and self._media_in_file_only:
            raise MediaError(f"{ref.path!r} is not in {self.where(i)}; media that stand elsewhere need the source's media_root")
        return found

    def where(self, i: int) -> str:
        """Return the file name and the line, row or key of record `i`; lines and rows count from 1."""
        return f"{self._shards.names[self._table.file_of(i)]}:{self._rows.describe_position(i)}"

    def files(self) -> list[tuple[str, range]]:
        """Return the name of each file, with as much of its folder as distinguishes it, and the numbers of its records."""
        stops = self._table.file_stops.tolist()
        return [(name, range(*span)) for name, span in zip(self._shards.names, zip([0, *stops], stops))]

    def write_subset(self, file: int, kept: np.ndarray, target: Path) -> None:
        """Write a copy of a file, by its place in `files()`, with those of its records for which `kept` (N,) bool is true."""
        path, first = Path(self._shards.paths[file]), self.files()[file][1].start
        FORMATS[path.suffix.lower()].subset(path, self._table, first, kept, target)

    def name(self, i: int) -> str:
        """Return the name of a record `i` that has no id: its line, row or key.

        If several records share a line, the name is `[k]`, the position in the array, counted from 0.
        """
        file = self._table.file_of(i)
        first = int(self._table.file_stops[file - 1]) if file else 0
        places = [self._rows.describe_position(k) for k in range(max(i - 1, first), min(i + 2, int(self._table.file_stops[file])))]
        place = self._rows.describe_position(i)
        return place if places.count(place) == 1 else f"[{i - first}]"


def _report_to_both(advance: Advance, on_progress: Callable[[str], object], name: str) -> Advance:
    """Return a callback that reports progress to the bar and to the process that waits for the index."""

    def report_progress(num_bytes: int) -> None:
        advance(num_bytes)
        on_progress(name)

    return report_progress


def _scanned(kind: SourceFormat, path: Path, advance: Advance) -> Table:
    try:
        return kind.scan(path, advance)
    except OSError as error:  # a bare OSError would be reported as a failure to write
        raise ConfigError(f"data.sources: {path} cannot be read: {error.strerror}") from error


def source_files(source: SourceConfig) -> list[Path]:
    """Return the absolute paths of the files of a source, by name.

    Raises `ConfigError` if there are none or not of one readable kind.
    """
    name = f"data.sources path {source.path!r}"
    if os.path.isdir(source.path):
        return [Path(os.path.abspath(path)) for path in arrow_files(source.path)]
    is_file = os.path.isfile(source.path)
    found = [source.path] if is_file else sorted(path for path in glob.glob(source.path, recursive=True) if os.path.isfile(path))
    if not found:
        raise ConfigError(f"{name} {'matches no file' if glob.has_magic(source.path) else 'is no file'}")
    kinds = {_kind_of(path): path for path in found}
    if unknown := next((path for kind, path in kinds.items() if kind not in FORMATS), None):
        packed = unknown.lower().endswith((".gz", ".tgz", ".zst"))
        hint = "; unpack it: of compressed files only .json and .jsonl are read" if packed else ""
        which = "is" if is_file else f"matches {unknown!r}, which is"
        raise ConfigError(f"{name} {which} of no kind that is read ({', '.join(FORMATS)}){hint}")
    if len(kinds) > 1:
        raise ConfigError(f"{name} matches files of several kinds, {' and '.join(map(repr, kinds.values()))}: make each a source")
    for path in filter(is_compressed, found):
        check_opener(path)
    return [Path(os.path.abspath(path)) for path in found]


def _kind_of(path: str) -> str:
    """Return the end of the file's name that tells its format, below the compression."""
    return (Path(path).with_suffix("") if is_compressed(path) else Path(path)).suffix.lower()


def _lengths_and_modalities(table: Table, tokens: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the planned lengths (N,) int32 and the modality bits (N,) int8 of all records."""
    lengths, modalities = table.text_tokens.astype(np.int64), np.zeros(len(table), dtype=np.int8)
    for bit, kind in enumerate(KINDS):
        lengths += table.media[:, bit] * np.int64(tokens[kind])
        modalities |= (table.media[:, bit] > 0).astype(np.int8) << bit
    return np.minimum(lengths, np.iinfo(np.int32).max).astype(np.int32), modalities
